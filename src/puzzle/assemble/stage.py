"""Stage `assemble`: put the chosen blocks together, save the child, serve it, and see whether the
promise holds.

The child's weights are the parent's embedding, final norm and head, and per layer the library's
subblocks. It is then measured against the parent on the engine the costs came from. A miss is
recorded in `cost/corrections.jsonl`, from which the next search learns; `pipeline.py` holds that
loop.

Reads: the parent, the library, `search/solutions.json`.
Writes: `child/` (a Hugging Face folder) and `child/measured.json`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts
from puzzle.cost import stage as cost
from puzzle.cost.stage import Paired
from puzzle.library import stage as library
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.report import card
from puzzle.run import Run
from puzzle.search import stage as search

PAIRS = 7  # `evaluate` measures the finished child again


class ChildState(Mapping[str, torch.Tensor]):
    """The child's weights by name, each read when asked for."""

    def __init__(self, run: Run, architecture: Architecture) -> None:
        parent = run.parent.weights()
        self._state: dict[str, torch.Tensor] = {
            n: parent[n] for n in parent if not n.startswith("model.layers.")
        }
        for index, block in enumerate(architecture):
            prefix = f"model.layers.{index}."
            own = {n.removeprefix(prefix): parent[n] for n in parent if n.startswith(prefix)}
            for name, tensor in library.read_block(run, index, block, own).items():
                self._state[prefix + name] = tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def chosen(run: Run) -> Architecture:
    """The first solution of the search."""
    return Architecture.from_names(solutions(run)["solutions"][0]["blocks"])


def solutions(run: Run) -> dict[str, Any]:
    return artifacts.read_json(run.stage_folder("search") / "solutions.json")


def inputs(run: Run) -> dict[str, Any]:
    return {
        "library": run.fingerprint_of("library"),
        "search": run.fingerprint_of("search"),
        "pairs": PAIRS,
    }


def run(run: Run, folder: Path) -> dict[str, Any]:
    architecture = chosen(run)
    config = run.parent.child_config(architecture)
    state = ChildState(run, architecture)
    child.save(folder, config, architecture, state, run.parent.folder, card.text(run, architecture))
    paired = measure(run, folder, PAIRS, "assemble")
    promises = check(run, paired)
    errors = {name: prediction_error(run, name, one) for name, one in paired.items()}
    measured = {
        name: asdict(one) | {"prediction_error": errors[name]} for name, one in paired.items()
    }
    artifacts.write_json(folder / "measured.json", {"scenarios": measured, "promises": promises})
    for name, error in errors.items():
        run.progress.say(
            f"  {name}: measured {paired[name].speedup:.3f}x, predicted {error:+.1%} of that"
        )
    for promise in promises:
        run.progress.say(
            f"  asked {promise['asked']}, measured {promise['measured']}: {'met' if promise['met'] else 'missed'}"
        )
    met = all(promise["met"] for promise in promises)
    if not met:
        correct(run, architecture, paired["main"], promises)
    return {"met": met, "weights": weights_fingerprint(folder)}


def measure(run: Run, folder: Path, pairs: int, log: str) -> dict[str, Paired]:
    """Child against parent in every scenario: `main` at the batch size that the search chose, the
    parent at its own.
    """
    settings, batch_size = run.recipe.cost, solutions(run)["batch_size"]
    scenarios = {
        "main": (settings.scenario, settings.scenario.model_copy(update={"batch_size": batch_size}))
    }
    scenarios |= {name: (scenario, scenario) for name, scenario in settings.scenarios.items()}
    return {
        name: cost.measure_pair(run, folder, both, pairs, f"{log}-{name}")
        for name, both in scenarios.items()
    }


def prediction_error(run: Run, scenario: str, paired: Paired) -> float:
    """Predicted over measured speed-up, minus 1."""
    figures = solutions(run)
    sides = (figures["solutions"][0]["predicted"], figures["parent"])
    predicted = [side[scenario]["throughput_tok_per_s"] for side in sides]
    return predicted[0] / predicted[1] / paired.speedup - 1


def weights_fingerprint(folder: Path) -> str:
    return artifacts.fingerprint(
        [artifacts.file_fingerprint(p) for p in sorted(folder.glob("*.safetensors"))]
    )


def check(run: Run, paired: dict[str, Paired]) -> list[dict[str, Any]]:
    """Every constraint against what was measured. Relative speeds are judged by the paired ratio.

    Parameters are counted; the KV cache is what the engine allocated. A correction needs
    `slower_than_predicted`.
    """
    figures = solutions(run)
    return [
        _promise(
            asked,
            paired[asked["scenario"]],
            figures["solutions"][0]["predicted"],
            figures["parent"],
        )
        for asked in figures["constraints"]
    ]


def _promise(
    asked: dict[str, Any], paired: Paired, predictions: dict[str, Any], parents: dict[str, Any]
) -> dict[str, Any]:
    name, relative, scenario = asked["name"], asked["relative"], asked["scenario"]
    kind, predicted, of_parent = search.KINDS[name], predictions[scenario], parents[scenario]
    slower = 1.0
    if kind.timed:
        ratios = {
            "throughput": paired.speedup,
            "latency": paired.latency_ratio,
            "time_to_first_token": paired.time_to_first_token_ratio,
        }
        key = f"{name}_tok_per_s" if kind.at_least else f"{name}_s"
        expected = predicted[key] / of_parent[key] if relative is not None else predicted[key]
        value = ratios[name] if relative is not None else paired.child[key]
        wanted = relative if relative is not None else asked["value"]
        met = value >= wanted if kind.at_least else value <= wanted
        slower = expected / value if kind.at_least else value / expected
    else:
        cache = paired.child["kv_cache_bytes"]
        weights = predicted["memory_bytes"] - predicted["kv_cache_bytes"]
        value = {
            "parameters": predicted["parameters"],
            "kv_cache": cache,
            "memory": weights + cache,
        }[name]
        met = value <= asked["limit"]
    shown = (
        f"{value:.3f}x the parent's"
        if kind.timed and relative is not None
        else f"{value:,.4g} {kind.unit}"
    )
    where = "" if scenario == "main" else f" ({scenario})"
    return {
        "constraint": name,
        "scenario": scenario,
        "asked": f"{name} {asked['text']}{where}",
        "measured": shown,
        "value": value,
        "met": met,
        "slower_than_predicted": slower,
    }


def correct(
    run: Run, architecture: Architecture, paired: Paired, promises: list[dict[str, Any]]
) -> None:
    """Record how much slower than predicted the child was in what it missed."""
    slower = [p["slower_than_predicted"] for p in promises if not p["met"]]
    factor = max(1.0, *slower, *(c["time_factor"] for c in search.corrections(run)))
    repeated = any(c["blocks"] == architecture.names for c in search.corrections(run))
    record = {
        "blocks": architecture.names,
        "speedup": paired.speedup,
        "time_factor": factor * (1.02 if repeated else 1.0),
    }
    artifacts.append_jsonl(run.stage_folder("cost") / "corrections.jsonl", record)
