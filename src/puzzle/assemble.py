"""Stage `assemble`: put the chosen blocks together, save the child, serve it, and see whether the promise holds.

The child's weights are the parent's embedding, final norm and head, and per layer the library's subblocks. It is
then measured against the parent on the engine the costs came from. A miss is recorded in
`cost/corrections.jsonl`, from which the next search learns; `pipeline.py` holds that loop.

Reads: the parent, the library, `search/solutions.json`.
Writes: `child/` (a Hugging Face folder) and `child/measured.json`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts, child, cost, library, search
from puzzle.architecture import Architecture
from puzzle.cost import Paired
from puzzle.run import Run

PAIRS = 7  # `evaluate` measures the finished child again


class ChildState(Mapping[str, torch.Tensor]):
    """The child's weights by name, each read when asked for."""

    def __init__(self, run: Run, architecture: Architecture) -> None:
        parent = run.parent.weights()
        self._state: dict[str, torch.Tensor] = {n: parent[n] for n in parent if not n.startswith("model.layers.")}
        for index, block in enumerate(architecture):
            prefix = f"model.layers.{index}."
            own = {n.removeprefix(prefix): parent[n] for n in parent if n.startswith(prefix)}
            for variant in (block.attention, block.ffn):
                for name, tensor in library.read_state(run, index, variant, own).items():
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
    return {"library": run.fingerprint_of("library"), "search": run.fingerprint_of("search"), "pairs": PAIRS}


def run(run: Run, folder: Path) -> dict[str, Any]:
    architecture = chosen(run)
    config = run.parent.child_config(architecture)
    state = ChildState(run, architecture)
    child.save(folder, config, architecture, state, run.parent.folder, card(run, architecture))
    paired = cost.measure_pair(run, folder, PAIRS, "assemble")
    promises = check(run, paired)
    artifacts.write_json(folder / "measured.json", {**asdict(paired), "promises": promises})
    met = all(promise["met"] for promise in promises)
    for promise in promises:
        run.progress.say(
            f"  asked {promise['asked']}, measured {promise['measured']}: {'met' if promise['met'] else 'missed'}"
        )
    if not met:
        correct(run, architecture, paired)
    return {"met": met, "weights": weights_fingerprint(folder)}


def weights_fingerprint(folder: Path) -> str:
    return artifacts.fingerprint([artifacts.file_fingerprint(p) for p in sorted(folder.glob("*.safetensors"))])


def check(run: Run, paired: Paired) -> list[dict[str, Any]]:
    """Every constraint against what was measured. Relative ones are judged by the paired ratio.

    Sizes (memory, parameters, KV cache) are counted, not timed.
    """
    promises = []
    predicted = solutions(run)["solutions"][0]["predicted"]
    for asked in solutions(run)["constraints"]:
        name, relative = asked["name"], asked["relative"]
        kind = search.KINDS[name]
        if not kind.timed:
            key = name if name == "parameters" else f"{name}_bytes"
            value, met = predicted[key], predicted[key] <= asked["limit"]
        elif relative is not None:
            ratios = {
                "throughput": paired.speedup, "latency": 1 / paired.speedup,
                "time_to_first_token": paired.time_to_first_token_ratio,
            }  # fmt: skip
            value = ratios[name]
            met = value >= relative if kind.at_least else value <= relative
        else:
            value = paired.child[f"{name}_tok_per_s" if kind.at_least else f"{name}_s"]
            met = value >= asked["value"] if kind.at_least else value <= asked["value"]
        shown = f"{value:.3f}x the parent's" if kind.timed and relative is not None else f"{value:,.4g} {kind.unit}"
        promises.append(
            {"constraint": name, "asked": f"{name} {asked['text']}", "measured": shown, "value": value, "met": met}
        )
    return promises


def correct(run: Run, architecture: Architecture, paired: Paired) -> None:
    """Record how much slower the child was than predicted, both against the parent."""
    figures = solutions(run)
    predicted = figures["solutions"][0]["predicted"]["latency_s"] / figures["parent"]["latency_s"]
    factor = max(1.0, (1 / paired.speedup) / predicted, *(c["time_factor"] for c in search.corrections(run)))
    repeated = any(c["blocks"] == architecture.names for c in search.corrections(run))
    record = {
        "blocks": architecture.names,
        "speedup": paired.speedup,
        "time_factor": factor * (1.02 if repeated else 1.0),
    }
    artifacts.append_jsonl(run.stage_folder("cost") / "corrections.jsonl", record)


def card(run: Run, architecture: Architecture) -> str:
    """The model card of a child."""
    shape = run.parent.shape
    rows = "\n".join(f"| {i} | {b.attention.name} | {b.ffn.name} |" for i, b in enumerate(architecture))
    share = architecture.parameters(shape) / Architecture.of_parent(shape).parameters(shape)
    return f"""---
library_name: transformers
base_model: {run.recipe.parent}
---
# A Puzzle child of {run.recipe.parent}

Made by puzzle (arXiv 2411.19146): {architecture.parameters(shape):,} parameters, {share:.0%} of the parent's.

| layer | attention | FFN |
| --- | --- | --- |
{rows}

Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or serve with
`vllm serve folder --trust-remote-code`.
"""
