"""What the library's folder holds beside the weights: one record per variant, and their curves."""

from typing import Literal

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.library import LIBRARY
from puzzle.stage import Job

INDEX, CURVE = "index.jsonl", "curve.jsonl"
AnySlot = Literal["attention", "ffn", "block"]


class LossPoint(Record):
    """Losses of a variant after so many tokens: normalised MSE of the block's output."""

    tokens: int
    validation: float
    train: float | None = None  # the mean since the point before


class VariantRecord(Record):
    """One line of `index.jsonl`: a trained variant, or a no-op for comparison."""

    layer: int
    slot: AnySlot
    variant: str
    file: str | None  # of its weights; none for a no-op
    nmse_before: float  # normalised MSE on validation text before training, and after it
    nmse_after: float
    tokens: int = 0
    stopped: str = ""  # why its training ended early
    seed: int = 0


class CurvePoint(Record):
    """One line of `curve.jsonl`."""

    layer: int
    slot: AnySlot
    variant: str
    tokens: int
    validation: float
    train: float | None


def read_index(job: Job) -> list[VariantRecord]:
    """Every trained variant and every no-op."""
    return artifacts.read_records(job.folder(LIBRARY) / INDEX, VariantRecord)


def read_curve(job: Job) -> list[CurvePoint]:
    """The losses of every trained variant, in the order of its training."""
    return artifacts.read_records(job.folder(LIBRARY) / CURVE, CurvePoint)
