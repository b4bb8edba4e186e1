"""Finalists: children of other sizes for one wish, of which the best after some uptraining decides.

Before uptraining the child with the least KL is the best; after it another one may be, such as
a larger one ("architecture ranking can flip after distillation"). How much size is worth depends on
the model and on the tokens, so it is tried: with `search.finalists` of 2 or more, a child is
searched, served and met for each of so many values of `search.capacity`, uptrained on a part of the
tokens, and measured on validation text. The best one's value is the one that the child itself is
searched with, and what its searches have measured is not measured again. `pipeline.choose_finalist`
is the loop; finalists are children of their own.
"""

import numpy as np

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.config import ChildConfig
from puzzle.cost import COST
from puzzle.score import SCORE
from puzzle.stage import Job

CAPACITIES = (0.0, 4.0, 2.0, 8.0, 1.0)  # the first `search.finalists` of them
SHARE = 0.125  # of the tokens of uptraining, for each
FINALISTS = "finalists.json"  # in the child's folder


class Finalist(Record):
    """One child that was tried."""

    child: str  # its name
    capacity: float
    parameters: int
    before: float  # KL on the text for scores, before uptraining; where it is not known, the sum
    kl: float  # on validation text, after a part of uptraining


class Choice(Record):
    """`finalists.json`: what was tried, the best first."""

    asked: str  # fingerprint of what was asked, and of what it was answered from
    finalists: list[Finalist]


def children(job: Job) -> dict[float, tuple[str, ChildConfig]]:
    """By capacity: name and settings of every finalist; none where none are asked for."""
    child = job.child
    if child.search.finalists == 1 or child.search.architecture is not None:
        return {}
    found = {}
    for capacity in CAPACITIES[: child.search.finalists]:
        search = {"finalists": 1, "capacity": capacity}
        uptrain = {"tokens": max(1, round(SHARE * child.uptrain.tokens))}
        found[capacity] = (
            f"{child.name}-capacity-{capacity:g}",
            ChildConfig(
                place=child.place,
                search=child.search.model_copy(update=search),
                uptrain=child.uptrain.model_copy(update=uptrain),
                evaluate=child.evaluate,
            ),
        )
    return found


def capacity(job: Job) -> float:
    """The value of `search.capacity` that the child is searched with."""
    choice = read(job)
    return job.child.search.capacity if choice is None else choice.finalists[0].capacity


def read(job: Job) -> Choice | None:
    """What was chosen for what is asked now; None where nothing was."""
    path = job.child.folder / FINALISTS
    if not children(job) or not path.exists():
        return None
    choice = Choice.read(path)
    return choice if choice.asked == _asked(job) else None


def write(job: Job, finalists: list[Finalist]) -> Choice:
    """Keep what was found, the best first."""
    ranked = sorted(finalists, key=lambda one: one.kl)
    choice = Choice(asked=_asked(job), finalists=ranked)
    choice.write(job.child.folder / FINALISTS)
    return choice


def validation_kl(job: Job) -> float:
    """Of a finalist that is uptrained: of the weights that were kept, nats per token."""
    from puzzle.uptrain import trainer

    curve = trainer.read_curve(job)
    shown = [point.validation["kl"] for point in curve if point.validation is not None]
    return min(shown) if job.child.uptrain.keep == "best" else shown[-1]


def rounds(job: Job) -> int:
    """How many times a child is searched and served."""
    return 1 + len(children(job))


def describe(choice: Choice) -> list[str]:
    """A line for each, the best first, and of three or more the rank correlation."""
    lines = [
        f"{one.child}: {one.parameters / 1e6:,.2f}M parameters; KL {one.before:.4f} before "
        f"uptraining, {one.kl:.4f} after {SHARE:.1%} of it"
        for one in choice.finalists
    ]
    if len(lines) > 2:
        before = [one.before for one in choice.finalists]
        agree = _rank_correlation(before, [one.kl for one in choice.finalists])
        lines.append(f"rank correlation of before and after: {agree:.2f}")
    return lines


def _rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])


def _asked(job: Job) -> str:
    made = {stage.name: artifacts.read_manifest(job.folder(stage)) for stage in (SCORE, COST)}
    return artifacts.fingerprint(
        {
            "search": job.child.search.model_dump(mode="json"),
            "uptrain": job.child.uptrain.model_dump(mode="json"),
            "place": job.child.place,
            "after": {name: None if m is None else m.fingerprint for name, m in made.items()},
        }
    )
