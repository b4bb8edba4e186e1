"""The model card of a child: what it is and how to serve it. `report` adds what it kept."""

from pathlib import Path

import yaml
from pydantic import JsonValue

from puzzle import settings
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.parent import Parent

OF_THE_PARENT = ("license", "license_name", "license_link", "language")  # hold for the child, too


def text(name: str, parent: Parent, architecture: Architecture, figures: str = "") -> str:
    """Markdown with front matter.

    Args:
        name: of the parent, as the recipe has it.
        parent: its shape, and its own card for licence and languages.
        architecture: the child's.
        figures: a section on what the child kept, once that is known.
    """
    front_matter: dict[str, JsonValue] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": name,
        "tags": ["puzzle"],
    }
    front_matter.update(_parents_front_matter(parent.folder / "README.md"))
    parameters = architecture.parameters(parent.shape)
    share = parameters / Architecture.of_parent(parent.shape).parameters(parent.shape)
    rows = "\n".join(
        f"| {index} | {block.attention.name} | {block.ffn.name} |"
        for index, block in enumerate(architecture)
    )
    return f"""---
{yaml.safe_dump(front_matter, sort_keys=False)}---
# A Puzzle child of {name}

Made by [Puzzle](https://arxiv.org/abs/2411.19146) from {name}: {parameters:,} parameters,
{share:.0%} of the parent's. The parent's licence holds for this model too.

{figures}## How to serve it
{_serving(parent, architecture)}
## Architecture
`gqa_N`: attention with N KV heads; `gated_N`: FFN of intermediate size N; `linear`: one matrix;
`no_op`: nothing.

| layer | attention | FFN |
| --- | --- | --- |
{rows}
"""


def _parents_front_matter(readme: Path) -> dict[str, JsonValue]:
    """What the parent's own card says of its licence and languages."""
    if not readme.is_file():
        return {}
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        values = settings.parse_yaml(parts[1])
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key in OF_THE_PARENT if key in values}


def _serving(parent: Parent, architecture: Architecture) -> str:
    model_class = child.architectures_name(parent.child_config(architecture))
    if model_class == "DeciLMForCausalLM":
        vllm = "`vllm serve FOLDER --trust-remote-code`; with the puzzle package, without the flag"
    else:
        vllm = "with the puzzle package installed, `vllm serve FOLDER` (it brings a plugin)"
    load = "AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)"
    return f"""- transformers: `{load}`,
  or without the flag after `import puzzle.model.modeling_puzzle`; so does `AutoTokenizer`
- vLLM: {vllm}
- llama.cpp: `puzzle export RUN --to gguf` writes one file, where llama.cpp can run these blocks
"""
