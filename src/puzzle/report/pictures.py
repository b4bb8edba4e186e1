"""The report's pictures, as SVG text drawn with matplotlib."""

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from puzzle.evaluate.results import Results
from puzzle.library.records import read_curve, read_index
from puzzle.model.architecture import Subblock, parse_block
from puzzle.score import results as scores
from puzzle.search import answers
from puzzle.search.validate import Validation
from puzzle.stage import Job
from puzzle.uptrain import trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARENT_COLOUR, ATTENTION_COLOUR, FFN_COLOUR = "#c9ced6", "#3b6ea8", "#d9822b"
ACCENT, INK, PALE_INK = "#b3261e", "#222222", "#666666"
MOST_LEGEND_ENTRIES = 14


def _subplots(width: float, height: float) -> "tuple[Figure, Axes]":
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, height))
    return figure, axis


def svg(figure: "Figure") -> str:
    """A figure as SVG text, and closed."""
    from matplotlib import pyplot

    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    pyplot.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def architecture(job: Job, results: Results) -> str:
    """One column per layer: attention (KV heads) above, FFN (width) below, the parent's in grey."""
    shape, blocks = job.run.parent.shape, results.blocks
    figure, axis = _subplots(max(7.0, 0.62 * len(blocks)), 3.6)
    for x, block in enumerate(blocks):
        kv_share = block.attention.kv_heads / shape.num_key_value_heads
        draw_half(axis, x, 1, block.attention, kv_share)
        draw_half(axis, x, -1, block.ffn, block.ffn.intermediate_size / shape.intermediate_size)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_ylim(-1.3, 1.3)
    axis.set_xlim(-0.7, len(blocks) - 0.3)
    axis.set_yticks([0.5, -0.5], ["attention\n(KV heads)", "FFN\n(width)"])
    axis.set_xticks(range(len(blocks)))
    axis.set_xlabel("layer")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title(_architecture_title(results), fontsize=10, loc="left")
    return svg(figure)


def _architecture_title(results: Results) -> str:
    share = results.uptrained.parameters / results.parent.parameters
    retention = results.uptrained.retention
    kept = "" if retention is None else f", {retention.value:.1%} of its top-1 accuracy"
    speedup = results.speedup
    return f"{speedup:.2f}x the parent's throughput, {share:.0%} of its parameters{kept}"


def draw_half(axis: "Axes", x: int, sign: int, variant: Subblock, share: float) -> None:
    """A bar for one subblock: upward (sign 1) or downward."""
    colour = ATTENTION_COLOUR if variant.slot == "attention" else FFN_COLOUR
    axis.bar(x, sign, width=0.82, color="none", edgecolor=PARENT_COLOUR, linewidth=1)
    if variant.kind == "linear":
        axis.bar(x, sign * 0.12, width=0.82, color=colour, hatch="///", edgecolor="white")
    elif variant.kind != "no_op":
        filling = colour if share < 1 else PARENT_COLOUR
        axis.bar(x, sign * share, width=0.82, color=filling)
    label = str(variant.size) if variant.size else variant.kind.replace("_", "-")
    text_colour = INK if share < 1 else PALE_INK
    axis.text(x, sign * 1.13, label, ha="center", va="center", fontsize=8, color=text_colour)


def frontier(job: Job, results: Results) -> str:
    """The best sum of scores for each throughput, the chosen child and the baselines."""
    points, best = answers.read_frontier(job), answers.read(job).best
    figure, axis = _subplots(6.4, 3.6)
    speeds = [point.figures.throughput_tok_per_s for point in points]
    objectives = [point.objective for point in points]
    axis.plot(speeds, objectives, "o-", color=ATTENTION_COLOUR, ms=4)
    parent_speed = results.predicted_parent.throughput_tok_per_s
    axis.plot(parent_speed, 0, "s", color=INK, label="parent")
    child_speed = results.predicted_child.throughput_tok_per_s
    axis.plot(child_speed, best.objective, "D", color=ACCENT, label="chosen child")
    for baseline, marker in zip(answers.read_baselines(job), "v^<>xP", strict=False):
        if baseline.figures is not None and baseline.objective is not None:
            speed = baseline.figures.throughput_tok_per_s
            axis.plot(
                speed,
                baseline.objective,
                marker,
                color=FFN_COLOUR,
                ms=5,
                label=baseline.name,
                linestyle="none",
            )
    axis.set_xlabel("predicted output tokens per second")
    axis.set_ylabel("sum of block scores")
    axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    return svg(figure)


def _heat_map(
    values: Mapping[tuple[int, str], float], columns: Sequence[str], layers: int, label: str
) -> str:
    """`values` by (layer, column), on a logarithmic scale; layers from left to right."""
    from matplotlib.colors import LogNorm

    grid = np.full((len(columns), layers), np.nan)
    for (layer, column), value in values.items():
        grid[columns.index(column), layer] = value
    positive = grid[np.isfinite(grid) & (grid > 0)]
    width, height = max(6.0, 0.5 * layers + 2), 0.27 * len(columns) + 1.2
    figure, axis = _subplots(width, height)
    norm = None
    if positive.size:
        norm = LogNorm(max(positive.min(), positive.max() * 1e-4), positive.max())
    shown = np.where(grid > 0, grid, np.nan)
    image = axis.imshow(shown, aspect="auto", cmap="viridis_r", norm=norm)
    axis.set_yticks(range(len(columns)), list(columns), fontsize=8)
    axis.set_xticks(range(layers))
    axis.set_xlabel("layer")
    figure.colorbar(image, label=label)
    return svg(figure)


def block_scores(job: Job) -> str:
    """The KL of every block in every layer."""
    kl = {key: score.kl for key, score in scores.read(job.run).items()}
    columns = sorted({name for _, name in kl}, key=parse_block, reverse=True)
    layers = job.run.parent.shape.num_hidden_layers
    return _heat_map(kl, columns, layers, "KL, nats per token")


def validation(validated: Validation | None) -> str:
    """Sums of scores against the KL of assembled children; empty where that was not asked."""
    if validated is None or validated.overall.spearman is None:
        return ""
    figure, axis = _subplots(6.4, 3.6)
    for origin, colour in (("random", FFN_COLOUR), ("searched", ACCENT)):
        points = [point for point in validated.points if point.origin == origin]
        sums, kl = [point.score_sum for point in points], [point.kl for point in points]
        axis.plot(sums, kl, "o", color=colour, ms=4, label=origin)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xlabel("sum of block scores")
    axis.set_ylabel("KL of the assembled child, nats per token")
    axis.legend(frameon=False, fontsize=8)
    return svg(figure)


def library(job: Job) -> str:
    """Normalised MSE of every variant in every layer after training; no-ops for comparison."""
    index = read_index(job)
    if not index:
        return ""
    values = {(r.layer, f"{r.slot} {r.variant}"): r.nmse_after for r in index}
    columns = list(dict.fromkeys(column for _, column in values))
    layers = job.run.parent.shape.num_hidden_layers
    return _heat_map(values, columns, layers, "normalised MSE of the block output")


def bld(job: Job) -> str:
    """Validation loss of every kind of variant while it was trained: the median over layers."""
    by_kind: dict[tuple[str, str], dict[int, list[float]]] = {}
    for point in read_curve(job):
        points = by_kind.setdefault((point.slot, point.variant), {})
        points.setdefault(point.tokens, []).append(point.validation)
    if not by_kind:
        return ""
    figure, axis = _subplots(6.4, 3.6)
    slots = [slot for slot, _ in by_kind]
    for index, ((slot, variant), points) in enumerate(by_kind.items()):
        place = slots[:index].count(slot)
        axis.plot(
            list(points),
            [statistics.median(losses) for losses in points.values()],
            label=f"{slot} {variant}",
            color=ATTENTION_COLOUR if slot == "attention" else FFN_COLOUR,
            linestyle=("-", "--", ":", "-.")[place % 4],
            alpha=1 - 0.6 * place / slots.count(slot),
        )
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("normalised MSE, held out")
    if len(by_kind) <= MOST_LEGEND_ENTRIES:
        axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    return svg(figure)


def uptraining(job: Job) -> str:
    """The KL on training batches and on validation text; that only without a KL weight."""
    curve = trainer.read_curve(job)
    figure, axis = _subplots(6.4, 3.2)
    trained = [(point.tokens, point.losses["kl"]) for point in curve if "kl" in point.losses]
    validated = [(p.tokens, p.validation["kl"]) for p in curve if p.validation is not None]
    for points, style, colour, label in (
        (trained, "-", PARENT_COLOUR, "training batch"),
        (validated, "o-", ACCENT, "validation"),
    ):
        tokens, kl = [at for at, _ in points], [value for _, value in points]
        axis.plot(tokens, kl, style, color=colour, ms=4, label=label)
    shown = [kl for _, kl in trained or validated]
    axis.set_ylim(0, 2.5 * max(statistics.median(shown), 1e-6))
    axis.set_xlabel("tokens")
    axis.set_ylabel("KL(parent || child), nats per token")
    axis.legend(frameon=False)
    return svg(figure)
