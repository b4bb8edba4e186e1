"""What the page shows, read from the run's files: words, tables, and data for its script."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup
from pydantic import JsonValue

from puzzle import artifacts, settings
from puzzle.assemble import measured
from puzzle.cost import table as costs
from puzzle.cost.table import CostTable
from puzzle.engines.intervals import Interval
from puzzle.evaluate import EVALUATE
from puzzle.evaluate import results as evaluation
from puzzle.evaluate.results import Results
from puzzle.model.architecture import Block
from puzzle.progress import duration
from puzzle.report import charts, pictures, strip, table
from puzzle.score import results as scores
from puzzle.search import answers, validate
from puzzle.stage import Job

MOST_ALTERNATIVES = 24  # of a layer, the best of each size, so that the page stays small


@dataclass(frozen=True)
class Headline:
    """One of the three figures that come first."""

    figure: str
    says: str
    detail: str


def render(template: str, title: str, **values: object) -> str:
    """A page that stands alone: style and script within it, nothing loaded."""
    folder = files("puzzle.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader("puzzle.report", "."),
    )
    style = (folder / "page.css").read_text(encoding="utf-8")
    palette = f":root{{{charts.colours(charts.LIGHT)}}}"
    dark = f"@media (prefers-color-scheme:dark){{:root{{{charts.colours(charts.DARK)}}}}}"
    printed = f"@media print{{:root{{{charts.colours(charts.LIGHT)}}}}}"
    return environment.get_template(template).render(
        title=title,
        style=Markup(palette + dark + printed + charts.STYLE + strip.STYLE + style),
        script=Markup((folder / "page.js").read_text(encoding="utf-8")),
        **values,
    )


def html(job: Job, stage_seconds: dict[str, float]) -> str:
    """The report of a finished child."""
    results, validation = evaluation.read(job), validate.read(job.run)
    answer = answers.read(job)
    name = job.run.recipe.parent
    layers = _Layers(job, results)
    drawn = {
        "architecture": layers.strip(),
        "times": layers.times(),
        "frontier": pictures.frontier(job, results),
        "scores": pictures.block_scores(job),
        "validation": pictures.validation(validation),
        "library": pictures.library(job),
        "bld": pictures.bld(job),
        "uptrain": pictures.uptraining(job),
        "position": pictures.by_position(results),
        "predictions": pictures.predictions(job, results),
    }
    title = f"{name}: parent against child"
    return render(
        "page.html.jinja",
        title if job.child.name == "main" else f"{title} {job.child.name}",
        job=job,
        results=results,
        headlines=headlines(results),
        rows=table.rows(results),
        served=served_rows(results),
        how=measured.how,
        pictures={key: Markup(value) for key, value in drawn.items()},
        baselines=answers.read_baselines(job),
        answer=answer,
        validation=validation,
        scenarios=job.place.cost.measured,
        times=[(stage, duration(seconds)) for stage, seconds in stage_seconds.items()],
        total=duration(sum(stage_seconds.values())),
        versions=_versions(job),
        recipe=settings.to_yaml(job.run.recipe),
        again=_again(job),
        data=_data({"layers": layers.data(), "frontier": _frontier_data(job, results)}),
    )


def _data(value: JsonValue) -> Markup:
    """JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(text)


def headlines(results: Results) -> list[Headline]:
    """How much faster, how much worse, how much smaller."""
    speedup, retention = results.speedup, results.uptrained.retention
    detail = f"{results.speed_word} on {results.costs.engine.engine}"
    if results.speed is not None and results.speed.speedup.low < results.speed.speedup.high:
        ends = results.speed.speedup
        detail += f", {ends.low:.2f}x to {ends.high:.2f}x"
    found = [Headline(f"{speedup:.2f}x", "the parent's throughput", detail)]
    if retention is not None:
        ends_words = f"{retention.low:.1%} to {retention.high:.1%}"
        says = "of its top-1 accuracy kept"
        found.append(Headline(f"{retention.value:.1%}", says, f"{ends_words} on test text"))
    parts = (
        (results.uptrained.parameters, results.parent.parameters),
        (results.uptrained.kv_cache_bytes_per_token, results.parent.kv_cache_bytes_per_token),
    )
    parameters, cache = (child / max(1, parent) for child, parent in parts)
    found.append(
        Headline(f"{parameters:.0%}", "of its parameters", f"{cache:.0%} of its KV cache per token")
    )
    return found


def served_rows(results: Results) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """By scenario: (figure, parent, child, ratio) with intervals, as they were measured."""
    found = []
    for name, scenario in results.served.scenarios.items():
        measurement = scenario.measurement
        parent, child = measurement.parent, measurement.child
        tokens_per_s = (parent.throughput_tok_per_s, child.throughput_tok_per_s)
        batch_s = (parent.latency_s, child.latency_s)
        lines = [
            _served("output tokens/s", tokens_per_s, measurement.speedup, ",.0f"),
            _served("latency of a batch, s", batch_s, measurement.latency_ratio, ".3f"),
        ]
        for p, of in ((None, ""), (95, ", 95th percentile")):
            first_ms = [side.time_to_first_token(p).times(1e3) for side in (parent, child)]
            ratio = measurement.first_token_ratio(p)
            lines.append(_served(f"time to first token{of}, ms", first_ms, ratio, ",.1f"))
        for p, of in ((None, ""), (95, ", 95th percentile")) if measurement.decode_ratio else ():
            steps_ms = [side.inter_token_latency(p).times(1e3) for side in (parent, child)]
            ratio = measurement.inter_token_latency_ratio(p)
            lines.append(_served(f"between tokens{of}, ms", steps_ms, ratio, ",.2f"))
        memory = (parent.memory_bytes or 0, child.memory_bytes or 0)
        cache = (parent.kv_cache_bytes, child.kv_cache_bytes)
        named = (("memory at the peak, MiB", memory), ("KV cache of the batch, MiB", cache))
        for name_of, (of_parent, of_child) in named:
            if of_parent and of_child:
                one, other = (f"{value / 2**20:,.1f}" for value in (of_parent, of_child))
                lines.append((name_of, one, other, f"{of_child / of_parent:.2f}x"))
        found.append((name, lines))
    return found


def _served(
    name: str, sides: Sequence[Interval], ratio: Interval, form: str
) -> tuple[str, str, str, str]:
    parent, child = (side.with_unit(form, "") for side in sides)
    return name, parent, child, ratio.with_unit(".2f", "x")


class _Layers:
    """The child layer by layer: what it is, what it costs, and what else was on offer."""

    def __init__(self, job: Job, results: Results) -> None:
        self.job, self.blocks = job, results.blocks
        self.shape = job.run.parent.shape
        self.table: CostTable = costs.read(job)
        self.scores = scores.read(job.run)
        of_parent = self.shape.parent_blocks
        layers = [self.table.block(block, layer) for layer, block in enumerate(of_parent)]
        self.unit = max(layer.total_s for layer in layers) or 1.0

    def _share(self, block: Block, layer: int) -> float:
        """Its seconds over those of the parent's block."""
        parent = self.table.block(self.shape.parent_blocks[layer], layer).total_s
        return self.table.block(block, layer).total_s / parent if parent else 0.0

    def _says(self, layer: int, block: Block) -> str:
        if block == self.shape.parent_blocks[layer]:
            return f"layer {layer}: {block.name}, as in the parent"
        score = self.scores.get((layer, block.name))
        loss = "" if score is None else f", KL {score.kl:.4f} alone"
        share = self._share(block, layer)
        return f"layer {layer}: {block.name}, {share:.0%} of the parent's time{loss}"

    def says(self) -> list[str]:
        """A sentence for each layer."""
        return [self._says(layer, block) for layer, block in enumerate(self.blocks)]

    def strip(self) -> str:
        """The architecture."""
        title = "the child's architecture, layer by layer"
        return strip.architecture(title, self.blocks, self.shape, self.says())

    def times(self) -> str:
        """Seconds of every layer's halves against the parent's slowest layer."""
        seconds = []
        for layer, block in enumerate(self.blocks):
            attention, ffn = (half.total_s for half in self.table.halves(block, layer))
            seconds.append((attention, ffn))
        title = "each layer's share of the parent's time"
        return strip.times(title, seconds, self.says(), self.unit)

    def data(self) -> JsonValue:
        """By layer: [block, KL alone, share of the parent's time, parameters], best scores first.

        A block that another one beats in both score and time is left out where there are many.
        """
        found: list[JsonValue] = []
        chosen_blocks = list(self.blocks)
        for layer, space in enumerate(self.job.space.layers):
            rows = []
            for block in space.blocks:
                score = self.scores.get((layer, block.name))
                if score is not None and self.table.knows(block, layer):
                    share = self._share(block, layer)
                    size = self.shape.parameters(block)
                    rows.append((block.name, score.kl, share, size))
            rows.sort(key=lambda row: row[1])
            shown = rows if len(rows) <= MOST_ALTERNATIVES else _undominated(rows)
            chosen, parent = chosen_blocks[layer].name, self.shape.parent_blocks[layer].name
            shown = [row for row in rows if row in shown or row[0] in (chosen, parent)]
            found.append(
                {
                    "chosen": chosen,
                    "parent": parent,
                    "left_out": len(rows) - len(shown),
                    "rows": [[name, round(kl, 5), round(s, 4), n] for name, kl, s, n in shown],
                }
            )
        return found


Row = tuple[str, float, float, int]


def _undominated(rows: list[Row]) -> list[Row]:
    kept: list[Row] = []
    for row in rows:  # by rising loss
        if not kept or row[2] < kept[-1][2]:
            kept.append(row)
    return kept


def _frontier_data(job: Job, results: Results) -> JsonValue:
    """By the number of a solution: its blocks, speed and command."""
    answer = answers.read(job)
    parent = results.predicted_parent.throughput_tok_per_s
    shown = [(s.blocks, s.predicted["main"], s.objective) for s in answer.solutions]
    shown += [(p.blocks, p.figures, p.objective) for p in answers.read_frontier(job)]
    run, child = job.run.folder, job.child.name
    return {
        str(number): {
            "blocks": list(blocks),
            "speedup": round(figures.throughput_tok_per_s / parent, 4),
            "objective": round(objective, 5),
            "parameters": figures.parameters,
            "command": f"puzzle child {run} --name NAME --solution {number} --of {child}",
        }
        for number, (blocks, figures, objective) in enumerate(shown)
    }


def _versions(job: Job) -> dict[str, str]:
    """Of what the child was evaluated with."""
    manifest = artifacts.read_manifest(job.folder(EVALUATE))
    return {} if manifest is None else manifest.versions


def _again(job: Job) -> str:
    """The one command that repeats the run."""
    return f"puzzle run {job.run.folder / 'run.yaml'} --out {job.run.folder}-again"
