"""Stage `report`: one self-contained page, the model card with figures, the picture for a README.

Reads every stage's files. Writes: `report/index.html` (`page.py`), `README.md` (the
model card, to go beside the weights when they are published) and `architecture.svg`.
"""

from pathlib import Path

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE
from puzzle.cost import COST
from puzzle.evaluate import EVALUATE
from puzzle.evaluate import results as evaluation
from puzzle.library import LIBRARY
from puzzle.report import REPORT, card, charts, strip
from puzzle.report import page as pages
from puzzle.score import SCORE
from puzzle.search import SEARCH, validate
from puzzle.stage import Bytes, Effort, Job, Need, Work
from puzzle.uptrain import UPTRAIN

TIMED = (LIBRARY, SCORE, COST, SEARCH, ASSEMBLE, UPTRAIN, EVALUATE)


def _facts(job: Job) -> Inputs:
    validation = validate.read(job.run)
    return {"validation": None if validation is None else validation.as_json()}


def page(job: Job) -> Path:
    """The path of the report."""
    return job.folder(REPORT) / "index.html"


def stage_seconds(job: Job) -> dict[str, float]:
    """How long every finished stage of this child took."""
    seconds = {}
    for stage in TIMED:
        manifest = artifacts.read_manifest(job.folder(stage))
        if manifest is not None:
            seconds[stage.name] = manifest.seconds
    return seconds


def _execute(job: Job, folder: Path) -> None:
    results = evaluation.read(job)
    picture = strip.architecture(_title(results), results.blocks, job.run.parent.shape)
    artifacts.write_text(folder / "architecture.svg", charts.standalone(picture))
    artifacts.write_text(folder / "README.md", card.text(job, results))
    artifacts.write_text(folder / "index.html", pages.html(job, stage_seconds(job)))


def _title(results: evaluation.Results) -> str:
    share = results.uptrained.parameters / results.parent.parameters
    retention = results.uptrained.retention
    kept = "" if retention is None else f", {retention.value:.1%} of its top-1 accuracy"
    return f"{results.speedup:.2f}x the parent's throughput, {share:.0%} of its parameters{kept}"


def _need(job: Job) -> Need:
    return Need(memory=Bytes(host=3e8), disk_bytes=2e6, effort=Effort(beside_s=0.5))


WORK = Work(facts=_facts, execute=_execute, need=_need)
