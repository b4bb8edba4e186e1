"""The built-in engine: plain PyTorch with a real KV cache, on any device. For machines without a
serving engine.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from puzzle.config import ScenarioConfig
from puzzle.engines import Timing, machine, random_prompts
from puzzle.errors import UserError
from puzzle.model import child, parent

NAME, MEASURED = "torch", True


def available() -> str | None:
    return None


def describe(device_sheet: str) -> dict[str, Any]:
    return {"engine": NAME, "version": torch.__version__, **machine()}


class FixedLayer(DynamicLayer):
    """One layer's keys and values in memory taken once, written at `position`.

    Nothing grows or is copied from step to step, and a layer that sat out a step still has its
    place in the cache.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.position = length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        B, K, new, d = key_states.shape
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states.new_zeros(2, B, K, self.length, d)
        assert self.keys is not None and self.values is not None
        end = self.position + new
        self.keys[:, :, self.position : end], self.values[:, :, self.position : end] = (
            key_states,
            value_states,
        )
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.position


class TorchSession:
    """A child loaded in this process; greedy decoding, the whole batch in step."""

    def __init__(self, folder: Path, scenario: ScenarioConfig) -> None:
        if scenario.tensor_parallel > 1:
            raise UserError(
                f"cost.engine: torch serves on one device; got tensor_parallel={scenario.tensor_parallel}, use vllm"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        is_child = (folder / "architecture.json").exists()
        served = None if is_child else parent.describe(str(folder), trust_remote_code=True)
        dtype = getattr(torch, scenario.dtype) if scenario.dtype != "auto" else None
        if served is None:
            self.model = child.load(folder, dtype, self.device)
        else:
            self.model = served.load(dtype or served.dtype, self.device)
        self.layers = list(self.model.model.layers)
        attention = [getattr(layer.self_attn, "k_proj", None) for layer in self.layers]
        self.pages = [
            (1, 2 * k.weight.shape[0] * k.weight.element_size()) if k is not None else (1, 0)
            for k in attention
        ]
        self.batches = 0

    def __enter__(self) -> "TorchSession":
        return self

    def __exit__(self, *exception: object) -> None:
        del self.model, self.layers

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def time_batch(self, scenario: ScenarioConfig, layers: Sequence[Sequence[int]] = ()) -> Timing:
        self.batches += 1
        tokens = torch.tensor(
            random_prompts(scenario, self.model.config.vocab_size, self.batches), device=self.device
        )
        length = scenario.input_length + scenario.output_length
        rows = [FixedLayer(length) for _ in self.layers]
        cache = Cache(layers=list(rows))
        clock = [self._clock()]
        for step in range(scenario.output_length):
            if layers:
                chosen = layers[min(step, len(layers) - 1)]
                self.model.model.layers = torch.nn.ModuleList(
                    [self.layers[index] for index in chosen]
                )
            logits = self.model(
                tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            for row in rows:
                row.position += tokens.shape[1]
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            clock.append(self._clock())
        seconds = [after - before for before, after in itertools.pairwise(clock)]
        return Timing(seconds[0], tuple(seconds[1:]))


def open_session(
    folder: Path, scenario: ScenarioConfig, log: Path, device_sheet: str, probe: bool
) -> TorchSession:
    return TorchSession(folder, scenario)
