"""Stage `evaluate`: parent, child and uptrained child on held-out text, and once more on the
serving engine.

Quality: KL(parent || model) in nats per token, LM loss, top-1 and top-5 token accuracy; retention
is the model's top-1 accuracy over the parent's. Speed: the uptrained child against the parent,
batch by batch in turn, beside what the cost model predicted. This measurement is the one the
promise is judged by.

Reads: `child/`, `uptrained/`, the validation side of the corpus. Writes: `evaluate/results.json`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts
from puzzle.assemble import stage as assemble
from puzzle.cost import stage as cost
from puzzle.data import tasks
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.report import card
from puzzle.run import Run
from puzzle.training.losses import METRICS, token_metrics


def inputs(run: Run) -> dict[str, Any]:
    return run.data_inputs | {
        "search": run.fingerprint_of("search"),
        "assemble": run.fingerprint_of("assemble"),
        "uptrain": run.fingerprint_of("uptrain"),
        "cost": run.fingerprint_of("cost"),
        "evaluate": run.recipe.evaluate.model_dump(mode="json"),
        "task": [run.recipe.score.task, tasks.fingerprint(run.recipe.score.task)],
    }


@torch.no_grad()
def quality(run: Run, model: PuzzleForCausalLM, tokens_NS: torch.Tensor) -> dict[str, float]:
    """Means per token of every metric of `model` against the parent."""
    sums, count = torch.zeros(len(METRICS), dtype=torch.float64), 0
    parent = run.parent_model
    for tokens_BS in tokens_NS.split(run.recipe.evaluate.batch_sequences):
        tokens_BS = tokens_BS.to(run.device)
        with run.autocast():
            final, own = (
                m.model(tokens_BS, use_cache=False).last_hidden_state for m in (parent, model)
            )
            metrics = token_metrics(
                final[:, :-1].flatten(0, 1),
                parent.lm_head.weight,
                own[None, :, :-1].flatten(1, 2),
                model.lm_head.weight,
                tokens_BS[:, 1:].flatten(),
                soft_cap=parent.config.final_logit_softcapping,
            )[0]
        sums += metrics.double().sum(-1).cpu()
        count += metrics.shape[-1]
    means = dict(zip(METRICS, (sums / count).tolist(), strict=True))
    return means | {"kl": max(0.0, means["kl"])}  # rounding may take a KL of 0 just below it


@torch.no_grad()
def task_accuracy(run: Run, model: PuzzleForCausalLM, task: str) -> float:
    """The share of the multiple-choice questions of `score.task` that a model answers rightly."""
    right: list[bool] = []
    for rows in tasks.batches(run, task):
        tokens_RS = rows.tokens_RS.to(run.device)
        with run.autocast():
            hidden_TD = (
                model.model(tokens_RS, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            )
            head = model.lm_head.weight
            cap, targets = model.config.final_logit_softcapping, tokens_RS[:, 1:].flatten()
            metrics = token_metrics(hidden_TD, head, hidden_TD[None], head, targets, soft_cap=cap)[
                0
            ]
        right += rows.right(metrics[METRICS.index("lm_loss")].view(len(tokens_RS), -1))
    return sum(right) / len(right)


def _qualities(
    run: Run, folders: dict[str, Path], tokens: torch.Tensor
) -> dict[str, dict[str, float]]:
    models = {}
    with run.progress.task("held-out quality", 1 + len(folders), "models") as task:
        for name in ("parent", *folders):
            if name == "parent":
                model = run.parent_model
            else:
                model = child.load(folders[name], torch.float32, run.device, run.attention)
            models[name] = quality(run, model, tokens)
            if run.recipe.score.task is not None:
                models[name]["task"] = task_accuracy(run, model, run.recipe.score.task)
            task.advance()
    return models


def run(run: Run, folder: Path) -> dict[str, Any]:
    settings, shape = run.recipe.evaluate, run.parent.shape
    tokens = run.corpus["validation"].head(settings.sequences)
    folders = {"child": run.stage_folder("assemble"), "uptrained": run.stage_folder("uptrain")}
    architecture = child.read_architecture(folders["child"])
    if not (
        folder / "quality.json"
    ).exists():  # kept, so that an interrupted measurement does not cost it again
        artifacts.write_json(folder / "quality.json", _qualities(run, folders, tokens))
    models: dict[str, dict[str, Any]] = artifacts.read_json(folder / "quality.json")
    for name, figures in models.items():
        own = Architecture.of_parent(shape) if name == "parent" else architecture
        element = run.parent.dtype.itemsize
        best = models["parent"]["top1"]
        figures["retention"] = figures["top1"] / best if best else None
        figures["parameters"] = own.parameters(shape)
        figures["kv_cache_bytes_per_token"] = own.kv_elements_per_token(shape) * element
    paired = assemble.measure(run, folders["uptrained"], settings.pairs, "evaluate")
    searched = assemble.solutions(run)
    promises = assemble.check(run, paired)
    results = {
        "models": models,
        "evaluated_tokens": int(tokens[:, 1:].numel()),
        "speed": asdict(paired["main"]),
        "batch_size": searched["batch_size"],
        "scenarios": {name: asdict(one) for name, one in paired.items()},
        "prediction_error": {
            name: assemble.prediction_error(run, name, one) for name, one in paired.items()
        },
        "predicted": {
            "parent": searched["parent"]["main"],
            "child": searched["solutions"][0]["predicted"]["main"],
        },
        "promises": promises,
        "engine": cost.read(run).header,
        "architecture": architecture.names,
    }
    artifacts.write_json(folder / "results.json", results)
    artifacts.write_text(folders["uptrained"] / "README.md", card.text(run, architecture, results))
    return {
        "results": artifacts.file_fingerprint(folder / "results.json"),
        "met": all(p["met"] for p in promises),
    }


def read(run: Run) -> dict[str, Any]:
    return artifacts.read_json(run.stage_folder("evaluate") / "results.json")


def table(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, parent, child before uptraining, child after) of the table a run ends with."""
    models, speed, predicted = results["models"], results["speed"], results["predicted"]
    parent, before, after = models["parent"], models["child"], models["uptrained"]
    word = "measured" if results["engine"]["measured"] else "modelled"

    def row(name: str, key: str, form: str) -> tuple[str, str, str, str]:
        cells = ("" if m[key] is None else format(m[key], form) for m in (parent, before, after))
        return (name, *cells)  # type: ignore[return-value]

    throughput = {side: speed[side]["throughput_tok_per_s"] for side in ("parent", "child")}
    forecast = {side: predicted[side]["throughput_tok_per_s"] for side in ("parent", "child")}
    engine = results["engine"]["engine"]
    return [
        (
            f"output tok/s, {word} ({engine})",
            f"{throughput['parent']:,.0f}",
            "",
            f"{throughput['child']:,.0f}",
        ),
        ("output tok/s, predicted", f"{forecast['parent']:,.0f}", "", f"{forecast['child']:,.0f}"),
        (f"speed-up, {word} (median of pairs)", "1.00x", "", f"{speed['speedup']:.2f}x"),
        ("speed-up, predicted", "1.00x", "", f"{forecast['child'] / forecast['parent']:.2f}x"),
        ("error of the prediction", "", "", f"{results['prediction_error']['main']:+.1%}"),
        row("parameters", "parameters", ",d"),
        row("KV cache, bytes per token", "kv_cache_bytes_per_token", ",d"),
        row("KL(parent || model), nats/token", "kl", ".4f"),
        row("LM loss, nats/token", "lm_loss", ".4f"),
        row("top-1 token accuracy", "top1", ".2%"),
        row("top-5 token accuracy", "top5", ".2%"),
        *([row("accuracy on the task", "task", ".2%")] if "task" in parent else []),
        row("retention of top-1", "retention", ".1%"),
    ]
