"""Reading the library: the weights of a subblock or of a whole block."""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from puzzle.library import LIBRARY
from puzzle.model import variants
from puzzle.model.architecture import Block, Subblock, file_stem
from puzzle.model.variants import State
from puzzle.run import Run
from puzzle.stage import Job


def read_state(
    run: Run, layer: int, variant: Subblock, parent_layer_state: Mapping[str, torch.Tensor]
) -> State:
    """The weights of a subblock; names are relative to the layer.

    Trained ones come from the library, the parent's from the parent, a no-op has none.
    """
    if variant.kind == "no_op":
        return {}
    if not variants.is_trained(variant, run.parent.shape.parent_blocks[layer]):
        return variants.subblock_state(parent_layer_state, type(variant))
    return _read(run, layer, variant)


def read_block(
    run: Run, layer: int, block: Block, parent_layer_state: Mapping[str, torch.Tensor]
) -> State:
    """The weights of a whole block: a pair trained together, or two subblocks composed."""
    parent = run.parent.shape.parent_blocks[layer]
    if run.recipe.library.coupled and variants.is_trained_pair(block, parent):
        return _read(run, layer, block)
    state: State = {}
    for half in block.subblocks:
        state |= read_state(run, layer, half, parent_layer_state)
    return state


def _read(run: Run, layer: int, variant: Subblock | Block) -> State:
    return load_file(Job(run).folder(LIBRARY) / f"{file_stem(layer, variant)}.safetensors")
