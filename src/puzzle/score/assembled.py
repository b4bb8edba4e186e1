"""The KL of whole children on the text that was scored, and of children with one block exchanged.

Nothing is written: the blocks of the library stand in for the parent's one layer after another. An
exchange reuses the child's states before the exchanged block, as exact scores reuse the parent's
(`exact.py`), and runs the child's own layers after it.

Shape legend: B sequences, S positions, D hidden, C candidates.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from puzzle.model.architecture import Architecture, Block
from puzzle.model.modeling_puzzle import LayerContext
from puzzle.run import Run
from puzzle.score.exact import Shard, Suffix, parent_states
from puzzle.score.modules import LayerBlocks, LibraryBlocks
from puzzle.training.losses import METRICS

Layer = Callable[..., torch.Tensor]  # of a child: (x_BSD, **context) -> [B, S, D]


@dataclass(frozen=True)
class _Text:
    """A shard, and what is computed of it once for all children."""

    tokens_BS: torch.Tensor
    embedded_BSD: torch.Tensor
    final_BSD: torch.Tensor  # the parent's, after the last norm
    context: LayerContext  # of a batch of one: fits any number


class AssembledKL:
    """Measures children on the text that was scored."""

    def __init__(self, run: Run, shards: Sequence[Shard]) -> None:
        self.run, self.parent = run, run.parent_model
        self.library = LibraryBlocks(run, self.parent)
        device = run.device.torch_device
        self.texts: list[_Text] = []
        with torch.no_grad(), run.device.autocast():
            for shard in shards:
                tokens_BS = shard.tokens_BS.to(device)
                last_BSD = parent_states(run, self.parent, shard.tokens_BS)[-1]
                embedded_BSD, _ = self.parent.model.embed(tokens_BS)
                _, context = self.parent.model.embed(tokens_BS[:1])
                final_BSD = self.parent.model.norm(last_BSD.to(device, non_blocking=True))
                self.texts.append(_Text(tokens_BS, embedded_BSD, final_BSD, context))

    def on_first(self, count: int) -> "AssembledKL":
        """The same on so many shards; the library is held once."""
        other = copy.copy(self)
        other.texts = self.texts[:count]
        return other

    @property
    def tokens(self) -> int:
        """That are predicted."""
        return sum(text.tokens_BS[:, 1:].numel() for text in self.texts)

    @torch.no_grad()
    def kl(self, architecture: Architecture) -> float:
        """KL(parent || child) in nats per token."""
        layers, total = self._layers(architecture), 0.0
        with self.run.device.autocast():
            for text in self.texts:
                x_BSD = text.embedded_BSD
                for layer in layers:
                    x_BSD = layer(x_BSD, **text.context)
                suffix = Suffix(self.parent, [], text.context, text.final_BSD, text.tokens_BS)
                ((_, final_TD),) = suffix.finals([(None, x_BSD)], per_pass=1)
                total += float(self._kl_sums(suffix, [final_TD])[0])
        return total / self.tokens

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
                pairs = zip(self.texts, states, strict=True)
                states = [layers[index](x_BSD, **text.context) for text, x_BSD in pairs]
            yield {name: kl / self.tokens for name, kl in sums.items()}

    def _exchanged_in(
        self,
        index: int,
        blocks: Sequence[Block],
        layers: Sequence[Layer],
        text: _Text,
        x_BSD: torch.Tensor,
    ) -> Iterator[tuple[str, float]]:
        """Sums over the tokens of one text; `x_BSD` is the child's input of the layer."""
        per_pass = max(1, self.run.recipe.score.tokens_per_pass // text.tokens_BS.numel())
        outputs = self._blocks(index, blocks).outputs(x_BSD, text.context)
        after = layers[index + 1 :]
        suffix = Suffix(self.parent, after, text.context, text.final_BSD, text.tokens_BS)
        finals = suffix.finals(outputs, per_pass)
        while pending := list(itertools.islice(finals, per_pass)):
            kl_C = self._kl_sums(suffix, [final for _, final in pending])
            yield from zip([block.name for block, _ in pending], kl_C.tolist(), strict=True)

    @staticmethod
    def _kl_sums(suffix: Suffix, finals: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums over tokens [C] of the KL of several inputs [T, D] of the head."""
        return suffix.metrics(finals)[:, METRICS.index("kl")].sum(dim=(1, 2)).cpu()

    def _layers(self, architecture: Architecture) -> list[Layer]:
        return [self._layer(index, block) for index, block in enumerate(architecture)]

    def _layer(self, index: int, block: Block) -> Layer:
        if block == self.run.parent.shape.parent_blocks[index]:
            layer: Layer = self.parent.model.layers[index]
            return layer
        blocks = self._blocks(index, [block])

        def run_layer(x_BSD: torch.Tensor, **context: object) -> torch.Tensor:
            return next(iter(blocks.outputs(x_BSD, context)))[1]  # type: ignore[arg-type]

        return run_layer

    def _blocks(self, index: int, blocks: Sequence[Block]) -> LayerBlocks:
        """Of the library; one that no search takes there, such as a no-op, is made for this."""
        if all(block in self.run.space.layers[index].blocks for block in blocks):
            return self.library.layer(index, blocks)
        return LayerBlocks.load(self.run, index, self.parent.model.layers[index], blocks)
