"""The child as a plain `nemotron-nas` checkpoint, as NVIDIA's own models of this kind are.

A child's folder is already in this format; the export spells out every key that engines' code looks
for (FFN widths as multiples too, where they can be), leaves out ours, and can change the dtype. It
loads in stock vLLM and in transformers with `trust_remote_code=True`.
"""

import shutil
from pathlib import Path

import torch
from pydantic import JsonValue, TypeAdapter

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.export.exporter import Comparison, Exporter, Options, Written
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.block_configs import BlockConfig
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.model.weight_files import weight_files
from puzzle.model.weights import Weights

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
MULTIPLE = 256  # of the FFN widths that `ffn_mult` can say
# Settings that only our own model class reads
PUZZLE_KEYS = tuple(sorted(set(PuzzleConfig.__annotations__) - {"block_configs", "qkv_bias"}))


class LogitComparison(Comparison):
    """The number of tokens compared, and by how much any of their logits differs."""

    tokens: int
    largest_logit_difference: float


def refuse(config: PuzzleConfig, architecture: Architecture) -> None:
    """Raise `UserError` for a child that stock engines cannot serve."""
    for index, block in enumerate(architecture):
        for half, variant in (("attention", block.attention), ("FFN", block.ffn)):
            if variant.kind == "linear":
                raise UserError(
                    f"export nemotron-nas: layer {index} has a linear {half}, which stock engines "
                    "do not serve; search with deploy: [vllm], or serve the child itself with our "
                    "plugin"
                )
    if architecture.blocks[0].attention.kind == "no_op":
        raise UserError(
            "export nemotron-nas: layer 0 has no attention, on which stock vLLM fails; "
            "search with deploy: [vllm], or serve the child itself with our plugin"
        )
    if child.architectures_name(config) != "DeciLMForCausalLM":
        raise UserError(
            "export nemotron-nas: stock engines do not know this parent's family in this form "
            "(norms, windows or soft caps); serve the child itself with our plugin"
        )


def export(source: Path, target: Path, options: Options) -> Written:
    """Write the child in `source` to the folder `target`.

    The dtype is bf16, f16 or f32, by default the child's. The format stores no name of the child.
    Raises `UserError` for another dtype, and for a child that stock engines cannot serve.
    """
    config, architecture = PuzzleConfig.from_pretrained(source), child.read_architecture(source)
    refuse(config, architecture)
    if options.dtype is None:
        config.dtype = child.stored_dtype(config)
    elif options.dtype in DTYPES:
        config.dtype = DTYPES[options.dtype]
    else:
        expected = ", ".join(DTYPES)
        raise UserError(
            f"export nemotron-nas: dtype: got {options.dtype!r}, expected one of: {expected}"
        )
    readme = (source / "README.md").read_text(encoding="utf-8")
    with Weights(source) as weights:
        child.save(target, config, architecture, weights, source, readme)
    has_multiples = _rewrite_config(target / "config.json", config.hidden_size)
    notes = []
    if not has_multiples:
        notes.append(
            f"FFN widths are no multiples of {MULTIPLE}: no ffn_mult, which TensorRT-LLM wants"
        )
    size = sum(path.stat().st_size for path in weight_files(target))
    return Written(file="", bytes=size, notes=notes)


BLOCK_CONFIGS = TypeAdapter(list[BlockConfig])


def _rewrite_config(path: Path, hidden_size: int) -> bool:
    """Spell out the format's keys and drop ours; returns whether `ffn_mult` could be among them."""
    settings = artifacts.read_object(path)
    blocks = BLOCK_CONFIGS.validate_python(settings["block_configs"])
    widths = [block["ffn"]["intermediate_size"] for block in blocks]
    has_multiples = all(width is None or width % MULTIPLE == 0 for width in widths)
    settings = {key: value for key, value in settings.items() if key not in PUZZLE_KEYS}
    if not settings["qkv_bias"]:
        del settings["qkv_bias"]
    settings["block_configs"] = [
        _spelled_out(block, hidden_size, has_multiples) for block in blocks
    ]
    artifacts.write_json(path, settings)
    return has_multiples


def _spelled_out(block: BlockConfig, hidden_size: int, has_multiples: bool) -> dict[str, JsonValue]:
    """One entry of `block_configs` with every key of NVIDIA's own checkpoints."""
    width = block["ffn"]["intermediate_size"]
    attention: dict[str, JsonValue] = {
        "window_length": None,
        "num_sink_tokens": None,
        "unshifted_sink": None,
        "sparsify": None,
        "use_prefill_window_in_sink_attention": None,
    }
    attention.update(block["attention"])
    ffn: dict[str, JsonValue] = {
        "no_op": block["ffn"]["no_op"],
        "replace_with_linear": block["ffn"]["replace_with_linear"],
        "intermediate_size": width,
        "sparsify": None,
    }
    if has_multiples:  # engines round int(2 * ffn_mult * hidden_size / 3) up to the next multiple
        ffn["ffn_mult"] = None if width is None else 3 * width / (2 * hidden_size)
    return {"attention": attention, "ffn": ffn}


@torch.no_grad()
def verify(source: Path, target: Path) -> LogitComparison:
    """Load both and compare the logits of a few random tokens, in the export's dtype.

    Where they differ it removes the export and raises `RuntimeError`: that would be our bug.
    """
    config = PuzzleConfig.from_pretrained(target)
    dtype = child.stored_dtype(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (2, 32), generator=generator)
    child_logits = child.load(source, dtype, torch.device("cpu"))(tokens).logits
    export_logits = child.load(target, dtype, torch.device("cpu"))(tokens).logits
    if not torch.equal(child_logits, export_logits):
        shutil.rmtree(target, ignore_errors=True)
        raise RuntimeError(
            "export nemotron-nas: the logits of the export are not those of the child"
        )
    return LogitComparison(
        tokens=tokens.numel(),
        largest_logit_difference=float((child_logits - export_logits).abs().max()),
    )


EXPORTER = Exporter(
    name="nemotron-nas",
    summary="a folder that engines read as they read NVIDIA's own models of this kind",
    refuse=refuse,
    export=export,
    verify=verify,
)
