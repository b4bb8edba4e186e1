"""A frozen model layer by layer: from memory, or read from its files each time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import nn

from puzzle.device import Placement, pinned, return_freed_memory
from puzzle.model import child
from puzzle.model.modeling_puzzle import (
    LayerContext,
    PuzzleConfig,
    PuzzleDecoderLayer,
    PuzzleForCausalLM,
)
from puzzle.model.weights import Weights


class ParentLayers:
    """The frozen parent, layer by layer, from a model that is in memory."""

    on_host = False  # whether activations that wait are kept in host memory

    def __init__(self, model: PuzzleForCausalLM) -> None:
        self.model = model

    def embed(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, LayerContext]:
        """Layer 0's input [B, S, D] and the keyword arguments that every layer takes.

        The tokens are on the host.
        """
        return self.model.model.embed(tokens_BS.to(self.model.device))

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
    """A frozen model with at most one layer in memory, read from its files each time."""

    on_host = True

    def __init__(
        self, config: PuzzleConfig, weights: Callable[[], Weights], placement: Placement
    ) -> None:
        """Of a model, by its config and its tensors, which `weights` maps into memory."""
        self.weights, self.dtype, self.device = weights, placement.dtype, placement.device
        super().__init__(child.skeleton(config, placement.device, placement.attention))
        self.here: dict[int, PuzzleDecoderLayer] = {}

    def embed(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, LayerContext]:
        """As above; of the embedding only the rows of these tokens are read."""
        with self.weights() as weights:
            rows_BSD = weights["model.embed_tokens.weight"][tokens_BS]
        rows_BSD = pinned(rows_BSD.to(self.dtype), self.device).to(self.device, non_blocking=True)
        return self.model.model.embed(inputs_embeds=self.model.model.embed_tokens.scaled(rows_BSD))

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        """The parent's layer `index`, read from its files and dropped after the `with` block."""
        if index in self.here:
            yield self.here[index]
            return
        yield self._fetched(index)
        self._drop(index)

    def whole(self) -> PuzzleForCausalLM:
        """The model, whose layers are read for their forward, each time; the rest is there."""
        ends = self._read("model.", ["embed_tokens.weight", "norm.weight"])
        self.model.model.load_state_dict(ends, assign=True, strict=False)
        if not self.model.config.tie_word_embeddings:
            self.model.lm_head.load_state_dict({"weight": self.head_VD}, assign=True)
        self.model.tie_weights()
        for index, layer in enumerate(self.model.model.layers):

            def fetch(*_: object, index: int = index) -> None:
                self._fetched(index)

            def drop(*_: object, index: int = index) -> None:
                self._drop(index)

            layer.register_forward_pre_hook(fetch)
            layer.register_forward_hook(drop)
        return self.model.requires_grad_(False)

    def _fetched(self, index: int) -> PuzzleDecoderLayer:
        """The layer with its weights."""
        module: PuzzleDecoderLayer = self.model.model.layers[index]
        names = list(module.state_dict())
        module.load_state_dict(self._read(f"model.layers.{index}.", names), assign=True)
        self.here[index] = module.requires_grad_(False)
        return module

    def _drop(self, index: int) -> None:
        self.here.pop(index).to("meta")
        return_freed_memory()

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
        with self.weights() as weights:
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
