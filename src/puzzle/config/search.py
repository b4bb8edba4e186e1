"""What is asked of a child: the section `search`, and what is said of constraints without costs."""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from puzzle.config.section import Positive, Section

MoreIsBetter = Literal["throughput", "user_throughput"]
LessIsBetter = Literal[
    "latency",
    "time_to_first_token",
    "inter_token_latency",
    "memory",
    "parameters",
    "kv_cache",
]
Constrained = Literal[MoreIsBetter, LessIsBetter]
CONSTRAINTS: tuple[str, ...] = get_args(Constrained)
TARGETS = ("maximize", "minimize", "kl")  # of a search in the other direction


def _with_unit(value: object) -> object:
    if isinstance(value, list):
        raise ValueError("expected a number with a unit, or relative to the parent: 2x")
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"expected a number with a unit, or relative to the parent: {value:g}x")
    return value


# One text for every scenario, or a text by the scenario's name.
Quantity = Annotated[str | dict[str, str] | None, BeforeValidator(_with_unit)]


def _no_file(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(
            "expected a list of blocks, one for each layer; a file of them is for `puzzle child "
            "RUN --name NAME --architecture FILE`"
        )
    return value


Blocks = Annotated[list[str] | None, BeforeValidator(_no_file)]


class SearchConfig(Section):
    """What is asked of a child, and how it is searched for.

    Constraints are absolute with a unit ("40GiB", "3s", "1500 tok/s") or relative to the parent
    ("2x", "50%"). Latencies and `user_throughput` may be asked at a percentile: "30ms p95", of p50,
    p90, p95 and p99, on a quiet machine.
    """

    throughput: Quantity = None  # output tokens per second of the whole batch
    user_throughput: Quantity = None  # of one sequence, while the batch is full
    latency: Quantity = None  # seconds per batch
    time_to_first_token: Quantity = None  # until every sequence has one; p95: until 95 % have
    inter_token_latency: Quantity = None  # the mean over the output; p95: 95 % of the steps
    memory: Quantity = None
    parameters: Quantity = None
    kv_cache: Quantity = None
    # What the loss of all of the parent's parameters counts as, in nats per token beside the KL
    # before uptraining: of two with the same KL the larger one tends to recover better.
    capacity: float = Field(default=0.0, ge=0)
    # So many children of other capacities are made and uptrained on an eighth of the tokens, and
    # the best one's capacity is taken (search/finalists.py).
    finalists: Annotated[int, Field(ge=1, le=5)] = 1
    # The other direction: the best of one figure within a loss of quality, `kl`: the predicted KL
    # before uptraining, in nats per token, going by children that were assembled.
    maximize: MoreIsBetter | None = None
    minimize: LessIsBetter | None = None
    kl: float | None = Field(default=None, gt=0)
    # At most so many layers may differ from the parent's.
    changed_layers: int | None = Field(default=None, ge=0)
    homogeneous: bool = False  # one block everywhere, as in Minitron
    monotone: bool = False  # FFN widths never grow with depth
    frontier: Constrained = "throughput"
    points: Positive = 25
    architecture: Blocks = None  # make exactly this child; nothing is searched
    gap: float = Field(default=1e-4, ge=0)
    solutions: Positive = 1
    # In how many layers solutions differ: a share, or a number of layers from 1 on.
    diversity: Annotated[float, Field(gt=0)] = 0.2
    # Timed constraints are aimed at with this much to spare; default: as much as
    # predictions, or measurements on a noisy machine, are uncertain.
    margin: float | None = Field(default=None, ge=0, lt=0.5)
    # Children that are assembled and served at most, until one meets the wish from just above.
    attempts: Positive = 4
    # Times at most that blocks are scored again in the company of the best child, to find a better
    # one around it (search/around.py); 0: the best sum of scores is the child.
    refinements: int = Field(default=2, ge=0)
    time_limit_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _one_target(self) -> "SearchConfig":
        if self.maximize and self.minimize:
            raise ValueError("maximize and minimize are both set; set one of them")
        if (self.target is None) != (self.kl is None):
            raise ValueError(
                "kl and one of maximize and minimize go together, for example "
                "{maximize: throughput, kl: 0.15}"
            )
        if self.target is not None and self.architecture is not None:
            raise ValueError("architecture is given, so nothing is maximized or minimized")
        return self

    @property
    def target(self) -> str | None:
        """The figure that is maximized or minimized, instead of the loss of quality."""
        return self.maximize or self.minimize


def with_constraints(
    search: dict[str, JsonValue], changes: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """The settings of a search with changes.

    Naming a constraint or a target drops all that were there, and an architecture that was given.
    """
    kept = dict(search)
    if any(changes.get(name) is not None for name in (*CONSTRAINTS, *TARGETS)):
        kept |= dict.fromkeys((*CONSTRAINTS, *TARGETS, "architecture"))
    if changes.get("architecture") is not None:  # it is made, whatever was asked before
        kept |= dict.fromkeys((*CONSTRAINTS, *TARGETS))
    return kept | dict(changes)
