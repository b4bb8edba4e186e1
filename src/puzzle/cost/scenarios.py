"""Scenarios as they are served: each with a dtype of its own, never the engine's choice."""

from puzzle.config import ScenarioConfig
from puzzle.stage import Job


def served_scenarios(job: Job) -> dict[str, ScenarioConfig]:
    """The scenarios that are measured at a place, each with the dtype it is served in."""
    return {name: served(job, scenario) for name, scenario in job.place.cost.measured.items()}


def served(job: Job, scenario: ScenarioConfig) -> ScenarioConfig:
    """A scenario with the dtype it is served in: its own, or that of the parent's weights.

    A dtype of the engine's choice would not be the one that bytes are counted in.
    """
    dtype = job.run.parent.dtype_name if scenario.dtype == "auto" else scenario.dtype
    return scenario.model_copy(update={"dtype": dtype})


def element_bytes(scenario: ScenarioConfig) -> int:
    """Bytes of a weight in the dtype that a scenario is served in."""
    return 4 if scenario.dtype == "float32" else 2
