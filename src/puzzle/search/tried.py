"""What serving has shown for a child: kept beside it, it corrects the child's next search.

`measured.jsonl` holds the architectures that were served as children beside the parent, and
`neighbours.jsonl` those that were served beside a child in the probe's engine. Both join the cost
model of this child's searches (`cost/refit.py`), as long as they are of the costs of now.

A child is searched, assembled and served until one is met from just above: less than 2 % beyond
what was asked. The child that goes on is the best in score that is met; after the last try, where
none is, the best of those that are likely met but undecided.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle import artifacts
from puzzle.artifacts import Record
from puzzle.cost import COST
from puzzle.cost.refit import Observation
from puzzle.engines.turns import Measurement
from puzzle.model.architecture import Architecture
from puzzle.score import SCORE
from puzzle.search import finalists
from puzzle.search.answers import Solution
from puzzle.search.around import ASSEMBLED, AssembledScore
from puzzle.search.promise import Verdict
from puzzle.stage import Job

LEAST_GAIN = 0.01  # of what the search makes least, for which another child is assembled and served
# Settings of a search that do not change what is asked for
NOT_ASKED = {
    "attempts",
    "capacity",
    "diversity",
    "finalists",
    "frontier",
    "gap",
    "margin",
    "points",
    "solutions",
    "time_limit_s",
}
MEASURED, NEIGHBOURS = "measured.jsonl", "neighbours.jsonl"  # in the child's folder


class MeasuredChild(Record):
    """One line of `measured.jsonl`: an architecture that was served beside the parent."""

    source: str  # fingerprint of the stage that measured it
    costs: str  # fingerprint of the costs that it was predicted from
    wish: str  # fingerprint of what was asked, and of the scores it was searched with
    asked: list[str]  # the constraints, in words, for people
    blocks: list[str]
    objective: float  # what the search makes least: `Solution.rank`
    tables: dict[str, str]  # by scenario: the name of its costs
    parent_tables: dict[str, str]  # the same, of the parent beside it
    measurements: dict[str, Measurement]  # by scenario
    verdict: Verdict
    gives_away: bool  # more than 2 % beyond every constraint
    is_likely: bool = False  # undecided, but its estimates are what was asked
    # From estimates to the ends of intervals as wide as after all looks, as a share of them
    uncertainty: float = 0.0

    @property
    def is_accepted(self) -> bool:
        """Met, from just above."""
        return self.verdict == "met" and not self.gives_away


class Neighbours(Record):
    """One line of `neighbours.jsonl`."""

    source: str  # of the child that they are neighbours of
    observations: list[Observation]


def inherit(job: Job, other: Job) -> None:
    """Take over what the searches of another child have measured: it is not measured again."""
    _take_over(job, other, ASSEMBLED, AssembledScore)
    _take_over(job, other, MEASURED, MeasuredChild)
    _take_over(job, other, NEIGHBOURS, Neighbours)


def _take_over(job: Job, other: Job, name: str, kind: type[Record]) -> None:
    path = job.child.folder / name
    known = artifacts.read_records(path, kind)
    for record in artifacts.read_records(other.child.folder / name, kind):
        if record not in known:
            artifacts.append_record(path, record)


def costs_fingerprint(job: Job) -> str:
    """Of the costs that the child's searches are made from."""
    manifest = artifacts.read_manifest(job.folder(COST))
    return "" if manifest is None else manifest.fingerprint


def read_measured(job: Job) -> list[MeasuredChild]:
    """Every architecture that was served for this child, with the costs of now."""
    records = artifacts.read_records(job.child.folder / MEASURED, MeasuredChild)
    costs = costs_fingerprint(job)
    return [record for record in records if record.costs == costs]


def wish(job: Job) -> str:
    """Fingerprint of what is asked and of the scores: tries of another wish do not compare."""
    score, manifest = job.run.recipe.score, artifacts.read_manifest(job.folder(SCORE))
    return artifacts.fingerprint(
        {
            "search": job.child.search.model_dump(mode="json", exclude=NOT_ASKED),
            "capacity": finalists.capacity(job),
            "scores": None if manifest is None else manifest.fingerprint,
            "metric": score.metric,
            "granularity": score.granularity,
        }
    )


def _correcting(job: Job) -> list[MeasuredChild]:
    """Those that correct the next search: served for what is asked now, and not accepted.

    None where the architecture is given. Another wish starts from the table, so that a question has
    the same answer whichever child it is put to.
    """
    if job.child.search.architecture is not None:
        return []
    wanted = wish(job)
    return [c for c in read_measured(job) if c.wish == wanted and not c.is_accepted]


def _neighbours_of(job: Job, children: Sequence[MeasuredChild]) -> list[Neighbours]:
    sources = {child.source for child in children}
    rows = artifacts.read_records(job.child.folder / NEIGHBOURS, Neighbours)
    return [row for row in rows if row.source in sources]


def record_measured(job: Job, measured: MeasuredChild) -> None:
    """Append what a stage has measured, once."""
    path = job.child.folder / MEASURED
    known = artifacts.read_records(path, MeasuredChild)
    if all(record.source != measured.source for record in known):
        artifacts.append_record(path, measured)


def record_neighbours(job: Job, source: str, seen: Sequence[Observation]) -> None:
    """Append what was served beside a child in the probe's engine."""
    row = Neighbours(source=source, observations=list(seen))
    artifacts.append_record(job.child.folder / NEIGHBOURS, row)


def has_neighbours(job: Job, child: MeasuredChild) -> bool:
    """Whether the neighbours of a measured child are known."""
    return bool(_neighbours_of(job, [child]))


def observations(job: Job) -> dict[str, list[Observation]]:
    """By scenario's table: all that corrects the costs of this child's next search."""
    children = _correcting(job)
    parent = Architecture.of_parent(job.run.parent.shape).names
    seen = [observation for child in children for observation in _of_child(child, parent)]
    seen += [seen for row in _neighbours_of(job, children) for seen in row.observations]
    by_table: dict[str, list[Observation]] = {}
    for observation in seen:
        by_table.setdefault(observation.scenario, []).append(observation)
    return by_table


def _of_child(child: MeasuredChild, parent: list[str]) -> list[Observation]:
    return [
        Observation(
            scenario=child.tables[name],
            blocks=child.blocks,
            compared_with=parent,
            compared_in=child.parent_tables[name],
            prefill=measurement.time_to_first_token_ratio,
            decode=measurement.decode_ratio,
            memory_bytes=measurement.child.memory_bytes,
            first_token=measurement.child.first_token,
            inter_token=measurement.child.inter_token,
        )
        for name, measurement in child.measurements.items()
    ]


@dataclass(frozen=True)
class Tries:
    """The architectures that were served for what is asked now, in their order."""

    children: list[MeasuredChild]

    @classmethod
    def of(cls, job: Job) -> "Tries":
        """Those of this wish that were not accepted; none where the architecture is given."""
        return cls(_correcting(job))

    @property
    def best(self) -> MeasuredChild | None:
        """The best in score that is met, and that nothing measured later has refused."""
        return self._best_of([child for child in self.children if child.verdict == "met"])

    @property
    def likely(self) -> MeasuredChild | None:
        """The same of those that are likely met, but undecided."""
        return self._best_of([child for child in self.children if child.is_likely])

    def _best_of(self, children: Sequence[MeasuredChild]) -> MeasuredChild | None:
        left = [child for child in children if child.blocks not in self.refused]
        return min(left, key=lambda child: child.objective, default=None)

    @property
    def uncertainty(self) -> float:
        """Of what is measured here and now, as a share: that of the widest interval."""
        return max((child.uncertainty for child in self.children), default=0.0)

    def are_used_up(self, attempts: int) -> bool:
        """Whether one of them goes on and no further one may be tried."""
        goes_on = self.best or self.likely
        return goes_on is not None and len(self.children) >= attempts

    def settle(self, following: Solution | None, attempts: int) -> MeasuredChild | None:
        """The child that goes on, where no further try is worth it; None where one is.

        Args:
            following: what would be tried next, if anything.
            attempts: how many are tried at most.
        """
        best = self.best
        if following is None or self.are_used_up(attempts):
            return best or self.likely
        if best is None:
            return None
        gain = best.objective - following.rank
        is_worth_it = following.blocks != best.blocks and gain > LEAST_GAIN * abs(best.objective)
        return None if is_worth_it else best

    @property
    def refused(self) -> list[list[str]]:
        """The blocks of those that were missed: they are not taken again."""
        return [child.blocks for child in self.children if child.verdict == "missed"]


def corrections(job: Job) -> list[str]:
    """Fingerprints of what corrects this child's next search: a part of its settings."""
    children = _correcting(job)
    rows = _neighbours_of(job, children)
    return [artifacts.fingerprint(record.as_json()) for record in [*children, *rows]]


def measured_before(job: Job, source: str) -> MeasuredChild | None:
    """What serving an earlier try has shown: speed does not depend on the weights."""
    return next((child for child in _correcting(job) if child.source == source), None)
