"""The KL of whole children on the text that was scored, and of children with one block exchanged.

Nothing is written: the blocks of the library stand in for the parent's one layer after another.
Several children run in an order in which they share the states after their first layers. An
exchange reuses the child's states before the exchanged block, as exact scores reuse the parent's
(`exact.py`), and runs the child's own layers after it.

Shape legend: B sequences, S positions, D hidden, C candidates.
"""

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from puzzle.model.architecture import Architecture, Block
from puzzle.model.layers import ParentLayers
from puzzle.model.modeling_puzzle import LayerContext, PuzzleDecoderLayer
from puzzle.run import Run
from puzzle.score import memory
from puzzle.score.exact import Shard, Suffix, parent_states
from puzzle.score.modules import LayerBlocks, LibraryBlocks
from puzzle.training.losses import KLToParent

Layer = Callable[..., torch.Tensor]  # of a child: (x_BSD, **context) -> [B, S, D]


@dataclass(frozen=True)
class _Text:
    """A shard, and what is computed of it once for all children."""

    tokens_BS: torch.Tensor
    embedded_BSD: torch.Tensor
    final_BSD: torch.Tensor  # the parent's, after the last norm
    context: LayerContext  # of a batch of one: fits any number
    to_parent: KLToParent


@dataclass(frozen=True)
class _ChildLayers:
    """The layers of a child: the parent's, and the library's blocks in the place of others."""

    parent: ParentLayers
    architecture: Architecture
    blocks: Callable[[int, Sequence[Block], PuzzleDecoderLayer], LayerBlocks]
    parent_blocks: Sequence[Block]

    def __len__(self) -> int:
        return len(self.architecture)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[Layer]:
        """What layer `index` does, valid inside the `with` block."""
        block = self.architecture.blocks[index]
        with self.parent.layer(index) as module:
            if block == self.parent_blocks[index]:
                yield module
                return
            blocks = self.blocks(index, [block], module)

            def run_layer(x_BSD: torch.Tensor, **context: object) -> torch.Tensor:
                return next(iter(blocks.outputs(x_BSD, context)))[1]  # type: ignore[arg-type]

            yield run_layer


class AssembledKL:
    """Measures children on the text that was scored."""

    def __init__(self, run: Run, shards: Sequence[Shard]) -> None:
        streamed = memory.is_streamed(run)
        self.run, self.parent = run, run.parent_layers(streamed=streamed)
        self.library = LibraryBlocks(run, kept=memory.keeps_library(run))
        device = run.device.torch_device
        self.texts: list[_Text] = []
        with torch.no_grad(), run.device.autocast():
            for shard in shards:
                states, context = parent_states(run, self.parent, shard.tokens_BS)
                embedded_BSD, _ = self.parent.embed(shard.tokens_BS)
                final_BSD = self.parent.norm(states[-1].to(device, non_blocking=True))
                tokens_BS = shard.tokens_BS.to(device)
                to_parent = KLToParent(
                    final_BSD[:, :-1].flatten(0, 1), self.parent.head_VD, self.parent.soft_cap
                )
                self.texts.append(_Text(tokens_BS, embedded_BSD, final_BSD, context, to_parent))

    def on_first(self, count: int) -> "AssembledKL":
        """The same on so many shards; the library is held once."""
        other = copy.copy(self)
        other.texts = self.texts[:count]
        return other

    @property
    def tokens(self) -> int:
        """That are predicted."""
        return sum(text.tokens_BS[:, 1:].numel() for text in self.texts)

    def kl(self, architecture: Architecture) -> float:
        """KL(parent || child) in nats per token."""
        ((_, kl),) = self.kls([architecture])
        return kl

    @torch.no_grad()
    def kls(self, architectures: Sequence[Architecture]) -> Iterator[tuple[int, float]]:
        """KL(parent || child) in nats per token of several children: (which one, KL).

        They come in an order in which children follow one another that share their first layers.
        """
        order = _sharing_order([architecture.names for architecture in architectures])
        states = {0: [text.embedded_BSD for text in self.texts]}  # after so many layers
        begin = 0
        for child, kept in order:
            layers = self._layers(architectures[child])
            now = states[begin]
            with self.run.device.autocast():
                for index in range(begin, len(layers)):
                    with layers.layer(index) as run_layer:
                        pairs = zip(self.texts, now, strict=True)
                        now = [run_layer(x_BSD, **text.context) for text, x_BSD in pairs]
                    if index + 1 in kept:
                        states[index + 1] = now
                finals = [self.parent.norm(x_BSD)[:, :-1].flatten(0, 1) for x_BSD in now]
                pairs = zip(self.texts, finals, strict=True)
                total = sum(float(text.to_parent.sums([final])) for text, final in pairs)
            states = {depth: states[depth] for depth in kept}
            begin = max(kept)
            yield child, total / self.tokens

    def exchanged(
        self,
        architecture: Architecture,
        others: Sequence[Sequence[Block]],
        on_block: Callable[[], None],
    ) -> Iterator[dict[str, float]]:
        """KL(parent || child with one block exchanged), by block name, layer after layer.

        Args:
            architecture: the child.
            others: by layer, the blocks to put there in turn.
            on_block: called after every block and shard.
        """
        layers = self._layers(architecture)
        states = [text.embedded_BSD for text in self.texts]
        for index, blocks in enumerate(others):
            sums: dict[str, float] = {}
            with torch.no_grad(), self.run.device.autocast():
                for text, x_BSD in zip(self.texts, states, strict=True):
                    for name, kl in self._exchanged_in(index, blocks, layers, text, x_BSD):
                        sums[name] = sums.get(name, 0.0) + kl
                        on_block()
                with layers.layer(index) as run_layer:
                    pairs = zip(self.texts, states, strict=True)
                    states = [run_layer(x_BSD, **text.context) for text, x_BSD in pairs]
            yield {name: kl / self.tokens for name, kl in sums.items()}

    def _exchanged_in(
        self,
        index: int,
        blocks: Sequence[Block],
        layers: _ChildLayers,
        text: _Text,
        x_BSD: torch.Tensor,
    ) -> Iterator[tuple[str, float]]:
        """Sums over the tokens of one text; `x_BSD` is the child's input of the layer."""
        if not blocks:
            return

        def outputs() -> Iterator[tuple[str, torch.Tensor]]:
            with self.parent.layer(index) as module:
                made = self._blocks(index, blocks, module).outputs(x_BSD, text.context)
                yield from ((block.name, output) for block, output in made)

        suffix = self._suffix(layers, text)
        finals = list(suffix.finals({index: outputs()}, self.run.recipe.score.tokens_per_pass))
        kl_C = text.to_parent.sums([final for _, final in finals])
        yield from zip([name for name, _ in finals], kl_C.tolist(), strict=True)

    def _suffix(self, layers: _ChildLayers, text: _Text) -> Suffix:
        return Suffix(layers, self.parent, text.context, text.final_BSD, text.tokens_BS)

    def _layers(self, architecture: Architecture) -> _ChildLayers:
        parent_blocks = self.run.parent.shape.parent_blocks
        return _ChildLayers(self.parent, architecture, self._blocks, parent_blocks)

    def _blocks(
        self, index: int, blocks: Sequence[Block], parent_layer: PuzzleDecoderLayer
    ) -> LayerBlocks:
        """Of the library; one that no search takes there, such as a no-op, is made for this."""
        if all(block in self.run.space.layers[index].blocks for block in blocks):
            return self.library.layer(index, blocks, parent_layer)
        return LayerBlocks.load(self.run, index, parent_layer, blocks)


def _sharing_order(children: Sequence[Sequence[str]]) -> list[tuple[int, set[int]]]:
    """Children by the names of their blocks, so that neighbours share their first layers.

    Returns (which child, after how many layers states must be kept, so that each of those that
    follow begins where it leaves the one before). What most children have in a layer comes last
    there: then few states are kept at a time. 0 is always kept.
    """
    counts = [Counter(layer) for layer in zip(*children, strict=True)]

    def key(child: int) -> list[tuple[int, str]]:
        return [(count[name], name) for count, name in zip(counts, children[child], strict=True)]

    order = sorted(range(len(children)), key=key)
    shared = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(counts))
        for pair in itertools.pairwise([children[child] for child in order])
    ]
    kept: list[set[int]] = [{0}]
    for depth in reversed(shared):  # a child that comes later begins at the least on the way to it
        kept.append({0, depth} | {min(depth, later) for later in kept[-1]})
    return list(zip(order, reversed(kept), strict=True))
