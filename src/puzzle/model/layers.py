"""The frozen parent layer by layer: from a model in memory, or read from its files each time."""

import contextlib
from collections.abc import Iterator

import torch

from puzzle.device import pinned
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import LayerContext, PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.model.parent import Parent


class ParentLayers:
    """The frozen parent, layer by layer, from a model that is in memory."""

    on_host = False  # whether activations that wait are kept in host memory

    def __init__(self, model: PuzzleForCausalLM) -> None:
        self.model = model

    def embed(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, LayerContext]:
        """Layer 0's input [B, S, D] and the keyword arguments that every layer takes."""
        return self.model.model.embed(tokens_BS)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        """The parent's layer `index`, valid inside the `with` block."""
        yield self.model.model.layers[index]


class StreamedLayers(ParentLayers):
    """The frozen parent with at most one layer in memory, read from its files each time."""

    on_host = True

    def __init__(
        self, parent: Parent, dtype: torch.dtype, device: torch.device, attention: str
    ) -> None:
        self.parent, self.dtype, self.device = parent, dtype, device
        config = parent.child_config(Architecture.of_parent(parent.shape))
        super().__init__(child.skeleton(config, device, attention))

    def embed(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, LayerContext]:
        """As above; of the embedding only the rows of these tokens are read."""
        with self.parent.weights() as weights:
            rows_BSD = weights["model.embed_tokens.weight"][tokens_BS.cpu()]
        rows_BSD = pinned(rows_BSD.to(self.dtype), self.device).to(self.device, non_blocking=True)
        return self.model.model.embed(inputs_embeds=self.model.model.embed_tokens.scaled(rows_BSD))

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        """The parent's layer `index`, read from its files and dropped after the `with` block."""
        module = self.model.model.layers[index]
        prefix = f"model.layers.{index}."
        with self.parent.weights() as weights:
            state = {
                name: weights[prefix + name].to(device=self.device, dtype=self.dtype, copy=True)
                for name in module.state_dict()
            }
        module.load_state_dict(state, assign=True)
        del state
        yield module.requires_grad_(False)
        module.to("meta")
