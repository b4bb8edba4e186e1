"""What runs of different numbers of processes have made, compared."""

import pytest
import torch
from safetensors.torch import load_file

from puzzle import artifacts
from puzzle.assemble import ASSEMBLE
from puzzle.evaluate import results as evaluation
from puzzle.library import LIBRARY
from puzzle.library.records import VariantRecord, read_index
from puzzle.model import child
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.score.results import SCORES, BlockScore
from puzzle.stage import Job


def scores_of(run: Run) -> list[BlockScore]:
    return artifacts.read_records(Job(run).folder(SCORE) / SCORES, BlockScore)


def library_of(run: Run) -> tuple[dict[str, torch.Tensor], list[VariantRecord]]:
    folder = Job(run).folder(LIBRARY)
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    return weights, read_index(Job(run))


def children_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.child_job("main").folder(ASSEMBLE) / "model.safetensors")


def assert_same_run(run: Run, expected: Run) -> None:
    """Library, scores, child and evaluation, to what the order of sums leaves open."""
    ours, theirs = library_of(run)[0], library_of(expected)[0]
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    for score, other in zip(scores_of(run), scores_of(expected), strict=True):
        assert score.model_copy(update={"result": other.result}) == other
        assert score.result.sums == pytest.approx(other.result.sums, rel=1e-4, abs=1e-4)
    blocks = [
        child.read_architecture(r.child_job("main").folder(ASSEMBLE)) for r in (run, expected)
    ]
    assert blocks[0] == blocks[1]
    for name, tensor in children_of(run).items():
        torch.testing.assert_close(tensor, children_of(expected)[name], rtol=1e-5, atol=1e-6)
    ours, theirs = (evaluation.read(r.child_job("main")) for r in (run, expected))
    assert ours.child.quality.kl.value == pytest.approx(theirs.child.quality.kl.value, rel=1e-4)
    # eight steps of AdamW, whose gradients are means over the batch in another order
    uptrained = (ours.uptrained.quality.kl.value, theirs.uptrained.quality.kl.value)
    assert uptrained[0] == pytest.approx(uptrained[1], rel=1e-3)
