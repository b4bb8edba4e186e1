"""The model card of a child: what it is, what it kept, how fast it is, how to serve it.

Written with the weights by `assemble` and `uptrain`, and once more by `evaluate`, which knows the
figures.
"""

from pathlib import Path
from typing import Any

import yaml

from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.run import Run

OF_THE_PARENT = (
    "license",
    "license_name",
    "license_link",
    "language",
)  # front matter that holds for the child too


def text(run: Run, architecture: Architecture, results: dict[str, Any] | None = None) -> str:
    """Markdown with front matter. `results`: of the `evaluate` stage, once they are known."""
    shape, name = run.parent.shape, run.recipe.parent
    about = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": name,
        "tags": ["puzzle"],
    }
    front = yaml.safe_dump(about | _front_matter(run.parent.folder / "README.md"), sort_keys=False)
    own, whole = architecture.parameters(shape), Architecture.of_parent(shape).parameters(shape)
    rows = "\n".join(
        f"| {i} | {b.attention.name} | {b.ffn.name} |" for i, b in enumerate(architecture)
    )
    return f"""---
{front}---
# A Puzzle child of {name}

Made by [Puzzle](https://arxiv.org/abs/2411.19146) from {name}: {own:,} parameters, {own / whole:.0%} of the parent's.
The parent's licence holds for this model too.

{_figures(results)}## How to serve it
{_serving(run, architecture)}
## Architecture
`gqa_N`: attention with N KV heads; `gated_N`: FFN of intermediate size N; `linear`: one matrix; `no_op`: nothing.

| layer | attention | FFN |
| --- | --- | --- |
{rows}
"""


def _front_matter(readme: Path) -> dict[str, Any]:
    """What the parent's own card says of its licence and languages."""
    if not readme.is_file():
        return {}
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        found = None
    return (
        {key: found[key] for key in OF_THE_PARENT if key in found}
        if isinstance(found, dict)
        else {}
    )


def _figures(results: dict[str, Any] | None) -> str:
    if results is None:
        return ""
    parent, own, speed, engine = (
        results["models"]["parent"],
        results["models"]["uptrained"],
        results["speed"],
        results["engine"],
    )
    lines = ["| | parent | this model |", "| --- | ---: | ---: |"]
    for label, key, form in (
        ("parameters", "parameters", ",d"),
        ("KV cache, bytes per token", "kv_cache_bytes_per_token", ",d"),
        ("KL(parent || model), nats/token", "kl", ".4f"),
        ("LM loss, nats/token", "lm_loss", ".4f"),
        ("top-1 token accuracy", "top1", ".2%"),
    ):
        lines.append(f"| {label} | {parent[key]:{form}} | {own[key]:{form}} |")
    rates = [f"{speed[side]['throughput_tok_per_s']:,.0f}" for side in ("parent", "child")]
    lines.append(f"| output tokens/s | {rates[0]} | {rates[1]} ({speed['speedup']:.2f}x) |")
    word = "measured" if engine["measured"] else "modelled"
    kept = (
        f"{own['retention']:.1%} of the parent's top-1 accuracy"
        if own["retention"] is not None
        else "no retention"
    )
    lines += [
        "",
        f"Keeps {kept} on {results['evaluated_tokens']:,} held-out tokens; speed {word} with "
        f"{engine['engine']} {engine['version']} on {engine['device']}.",
        "",
    ]
    return "## What it kept\n" + "\n".join(lines) + "\n"


def _serving(run: Run, architecture: Architecture) -> str:
    stock = child.architectures_name(run.parent.child_config(architecture)) == "DeciLMForCausalLM"
    vllm = (
        "- vLLM: `vllm serve FOLDER --trust-remote-code`; with the puzzle package installed, `vllm serve FOLDER`"
        if stock
        else "- vLLM: stock vLLM cannot; with the puzzle package installed, `vllm serve FOLDER` (it brings a plugin)"
    )
    return f"""- transformers: `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, or without the
  flag after `import puzzle.model.modeling_puzzle`; `AutoTokenizer` reads the config too and wants the same
{vllm}
- llama.cpp: `puzzle export RUN --to gguf` writes one file, where llama.cpp can run these blocks
"""
