"""Texts that come as rows of named columns: JSON Lines, Parquet, Hugging Face datasets."""

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from puzzle.config import SourceConfig
from puzzle.errors import UserError

Row = dict[str, object]  # values by column


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file. Raises `UserError` with the number of a bad line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                message = f"{place}: not JSON ({error.msg}); expected one object a line"
                raise UserError(message) from None
            if not isinstance(row, dict):
                raise UserError(f"{place}: got {type(row).__name__}, expected a JSON object")
            yield row


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file. Raises `UserError` where it is none."""
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None
    for batch in file.iter_batches(batch_size=256):
        yield from batch.to_pylist()


def hub_rows(source: SourceConfig, seed: int) -> Iterator[Row]:
    """The rows of a dataset of the Hugging Face hub, streamed and shuffled in a buffer of 1000.

    Raises `UserError` where the dataset cannot be loaded.
    """
    import datasets

    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"corpus source {source.dataset!r}: cannot load the dataset: {reason}"
        ) from None
    yield from rows.shuffle(seed=seed, buffer_size=1000)


def hub_commit(source: SourceConfig) -> str:
    """The commit that a dataset's revision is today. Raises `UserError` where it cannot be told."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(str(source.dataset), revision=source.revision)
    except Exception as error:
        raise UserError(
            f"corpus source {source.dataset!r}: neither a folder here nor reachable on the hub "
            f"({type(error).__name__})"
        ) from None
    return str(info.sha)


def row_text(row: Row, source: SourceConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A row's text column, or its chat messages through the tokenizer's chat template.

    Raises `UserError` where the row has neither, or the chat has no template.
    """
    text = row.get(source.text_column)
    if isinstance(text, str):
        return text
    messages = row.get(source.messages_column)
    if not isinstance(messages, list):
        raise UserError(
            f"corpus source {source.label}: a row has no {source.text_column!r} and no "
            f"{source.messages_column!r}; got columns {sorted(row)}; "
            "set text_column or messages_column"
        )
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"corpus source {source.label}: rows are chats ({source.messages_column!r}) but the "
            "parent's tokenizer has no chat template; "
            "use plain text, or a parent with a chat template"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # whatever a template raises
        raise UserError(
            f"corpus source {source.label}: the chat template refuses a row: {error}"
        ) from None
