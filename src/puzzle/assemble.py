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
        correct(run, architecture, paired, promises)
    return {"met": met, "weights": weights_fingerprint(folder)}


def weights_fingerprint(folder: Path) -> str:
    return artifacts.fingerprint([artifacts.file_fingerprint(p) for p in sorted(folder.glob("*.safetensors"))])


def check(run: Run, paired: Paired) -> list[dict[str, Any]]:
    """Every constraint against what was measured. Relative ones are judged by the paired ratio.

    Sizes (memory, parameters, KV cache) are counted, not timed. `slower_than_predicted` is what a correction needs.
    """
    promises, figures = [], solutions(run)
    predicted, of_parent = figures["solutions"][0]["predicted"], figures["parent"]
    ratios = {
        "throughput": paired.speedup, "latency": 1 / paired.speedup,
        "time_to_first_token": paired.time_to_first_token_ratio,
    }  # fmt: skip
    for asked in figures["constraints"]:
        name, relative, kind = asked["name"], asked["relative"], search.KINDS[asked["name"]]
        slower = 1.0
        if kind.timed:
            key = f"{name}_tok_per_s" if kind.at_least else f"{name}_s"
            expected = predicted[key] / of_parent[key] if relative is not None else predicted[key]
            value = ratios[name] if relative is not None else paired.child[key]
            wanted = relative if relative is not None else asked["value"]
            met = value >= wanted if kind.at_least else value <= wanted
            slower = expected / value if kind.at_least else value / expected
        else:
            value = predicted[name if name == "parameters" else f"{name}_bytes"]
            met = value <= asked["limit"]
        shown = f"{value:.3f}x the parent's" if kind.timed and relative is not None else f"{value:,.4g} {kind.unit}"
        promise = {
            "constraint": name,
            "asked": f"{name} {asked['text']}",
            "measured": shown,
            "value": value,
            "met": met,
        }
        promises.append(promise | {"slower_than_predicted": slower})
    return promises


def correct(run: Run, architecture: Architecture, paired: Paired, promises: list[dict[str, Any]]) -> None:
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


def card(run: Run, architecture: Architecture) -> str:
    """The model card of a child."""
    shape = run.parent.shape
    rows = "\n".join(f"| {i} | {b.attention.name} | {b.ffn.name} |" for i, b in enumerate(architecture))
    stock = child.architectures_name(architecture) == "DeciLMForCausalLM"
    vllm = ", or serve with\n`vllm serve folder --trust-remote-code`" if stock else "; stock vLLM cannot serve it"
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

Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`{vllm}.
`AutoTokenizer` reads the config too and wants the same flag.
"""
