"""The child as a plain `nemotron-nas` checkpoint: what engines that know NVIDIA's own models of
this kind read.

A child's folder is already in this format; the export spells out every key that those engines' code
looks for (FFN widths as multiples too, where they can be), leaves out ours, and can change the
dtype. It loads in stock vLLM and in transformers with `trust_remote_code=True`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.model.weights import Weights

NAME = "nemotron-nas"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
MULTIPLE = 256  # of the FFN widths that `ffn_mult` can say
OURS = tuple(sorted(set(PuzzleConfig.__annotations__) - {"block_configs", "qkv_bias"}))


def refuse(config: PuzzleConfig, architecture: Architecture) -> None:
    for index, block in enumerate(architecture):
        for half, variant in (("attention", block.attention), ("FFN", block.ffn)):
            if variant.kind == "linear":
                raise UserError(
                    f"export nemotron-nas: layer {index} has a linear {half}, which stock engines do not serve; "
                    "search with deploy: [vllm], or serve the child itself with our plugin"
                )
    if architecture.blocks[0].attention.kind == "no_op":
        raise UserError(
            "export nemotron-nas: layer 0 has no attention, on which stock vLLM fails; search with deploy: [vllm], or "
            "serve the child itself with our plugin"
        )
    if child.architectures_name(config) != "DeciLMForCausalLM":
        raise UserError(
            "export nemotron-nas: stock engines do not know this parent's family in this form (norms, windows or soft "
            "caps); serve the child itself with our plugin"
        )


def export(
    source: Path, target: Path, *, name: str = "child", dtype: str | None = None
) -> dict[str, Any]:
    """`dtype`: bf16, f16 or f32; the child's own where it is None. Raises `UserError` for what it
    cannot say.
    """
    config, architecture = PuzzleConfig.from_pretrained(source), child.read_architecture(source)
    refuse(config, architecture)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(
            f"export nemotron-nas: dtype: got {dtype!r}, expected one of: {', '.join(DTYPES)}"
        )
    config.dtype = DTYPES[dtype] if dtype else child.stored_dtype(config)
    readme = (source / "README.md").read_text(encoding="utf-8")
    with Weights(source) as weights:
        child.save(target, config, architecture, weights, source, readme)
    settings = artifacts.read_json(target / "config.json")
    widths = [block["ffn"]["intermediate_size"] for block in settings["block_configs"]]
    multiples = all(width is None or width % MULTIPLE == 0 for width in widths)
    settings = {key: value for key, value in settings.items() if key not in OURS}
    if not settings["qkv_bias"]:
        del settings["qkv_bias"]
    settings["block_configs"] = [
        _spelled_out(b, config.hidden_size, multiples) for b in settings["block_configs"]
    ]
    artifacts.write_json(target / "config.json", settings)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    notes = (
        []
        if multiples
        else [f"FFN widths are no multiples of {MULTIPLE}: no ffn_mult, which TensorRT-LLM wants"]
    )
    return {"file": "", "bytes": size, "notes": notes}


def _spelled_out(block: Mapping[str, Any], hidden_size: int, multiples: bool) -> dict[str, Any]:
    """One entry of `block_configs` with every key of NVIDIA's own checkpoints."""
    attention, ffn = block["attention"], block["ffn"]
    width = ffn["intermediate_size"]
    own = {
        "no_op": ffn["no_op"],
        "replace_with_linear": ffn["replace_with_linear"],
        "intermediate_size": width,
        "sparsify": None,
    }
    if multiples:  # engines round int(2 * ffn_mult * hidden_size / 3) up to the next multiple
        own["ffn_mult"] = None if width is None else 3 * width / (2 * hidden_size)
    extra = {
        "window_length": None,
        "num_sink_tokens": None,
        "unshifted_sink": None,
        "sparsify": None,
        "use_prefill_window_in_sink_attention": None,
    }
    return {"attention": extra | dict(attention), "ffn": own}


@torch.no_grad()
def verify(source: Path, target: Path) -> dict[str, Any]:
    """Load both and compare the logits of a few random tokens, in the export's dtype."""
    device = torch.device("cpu")
    config = PuzzleConfig.from_pretrained(target)
    dtype = child.stored_dtype(config)
    tokens = torch.randint(
        0, config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0)
    )
    first, second = (
        child.load(folder, dtype, device)(tokens).logits for folder in (source, target)
    )
    if not torch.equal(first, second):
        shutil.rmtree(target, ignore_errors=True)
        raise RuntimeError(
            "export nemotron-nas: the logits of the export are not those of the child"
        )
    return {
        "tokens": tokens.numel(),
        "largest_logit_difference": (first - second).abs().max().item(),
    }
