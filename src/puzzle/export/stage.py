"""`puzzle export`: the finished child in the forms other engines read, each loaded and compared.

Reads: `uptrained/` (or `child/` where there is no uptrained one), the report's model card. Writes:
`export/FORMAT[-DTYPE]/` of the child, one manifest each, so that asking for one format again, or
for another, costs nothing twice.
"""

import time
from pathlib import Path

from pydantic import JsonValue

from puzzle import artifacts
from puzzle.artifacts import Inputs, Record
from puzzle.assemble import ASSEMBLE
from puzzle.errors import UserError
from puzzle.export import formats
from puzzle.export.exporter import Options
from puzzle.report import REPORT
from puzzle.stage import Job
from puzzle.uptrain import UPTRAIN

FOLDER, FILE, CARD = "export", "export.json", "README.md"


class Export(Record):
    """`export.json`: what was written and how it compares with the child."""

    format: str
    file: str  # in the export's folder; empty where the folder itself is the export
    bytes: int  # of the weights
    notes: list[str]
    written: dict[str, JsonValue]
    verified: dict[str, JsonValue]


def source(job: Job) -> Path:
    """The folder of the finished child, or of the one that has not been uptrained yet.

    Raises `UserError` where there is none, or where it is damaged.
    """
    for stage in (UPTRAIN, ASSEMBLE):
        folder = job.folder(stage)
        manifest = artifacts.read_manifest(folder)
        if manifest is not None:
            if not stage.is_current(job, manifest):
                job.run.progress.say(
                    f"  child {job.child.name} was made for an earlier wish, or from earlier files"
                )
            damage = artifacts.damage(folder, manifest)
            if damage is not None:
                raise UserError(f"{damage}; `puzzle {stage.command(job)}` makes it again")
            return folder
    raise UserError(
        f"run {job.run.folder}: child {job.child.name} is not made yet; run `puzzle run` first"
    )


def export(job: Job, name: str, dtype: str | None = None) -> tuple[Path, Export]:
    """(folder, what is in it): the child in one format, checked.

    `dtype` is that of the weights, e.g. f16; the format's usual one where it is None. Raises
    `UserError` for a child that the format cannot express.
    """
    exporter, child_folder = formats.exporter(name), source(job)
    folder = job.child.folder / FOLDER / (name if dtype is None else f"{name}-{dtype}")
    manifest = artifacts.read_manifest(child_folder)
    assert manifest is not None
    card = job.folder(REPORT) / CARD
    inputs: Inputs = {
        "child": manifest.fingerprint,
        "dtype": dtype,
        "card": artifacts.file_fingerprint(card) if card.exists() else None,
        "versions": dict(artifacts.versions(("puzzle-nas", "transformers", "gguf"))),
    }
    if not artifacts.is_done(folder, inputs):
        if child_folder.name != UPTRAIN.folder:
            job.run.progress.say("  the child is not uptrained yet: exporting it as assembled")
        artifacts.begin(folder, inputs)
        began = time.perf_counter()
        options = Options(name=model_name(job), dtype=dtype)
        written = exporter.export(child_folder, folder, options)
        if (folder / CARD).exists() and card.exists():
            artifacts.write_text(folder / CARD, card.read_text(encoding="utf-8"))
        record = Export(
            format=name,
            file=written.file,
            bytes=written.bytes,
            notes=written.notes,
            written=written.as_json(),
            verified=exporter.verify(child_folder, folder).as_json(),
        )
        record.write(folder / FILE)
        artifacts.write_manifest(folder, inputs, time.perf_counter() - began)
    return folder, Export.read(folder / FILE)


def model_name(job: Job) -> str:
    """The name under which a child is served and exported: the run's, and its own if not main."""
    run = job.run.folder.resolve().name
    return run if job.child.name == "main" else f"{run}-{job.child.name}"
