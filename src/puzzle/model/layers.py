"""The frozen parent layer by layer: from a model in memory, or read from its files each time."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import nn

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

    def __len__(self) -> int:
        return len(self.model.model.layers)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        """The parent's layer `index`, valid inside the `with` block."""
        yield self.model.model.layers[index]

    @property
    def norm(self) -> nn.Module:
        """What stands before the head."""
        return self.model.model.norm

    @property
    def head_VD(self) -> torch.Tensor:
        """The head's weight."""
        return self.model.lm_head.weight

    @property
    def soft_cap(self) -> float | None:
        """Of the logits."""
        return self.model.config.final_logit_softcapping


class StreamedLayers(ParentLayers):
    """The frozen parent with at most one layer in memory, read from its files each time."""

    on_host = True

    def __init__(
        self, parent: Parent, dtype: torch.dtype, device: torch.device, attention: str
    ) -> None:
        self.parent, self.dtype, self.device = parent, dtype, device
        config = parent.child_config(Architecture.of_parent(parent.shape))
        super().__init__(child.skeleton(config, device, attention))
        self.here: dict[int, PuzzleDecoderLayer] = {}

    def embed(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, LayerContext]:
        """As above; of the embedding only the rows of these tokens are read."""
        with self.parent.weights() as weights:
            rows_BSD = weights["model.embed_tokens.weight"][tokens_BS.cpu()]
        rows_BSD = pinned(rows_BSD.to(self.dtype), self.device).to(self.device, non_blocking=True)
        return self.model.model.embed(inputs_embeds=self.model.model.embed_tokens.scaled(rows_BSD))

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        """The parent's layer `index`, read from its files and dropped after the `with` block."""
        if index in self.here:
            yield self.here[index]
            return
        yield self._fetched(index)
        self.here.pop(index).to("meta")

    def _fetched(self, index: int) -> PuzzleDecoderLayer:
        """The layer with its weights."""
        module: PuzzleDecoderLayer = self.model.model.layers[index]
        names = list(module.state_dict())
        module.load_state_dict(self._read(f"model.layers.{index}.", names), assign=True)
        self.here[index] = module.requires_grad_(False)
        return module

    @cached_property
    def norm(self) -> nn.Module:
        """What stands before the head, read when first asked for."""
        norm = self.model.model.norm
        norm.load_state_dict(self._read("model.norm.", list(norm.state_dict())), assign=True)
        return norm.requires_grad_(False)

    @cached_property
    def head_VD(self) -> torch.Tensor:
        """The head's weight, read when first asked for."""
        table = "model.embed_tokens" if self.model.config.tie_word_embeddings else "lm_head"
        return self._read(f"{table}.", ["weight"])["weight"]

    def _read(self, prefix: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors by what follows the prefix in their names; the files are unmapped afterwards."""
        with self.parent.weights() as weights:
            return {
                name: weights[prefix + name].to(device=self.device, dtype=self.dtype, copy=True)
                for name in names
            }


class KeptLayers(StreamedLayers):
    """Some of the frozen parent's layers in memory: those that were asked for."""

    on_host = False

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        """The parent's layer `index`, read from its files the first time."""
        yield self.here[index] if index in self.here else self._fetched(index)
