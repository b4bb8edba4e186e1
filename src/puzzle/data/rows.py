"""Texts that come as rows of named columns: JSON Lines, Parquet, Hugging Face datasets."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from puzzle.config import SourceConfig
from puzzle.errors import UserError, reason

Row = dict[str, object]  # values by column
Spans = tuple[tuple[int, int], ...]  # parts of a text, each from a character to before another


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file. Raises `UserError` with the number of a bad line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                message = f"{place}: not JSON ({error.msg}); expected one object a line"
                raise UserError(message) from None
            except (ValueError, RecursionError) as error:
                message = f"{place}: not JSON ({reason(error)}); expected one object a line"
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
        raise UserError(f"{path}: not a readable Parquet file ({reason(error)})") from None
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
        raise UserError(
            f"corpus source {source.dataset!r}: cannot load the dataset: {reason(error)}"
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


def row_text(
    row: Row, source: SourceConfig, tokenizer: PreTrainedTokenizerBase | None, place: str
) -> tuple[str, Spans | None]:
    """A row's text column, or its chat messages through the tokenizer's chat template.

    Of a chat also where the assistant speaks; None for plain text, which counts as a whole.
    Raises `UserError`, which begins with `place`, where the row has neither, or the chat has no
    template.
    """
    text = row.get(source.text_column)
    if isinstance(text, str):
        return text, None
    messages = row.get(source.messages_column)
    if not isinstance(messages, list):
        if source.text_column in row:
            raise UserError(
                f"corpus source {place}: {source.text_column!r} is {type(text).__name__}, expected "
                "text; set text_column to another column"
            )
        columns = ", ".join(map(repr, sorted(row)[:10])) or "none"
        raise UserError(
            f"corpus source {place}: no {source.text_column!r} and no {source.messages_column!r}; "
            f"got columns {columns}; set text_column or messages_column"
        )
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"corpus source {place}: a chat ({source.messages_column!r}), but the parent's "
            "tokenizer has no chat template; use plain text, or a parent with a chat template"
        )
    try:
        chat = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # whatever a template raises
        raise UserError(
            f"corpus source {place}: the chat template refuses it: {reason(error)}"
        ) from None
    return chat, assistant_spans(chat, messages)


def assistant_spans(chat: str, messages: list[Any]) -> Spans:
    """Where the assistant's messages stand in a chat that a template has written.

    The content alone, as the template shows it: what it adds around a message is the same for all.
    A message that the template has changed (some drop earlier reasoning) is not found, and does not
    count.
    """
    spans, at = [], 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        text = content.strip() if isinstance(content, str) else ""
        start = chat.find(text, at) if text else -1
        if start < 0:
            continue
        at = start + len(text)
        if message.get("role") == "assistant":
            spans.append((start, at))
    return tuple(spans)
