"""Stage `export`: the finished child in the forms other engines read, each loaded again and
compared with the child.

Reads: `uptrained/` (or `child/` where there is no uptrained one). Writes: `export/FORMAT[-DTYPE]/`,
one manifest each, so that asking for one format again, or for another, costs nothing twice.
"""

from pathlib import Path
from typing import Any

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.export import formats as exporters
from puzzle.run import Run


def source(run: Run) -> Path:
    """The folder of the finished child, or of the one that has not been uptrained yet."""
    for stage in ("uptrain", "assemble"):
        folder = run.stage_folder(stage)
        if artifacts.manifest(folder) is not None:
            return folder
    raise UserError(f"run {run.folder}: has no child yet; run `puzzle run` first")


def run(run: Run, name: str, dtype: str | None = None) -> dict[str, Any]:
    """Export in one format and check it. `dtype`: of the weights, e.g. f16; the format's usual one
    where it is None.
    """
    exporter, child = exporters.exporter(name), source(run)
    folder = run.stage_folder("export") / (name if dtype is None else f"{name}-{dtype}")
    found = artifacts.manifest(child)
    assert found is not None
    inputs = {"child": found["fingerprint"], "dtype": dtype}
    if not artifacts.is_done(folder, inputs):
        if child.name != "uptrained":
            run.progress.say("  the child has not been uptrained yet: exporting it as assembled")
        artifacts.begin(folder, inputs)
        written = exporter.export(child, folder, name=run.folder.resolve().name, dtype=dtype)
        compared = exporter.verify(child, folder)
        artifacts.write_manifest(folder, inputs, {"written": written, "verified": compared})
    outputs: dict[str, Any] = artifacts.manifest(folder)["outputs"]  # type: ignore[index]
    return {"format": name, "folder": str(folder), **outputs}
