"""Blocks and subblock variants as modules: empty ones to be trained, frozen ones with weights.

A variant is a `PuzzleDecoderLayer` whose other half is a no-op, so it carries its own norm and has
the weight names of a child's layer, relative to the layer (`self_attn.q_proj.weight`).
"""

from collections.abc import Mapping

import torch

from puzzle.model import child
from puzzle.model.architecture import FFN, Architecture, Attention, Block, Subblock
from puzzle.model.modeling_puzzle import PuzzleDecoderLayer
from puzzle.model.parent import Parent

State = dict[str, torch.Tensor]
PREFIXES: dict[type[Attention] | type[FFN], tuple[str, ...]] = {
    Attention: ("self_attn.", "input_layernorm.", "attention_output_layernorm."),
    FFN: ("mlp.", "post_attention_layernorm.", "feedforward_output_layernorm."),
}


def is_trained(variant: Subblock, parent: Block) -> bool:
    """Whether the library trains this variant in a layer of this parent's block.

    The parent's own subblocks and no-ops need no training.
    """
    return variant.kind != "no_op" and variant not in parent.subblocks


def is_trained_pair(block: Block, parent: Block) -> bool:
    """Whether coupled BLD trains this block in a layer of this parent's block."""
    return block != parent and not block.is_no_op


def block_module(
    parent: Parent, layer: int, block: Block, attention_implementation: str
) -> PuzzleDecoderLayer:
    """A layer of this block in the place of the parent's layer `layer`, weights uninitialised."""
    config = parent.child_config(Architecture((block,)), parent.shape.windows[layer:][:1])
    config._attn_implementation = child.attention_for(config, attention_implementation)
    return PuzzleDecoderLayer(config, 0, 0)


def frozen_module(
    parent: Parent,
    layer: int,
    block: Block,
    attention_implementation: str,
    state: Mapping[str, torch.Tensor],
) -> PuzzleDecoderLayer:
    """A layer of this block for inference, with these weights, which it takes without a copy."""
    with torch.device("meta"):
        module = block_module(parent, layer, block, attention_implementation)
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def subblock_state(
    layer_state: Mapping[str, torch.Tensor], kind: type[Attention] | type[FFN]
) -> State:
    """The weights of a layer that belong to its attention or its FFN subblock, norms included."""
    return {name: tensor for name, tensor in layer_state.items() if name.startswith(PREFIXES[kind])}
