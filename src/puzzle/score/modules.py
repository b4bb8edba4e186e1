"""The library's blocks as modules, ready to be put in the parent's place."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from puzzle.library import weights
from puzzle.model import variants
from puzzle.model.architecture import FFN, Attention, Block
from puzzle.model.modeling_puzzle import LayerContext, PuzzleDecoderLayer
from puzzle.model.variants import State
from puzzle.run import Run


class LayerBlocks:
    """The blocks of one layer as modules: two subblocks composed, or a pair trained together."""

    def __init__(
        self, halves: Mapping[Block, tuple[PuzzleDecoderLayer, PuzzleDecoderLayer]]
    ) -> None:
        self.halves = dict(halves)

    @classmethod
    def load(
        cls, run: Run, layer: int, parent_layer: PuzzleDecoderLayer, blocks: Sequence[Block]
    ) -> "LayerBlocks":
        """Read the library's weights; what is the parent's is shared with the parent."""
        parent_state = parent_layer.state_dict()

        def module(block: Block, state: State) -> PuzzleDecoderLayer:
            attention = run.placement.attention
            made = variants.frozen_module(run.parent, layer, block, attention, state)
            return made.to(run.device.torch_device, run.placement.dtype)

        if run.recipe.library.coupled:
            pairs = {b: module(b, weights.read_block(run, layer, b, parent_state)) for b in blocks}
            return cls({block: (pair, pair) for block, pair in pairs.items()})
        subblocks = dict.fromkeys(half for block in blocks for half in block.subblocks)
        modules: dict[Attention | FFN, PuzzleDecoderLayer] = {}
        for half in subblocks:
            modules[half] = module(half.alone, weights.read_state(run, layer, half, parent_state))
        return cls({block: (modules[block.attention], modules[block.ffn]) for block in blocks})

    def only(self, blocks: Sequence[Block]) -> "LayerBlocks":
        """Some of the blocks; modules are shared."""
        return LayerBlocks({block: self.halves[block] for block in blocks})

    def outputs(
        self, x_BSD: torch.Tensor, context: LayerContext
    ) -> Iterator[tuple[Block, torch.Tensor]]:
        """Every block's output [B, S, D]; an attention shared by neighbours is computed once."""
        last: PuzzleDecoderLayer | None = None
        attended_BSD = x_BSD
        for block, (attention, ffn) in self.halves.items():
            if attention is not last:
                attended_BSD, last = attention.attention(x_BSD, **context), attention
            yield block, ffn.feed_forward(attended_BSD)


class LibraryBlocks:
    """The blocks of every layer; all are kept where they are small beside the memory."""

    def __init__(self, run: Run, *, kept: bool) -> None:
        self.run = run
        self.kept: dict[int, LayerBlocks] | None = {} if kept else None

    def layer(
        self, index: int, blocks: Sequence[Block], parent_layer: PuzzleDecoderLayer
    ) -> LayerBlocks:
        """These blocks of one layer, whose parent's it is."""
        if self.kept is None:
            return LayerBlocks.load(self.run, index, parent_layer, blocks)
        if index not in self.kept:
            all_blocks = self.run.space.layers[index].blocks
            self.kept[index] = LayerBlocks.load(self.run, index, parent_layer, all_blocks)
        return self.kept[index].only(blocks)
