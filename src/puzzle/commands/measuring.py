"""What `puzzle measure` does: a child beside its parent on the engine of a place."""

import contextlib
import tempfile
from pathlib import Path

from puzzle import engines, locks
from puzzle.assemble.measured import how
from puzzle.config import PlaceConfig
from puzzle.engines import Engine
from puzzle.engines.turns import Measurement, Served, measure_pair
from puzzle.model.architecture import Architecture
from puzzle.model.parent import describe as describe_parent
from puzzle.progress import Progress


def measure(
    child_folder: Path, parent: str, place: PlaceConfig, starts: int, progress: Progress
) -> tuple[Engine, dict[str, Measurement]]:
    """(the engine, a measurement by scenario).

    Args:
        child_folder: the child's checkpoint.
        parent: a folder or a hub name.
        place: engine and scenarios.
        starts: of both engines.
        progress: where to report.
    """
    described = describe_parent(parent)
    logs = Path(tempfile.mkdtemp(prefix="puzzle-measure-"))
    engine = engines.choose(place.cost, place.deploy, logs)
    device: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if engine.measured:
        device = locks.hold_device(engine.facts.device, progress.say)
    measurements = {}
    elements = Architecture.of_parent(described.shape).kv_elements_per_token(described.shape)
    kv_bytes_per_token = elements * described.dtype.itemsize
    with device:
        for name, scenario in place.cost.measured.items():
            dtype = described.dtype_name if scenario.dtype == "auto" else scenario.dtype
            served = scenario.model_copy(update={"dtype": dtype})
            title = f"parent against child on {engine.name} ({scenario})"
            length = scenario.input_length + scenario.output_length
            cache = kv_bytes_per_token * scenario.batch_size * length  # of the child, at most
            sides = (
                Served(described.folder, served, cache),
                Served(child_folder, served, cache),
            )
            with progress.task(title, starts, "starts") as task:
                measurements[name] = measure_pair(
                    engine, *sides, starts, lambda measurement: True, task.advance
                )
    return engine, measurements


def describe(name: str, engine: Engine, measurement: Measurement) -> str:
    """One line for people."""
    word = "measured" if engine.measured else "modelled"
    parent, child = (
        f"{side.throughput_tok_per_s.value:,.0f} tok/s"
        for side in (measurement.parent, measurement.child)
    )
    speedup = measurement.speedup.with_unit(".2f", "x")
    return (
        f"{name}: {word} {speedup} the parent's throughput ({parent} -> {child}) on "
        f"{engine.facts.engine} {engine.facts.version}, {engine.facts.device}; {how(measurement)}"
    )
