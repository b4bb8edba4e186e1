"""Text that the parent writes, where nobody has its training text: the corpus source `parent`.

Documents are sampled from the parent, from given prompts in turn or from the beginning of a text,
on vLLM where costs are measured on it, otherwise in this process. Document number n has seed n.
What is finished stays after an interruption; one costs at most a shard of `SHARD_DOCUMENTS`.

Writes: `RUN/written/NNNNN.jsonl`, which the corpus reads as it reads any JSON Lines.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.config import CorpusConfig, SourceConfig
from puzzle.data.packing import Frame
from puzzle.data.rows import jsonl_rows
from puzzle.engines import Sampling, Writer
from puzzle.errors import UserError
from puzzle.model.sampling import sample

if TYPE_CHECKING:
    from puzzle.run import Run

FOLDER = "written"
SHARD_DOCUMENTS = 64


class WrittenDocument(Record):
    """One line of a shard."""

    text: str
    tokens: int


def with_files(run: "Run", config: CorpusConfig) -> CorpusConfig:
    """The corpus's settings with what the parent has written in the place of its source.

    Writes what is missing. Raises `UserError` for prompts that cannot be read.
    """
    sources = [
        SourceConfig(path=str(_written(run, config, source)), weight=source.weight)
        if source.parent
        else source
        for source in config.sources
    ]
    return config.model_copy(update={"sources": sources})


def _written(run: "Run", config: CorpusConfig, source: SourceConfig) -> Path:
    folder = run.folder / FOLDER
    share = source.weight / sum(one.weight for one in config.sources)
    tokens = int(share * (config.train_tokens + config.held_out_tokens))
    inputs: artifacts.Inputs = {
        "parent": run.parent.fingerprint,
        "source": source.model_dump(mode="json"),
        "prompts": artifacts.file_fingerprint(_prompts_file(source)) if source.prompts else "",
        "tokens": tokens,
    }
    if artifacts.is_done(folder, inputs):
        return folder
    artifacts.begin(folder, inputs)
    began, made = time.perf_counter(), 0
    prompts = _prompts(run, source)
    longest = int(run.parent.hf_config.max_position_embeddings)
    length = min(source.document_tokens, longest - max(map(len, prompts)))
    if length < 1:
        raise UserError(
            f"corpus source parent: the longest prompt of {source.prompts} fills the parent's "
            f"context of {longest} tokens; use shorter prompts"
        )
    sampling = Sampling(tokens=length, temperature=source.temperature)
    with (
        contextlib.ExitStack() as stack,
        run.progress.task("the parent writes text", tokens, "tokens") as task,
    ):
        writer: Writer | None = None
        for number in itertools.count():
            path = folder / f"{number:05d}.jsonl"
            if not path.exists():
                if writer is None:
                    writer = stack.enter_context(_writer(run, sampling))
                _write_shard(run, writer, prompts, number, path)
            count = sum(d.tokens for d in artifacts.read_records(path, WrittenDocument))
            task.advance(count)
            made += count
            if made >= tokens:
                break
    artifacts.write_manifest(folder, inputs, time.perf_counter() - began)
    return folder


def _write_shard(
    run: "Run", writer: Writer, prompts: list[list[int]], number: int, path: Path
) -> None:
    first = number * SHARD_DOCUMENTS
    seeds = range(first, first + SHARD_DOCUMENTS)
    asked = [prompts[seed % len(prompts)] for seed in seeds]
    tokenizer, documents = run.parent.tokenizer, []
    for prompt, new in zip(asked, writer.write(asked, list(seeds)), strict=True):
        text = str(tokenizer.decode([*prompt, *new], skip_special_tokens=True))
        documents.append(WrittenDocument(text=text, tokens=len(prompt) + len(new)))
    artifacts.write_records(path, documents)


def _prompts_file(source: SourceConfig) -> Path:
    path = Path(source.prompts or "").expanduser()
    if not path.is_file():
        raise UserError(f"corpus source parent: prompts {path}: no such file")
    return path


def _prompts(run: "Run", source: SourceConfig) -> list[list[int]]:
    """Token ids of every prompt; without prompts, of the beginning of a text."""
    tokenizer = run.parent.tokenizer
    start = Frame.of(tokenizer).prefix
    if source.prompts is None:
        first = tokenizer.bos_token_id
        return [start or [tokenizer.eos_token_id if first is None else first]]
    path = _prompts_file(source)
    if path.suffix == ".jsonl":
        texts = [str(row.get(source.text_column, "")) for row in jsonl_rows(path)]
    else:
        texts = path.read_text(encoding="utf-8").splitlines()
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts if text.strip()]
    if not encoded:
        raise UserError(f"corpus source parent: prompts {path}: no prompt; expected one a line")
    return [[*start, *ids] for ids in encoded]


@contextlib.contextmanager
def _writer(run: "Run", sampling: Sampling) -> Iterator[Writer]:
    """The engine of the place `here` where it writes, otherwise the parent in this process."""
    engine = run.place_job().engine
    if engine.write is not None:
        with engine.write(run.parent.folder, sampling) as writer:
            yield writer
        return
    yield _InProcess(run, sampling)


class _InProcess:
    """The parent in this process."""

    def __init__(self, run: "Run", sampling: Sampling) -> None:
        self.run, self.sampling = run, sampling

    def write(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """New token ids for every prompt; see `Writer`."""
        how = self.sampling
        with self.run.device.autocast():
            return sample(self.run.parent_model, prompts, how.tokens, how.temperature, seeds)
