"""Stage `report`: one self-contained page, and the table a run ends with.

Reads every stage's files. Writes: `report/index.html` (pictures inline as SVG) and
`report/architecture.svg`.
"""

import io
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from puzzle import artifacts
from puzzle.assemble import stage as assemble
from puzzle.evaluate import stage as evaluate
from puzzle.library import stage as library
from puzzle.model.architecture import Architecture, parse_block
from puzzle.progress import duration
from puzzle.run import Run
from puzzle.score import stage as score

PARENT_COLOUR, ATTENTION_COLOUR, FFN_COLOUR, ACCENT = "#c9ced6", "#3b6ea8", "#d9822b", "#b3261e"


def inputs(run: Run) -> dict[str, Any]:
    return {
        "evaluate": run.fingerprint_of("evaluate"),
        "search": run.fingerprint_of("search"),
        "validation": validation_of(run),
    }


def page(run: Run) -> Path:
    return run.stage_folder("report") / "index.html"


def run(run: Run, folder: Path) -> dict[str, Any]:
    import matplotlib

    matplotlib.use("svg")
    results = evaluate.read(run)
    pictures = {
        "architecture": architecture_picture(run, results),
        "frontier": frontier_picture(run, results),
        "scores": scores_picture(run),
        "validation": validation_picture(run),
        "library": library_picture(run),
        "bld": bld_picture(run),
        "uptrain": uptrain_picture(run),
    }
    import jinja2

    template = (files("puzzle.report") / "page.html.jinja").read_text(encoding="utf-8")
    status = artifacts.read_json(run.folder / "status.json")
    html = (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            recipe=run.recipe,
            results=results,
            rows=evaluate.table(results),
            pictures=pictures,
            space=run.space,
            stages=[
                (name, duration(s["seconds"]))
                for name, s in status.items()
                if s.get("seconds") is not None
            ],
            versions=artifacts.versions(),
            shape=run.parent.shape,
            baselines=baselines_of(run),
            searched=assemble.solutions(run),
            validation=validation_of(run),
        )
    )
    artifacts.write_text(folder / "architecture.svg", pictures["architecture"])
    artifacts.write_text(page(run), html)
    return {"page": str(page(run))}


def print_results(results: dict[str, Any], page: Path) -> None:
    """The table a run ends with, on standard output."""
    console = Console(highlight=False)
    table = Table(
        title=f"parent against child: {', '.join(p['asked'] for p in results['promises'])}",
        title_justify="left",
    )
    table.add_column("")
    for name in ("parent", "child", "uptrained"):
        table.add_column(name, justify="right")
    for row in evaluate.table(results):
        table.add_row(*row)
    console.print(table)
    for promise in results["promises"]:
        word = "met" if promise["met"] else "MISSED"
        console.print(f"{word}: asked {promise['asked']}, measured {promise['measured']}")
    console.print(f"report: {page}", soft_wrap=True)


# ----------------------------------------------------------------------------------------- pictures


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def architecture_picture(run: Run, results: dict[str, Any]) -> str:
    """One column per layer: attention (KV heads) above, FFN (intermediate size) below, the parent's
    in grey.
    """
    from matplotlib import pyplot

    shape, blocks = run.parent.shape, Architecture.from_names(results["architecture"])
    figure, axis = pyplot.subplots(figsize=(max(7.0, 0.62 * len(blocks)), 3.6))
    for x, block in enumerate(blocks):
        sides = (
            (
                1,
                block.attention,
                block.attention.kv_heads / shape.num_key_value_heads,
                ATTENTION_COLOUR,
                "kv_heads",
            ),
            (
                -1,
                block.ffn,
                block.ffn.intermediate_size / shape.intermediate_size,
                FFN_COLOUR,
                "intermediate_size",
            ),
        )
        for sign, variant, share, colour, size in sides:
            axis.bar(x, sign, width=0.82, color="none", edgecolor=PARENT_COLOUR, linewidth=1)
            if variant.kind == "linear":
                axis.bar(x, sign * 0.12, width=0.82, color=colour, hatch="///", edgecolor="white")
            elif variant.kind != "no_op":
                axis.bar(x, sign * share, width=0.82, color=colour if share < 1 else PARENT_COLOUR)
            label = (
                str(getattr(variant, size))
                if variant.kind in ("gqa", "gated")
                else variant.kind.replace("_", "-")
            )
            text_colour = "#222222" if share < 1 else "#666666"
            axis.text(
                x, sign * 1.13, label, ha="center", va="center", fontsize=8, color=text_colour
            )
    axis.axhline(0, color="#222222", linewidth=0.8)
    axis.set_ylim(-1.3, 1.3)
    axis.set_xlim(-0.7, len(blocks) - 0.3)
    axis.set_yticks([0.5, -0.5], ["attention\n(KV heads)", "FFN\n(width)"])
    axis.set_xticks(range(len(blocks)))
    axis.set_xlabel("layer")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    share = results["models"]["uptrained"]["parameters"] / results["models"]["parent"]["parameters"]
    retention = results["models"]["uptrained"]["retention"]
    kept = "" if retention is None else f", {retention:.1%} of its top-1 accuracy"
    title = f"{results['speed']['speedup']:.2f}x the parent's throughput, {share:.0%} of its parameters{kept}"
    axis.set_title(title, fontsize=10, loc="left")
    return _svg(figure)


def baselines_of(run: Run) -> list[dict[str, Any]]:
    return artifacts.read_json(run.stage_folder("search") / "baselines.json")


def frontier_picture(run: Run, results: dict[str, Any]) -> str:
    from matplotlib import pyplot

    points = artifacts.read_json(run.stage_folder("search") / "frontier.json")
    predicted, parent = results["predicted"]["child"], results["predicted"]["parent"]
    solution = assemble.solutions(run)["solutions"][0]
    figure, axis = pyplot.subplots(figsize=(6.4, 3.6))
    axis.plot(
        [p["throughput_tok_per_s"] for p in points],
        [p["objective"] for p in points],
        "o-",
        color="#3b6ea8",
        ms=4,
    )
    axis.plot(parent["throughput_tok_per_s"], 0, "s", color="#222222", label="parent")
    axis.plot(
        predicted["throughput_tok_per_s"],
        solution["objective"],
        "D",
        color=ACCENT,
        label="chosen child",
    )
    for row, marker in zip(baselines_of(run), "v^<>xP", strict=False):
        if row["objective"] is not None:
            place = row["throughput_tok_per_s"], row["objective"]
            axis.plot(*place, marker, color=FFN_COLOUR, ms=5, label=row["name"], linestyle="none")
    axis.set_xlabel("predicted output tokens per second")
    axis.set_ylabel("sum of block scores")
    axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    return _svg(figure)


def _heat_map(
    values: dict[tuple[int, str], float], columns: list[str], layers: int, label: str
) -> str:
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    grid = np.full((len(columns), layers), np.nan)
    for (layer, column), value in values.items():
        grid[columns.index(column), layer] = value
    positive = grid[np.isfinite(grid) & (grid > 0)]
    figure, axis = pyplot.subplots(figsize=(max(6.0, 0.5 * layers + 2), 0.27 * len(columns) + 1.2))
    norm = (
        LogNorm(max(positive.min(), positive.max() * 1e-4), positive.max())
        if positive.size
        else None
    )
    image = axis.imshow(
        np.where(grid > 0, grid, np.nan), aspect="auto", cmap="viridis_r", norm=norm
    )
    axis.set_yticks(range(len(columns)), columns, fontsize=8)
    axis.set_xticks(range(layers))
    axis.set_xlabel("layer")
    figure.colorbar(image, label=label)
    return _svg(figure)


def scores_picture(run: Run) -> str:
    """KL of every block in every layer."""
    scores = {key: value.kl for key, value in score.read(run).items()}
    columns = sorted({name for _, name in scores}, key=parse_block, reverse=True)
    return _heat_map(scores, columns, run.parent.shape.num_hidden_layers, "KL, nats per token")


def validation_of(run: Run) -> dict[str, Any] | None:
    """What `puzzle score --validate` has found, if it was asked."""
    path = run.stage_folder("score") / "validation.json"
    return artifacts.read_json(path) if path.exists() else None


def validation_picture(run: Run) -> str:
    """Sums of scores against the KL of assembled children."""
    from matplotlib import pyplot

    found = validation_of(run)
    if found is None or found["correlations"]["all"]["spearman"] is None:
        return ""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.6))
    for origin, colour in (("random", FFN_COLOUR), ("searched", ACCENT)):
        own = [p for p in found["points"] if p["origin"] == origin]
        axis.plot(
            [p["sum"] for p in own], [p["kl"] for p in own], "o", color=colour, ms=4, label=origin
        )
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xlabel("sum of block scores")
    axis.set_ylabel("KL of the assembled child, nats per token")
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def library_picture(run: Run) -> str:
    """Normalised MSE of every variant in every layer, after training; no-ops for comparison."""
    index = library.read_index(run)
    if not index:
        return ""
    values = {(r["layer"], f"{r['slot']} {r['variant']}"): r["nmse_after"] for r in index}
    columns = list(dict.fromkeys(column for _, column in values))
    return _heat_map(
        values, columns, run.parent.shape.num_hidden_layers, "normalised MSE of the block output"
    )


def bld_picture(run: Run) -> str:
    """Validation loss of every kind of variant while it was trained: the median over layers, from
    its first value.
    """
    from matplotlib import pyplot

    kinds: dict[tuple[str, str], dict[int, list[float]]] = {}
    for record in library.read_curve(run):
        points = kinds.setdefault((record["slot"], record["variant"]), {})
        points.setdefault(record["tokens"], []).append(record["validation"])
    if not kinds:
        return ""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.6))
    slots = [slot for slot, _ in kinds]
    for index, ((slot, variant), points) in enumerate(kinds.items()):
        colour = ATTENTION_COLOUR if slot == "attention" else FFN_COLOUR
        place = slots[:index].count(slot)
        axis.plot(
            list(points),
            [statistics.median(losses) for losses in points.values()],
            label=f"{slot} {variant}",
            color=colour,
            linestyle=("-", "--", ":", "-.")[place % 4],
            alpha=1 - 0.6 * place / slots.count(slot),
        )
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("normalised MSE, held out")
    if len(kinds) <= 14:
        axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    return _svg(figure)


def uptrain_picture(run: Run) -> str:
    from matplotlib import pyplot

    curve = artifacts.read_jsonl(run.stage_folder("uptrain") / "curve.jsonl")
    figure, axis = pyplot.subplots(figsize=(6.4, 3.2))
    trained, held = (
        [r for r in curve if key in r] for key in ("kl", "validation_kl")
    )  # no KL weight: held out only
    axis.plot(
        [r["tokens"] for r in trained],
        [r["kl"] for r in trained],
        color=PARENT_COLOUR,
        label="training batch",
    )
    axis.plot(
        [r["tokens"] for r in held],
        [r["validation_kl"] for r in held],
        "o-",
        color=ACCENT,
        ms=4,
        label="held out",
    )
    shown = [r["kl"] for r in trained] or [r["validation_kl"] for r in held]
    axis.set_ylim(0, 2.5 * max(statistics.median(shown), 1e-6))
    axis.set_xlabel("tokens")
    axis.set_ylabel("KL(parent || child), nats per token")
    axis.legend(frameon=False)
    return _svg(figure)
