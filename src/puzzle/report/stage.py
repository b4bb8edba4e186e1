"""Stage `report`: one self-contained page, the model card with figures, the picture for a README.

Reads every stage's files. Writes: `report/index.html` (pictures inline as SVG), `README.md` (the
model card, to go beside the weights when they are published) and `architecture.svg`.
"""

from importlib.resources import files
from pathlib import Path

import jinja2

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE, measured
from puzzle.cost import COST
from puzzle.evaluate import EVALUATE
from puzzle.evaluate import results as evaluation
from puzzle.library import LIBRARY
from puzzle.progress import duration
from puzzle.report import REPORT, card, pictures, table
from puzzle.score import SCORE
from puzzle.search import SEARCH, answers, validate
from puzzle.stage import Job, Need, Work
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
    results, validation = evaluation.read(job), validate.read(job.run)
    drawn = {
        "architecture": pictures.architecture(job, results),
        "frontier": pictures.frontier(job, results),
        "scores": pictures.block_scores(job),
        "validation": pictures.validation(validation),
        "library": pictures.library(job),
        "bld": pictures.bld(job),
        "uptrain": pictures.uptraining(job),
    }
    template = (files("puzzle.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(template).render(
        recipe=job.run.recipe,
        child=job.child,
        scenario=job.place.cost.scenario,
        scenarios=job.place.cost.measured,
        results=results,
        rows=table.rows(results),
        how=measured.how,
        pictures=drawn,
        space=job.run.space,
        times=[(name, duration(seconds)) for name, seconds in stage_seconds(job).items()],
        versions=artifacts.versions(),
        baselines=answers.read_baselines(job),
        answer=answers.read(job),
        validation=validation,
    )
    artifacts.write_text(folder / "architecture.svg", drawn["architecture"])
    artifacts.write_text(folder / "README.md", card.text(job, results))
    artifacts.write_text(folder / "index.html", html)


def _need(job: Job) -> Need:
    return Need(memory_bytes=3e8, disk_bytes=2e6, seconds=2.0)


WORK = Work(facts=_facts, execute=_execute, need=_need)
