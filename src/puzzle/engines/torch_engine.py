"""The built-in engine: plain PyTorch with a real KV cache, on any device. For machines without a serving engine."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from puzzle import child, parent
from puzzle.config import ScenarioConfig
from puzzle.engines import Timing, machine

NAME, MEASURED = "torch", True


def available() -> str | None:
    return None


def describe(device_sheet: str) -> dict[str, Any]:
    return {"engine": NAME, "version": torch.__version__, **machine()}


class TorchSession:
    """A child loaded in this process; greedy decoding, the whole batch in step."""

    def __init__(self, folder: Path, scenario: ScenarioConfig, time_layers: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        is_child = (folder / "architecture.json").exists()
        served = None if is_child else parent.describe(str(folder), trust_remote_code=True)
        dtype = getattr(torch, scenario.dtype) if scenario.dtype != "auto" else None
        if served is None:
            self.model = child.load(folder, dtype, self.device)
        else:
            self.model = served.load(dtype or served.dtype, self.device)
        self.seconds = [0.0] * len(self.model.model.layers)
        for index, layer in enumerate(self.model.model.layers if time_layers else ()):
            layer.forward = self._timed(index, layer.forward)

    def __enter__(self) -> "TorchSession":
        return self

    def __exit__(self, *exception: object) -> None:
        del self.model

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, index: int, forward: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._clock()
            result = forward(*args, **kwargs)
            self.seconds[index] += self._clock() - began
            return result

        return timed

    def _take(self) -> tuple[float, ...]:
        taken, self.seconds[:] = tuple(self.seconds), [0.0] * len(self.seconds)
        return taken

    @torch.inference_mode()
    def time_batch(self, scenario: ScenarioConfig) -> Timing:
        generator = torch.Generator().manual_seed(0)
        shape = (scenario.batch_size, scenario.input_length)
        tokens = torch.randint(1, self.model.config.vocab_size, shape, generator=generator).to(self.device)
        cache = DynamicCache()
        self._take()
        began = self._clock()
        tokens = self._step(tokens, cache)
        prefilled = self._clock()
        layers_prefill = self._take()
        for _ in range(scenario.output_length - 1):
            tokens = self._step(tokens, cache)
        done = self._clock()
        return Timing(prefilled - began, done - prefilled, layers_prefill, self._take())

    def _step(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def open_session(
    folder: Path, scenario: ScenarioConfig, log: Path, device_sheet: str, time_layers: bool
) -> TorchSession:
    return TorchSession(folder, scenario, time_layers)
