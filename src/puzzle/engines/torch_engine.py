"""The built-in engine: plain PyTorch with a KV cache, for machines without a serving engine."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.cache_utils import Cache, DynamicLayer

from puzzle.config import ScenarioConfig
from puzzle.engines import Engine, EngineFacts, Page, gpu_index, machine, random_prompts
from puzzle.errors import UserError
from puzzle.model import child, parent
from puzzle.model.modeling_puzzle import PuzzleConfig


def make(device: str = "auto") -> Engine:
    """The engine on this machine's GPU, on its CPU, or on the device of that name."""
    name, count = machine(device)
    facts = EngineFacts(engine="torch", version=torch.__version__, device=name, count=count)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_device = torch.device(device)

    def serve(folder: Path, scenario: ScenarioConfig) -> TorchSession:
        return TorchSession(folder, scenario, torch_device)

    return Engine(
        "torch",
        measured=True,
        facts=facts,
        serve=serve,
        probe=serve,
        makes_weights=torch_device.type == "cuda",
        gpu=gpu_index(device),
    )


class FixedLayer(DynamicLayer):
    """One layer's keys and values in memory that is taken once and written at `position`.

    Nothing grows or is copied from step to step, and a layer that does not run in a step still has
    its place in the cache.
    """

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length, self.position = length, 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values [B, K, new, d]; all so far [B, K, position + new, d]."""
        B, K, new, d = key_states.shape
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = key_states.new_zeros(2, B, K, self.length, d)
            self.is_initialized = True
        assert self.keys is not None and self.values is not None
        end = self.position + new
        self.keys[:, :, self.position : end] = key_states
        self.values[:, :, self.position : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.position


class TorchSession:
    """A child or a parent loaded in this process; greedy decoding, the whole batch in step."""

    def __init__(self, folder: Path, scenario: ScenarioConfig, device: torch.device) -> None:
        if scenario.tensor_parallel > 1:
            raise UserError(
                "cost.engine: torch serves on one device; got tensor_parallel="
                f"{scenario.tensor_parallel}, use vllm"
            )
        self.device, self.folder, self.scenario, self.batches = device, folder, scenario, 0
        self._load()
        self.pages = [_page(layer) for layer in self.layers]

    def _load(self) -> None:
        dtype = getattr(torch, self.scenario.dtype) if self.scenario.dtype != "auto" else None
        if not any(self.folder.glob("*.safetensors")):
            config = PuzzleConfig.from_pretrained(self.folder)
            weights = child.RandomWeights(config, self.device)
            stored = child.stored_dtype(config)
            self.model = child.build(config, weights, dtype or stored, self.device)
        elif (self.folder / "architecture.json").exists():
            self.model = child.load(self.folder, dtype, self.device)
        else:
            described = parent.describe(str(self.folder))
            self.model = described.load(dtype or described.dtype, self.device)
        self.layers = list(self.model.model.layers)

    @property
    def first_tokens(self) -> list[float]:
        """All at once; see `Session`."""
        return [1.0] * self.scenario.batch_size

    def memory_bytes(self) -> None:
        """Unknown: several models share this process; see `Session`."""

    def restart(self) -> None:
        """Load the model anew; see `Session`."""
        del self.model, self.layers
        self._load()

    def __enter__(self) -> "TorchSession":
        return self

    def __exit__(self, *exception: object) -> None:
        del self.model, self.layers

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def begin(self, scenario: ScenarioConfig) -> None:
        """Start a batch; see `Session`."""
        self.batches += 1
        prompts = random_prompts(scenario, self.model.config.vocab_size, self.batches)
        self.tokens = torch.tensor(prompts, device=self.device)
        length = scenario.input_length + scenario.output_length
        self.layer_caches = [FixedLayer(length) for _ in self.layers]

    @torch.inference_mode()
    def advance(self, steps: int, layers: Sequence[int] = ()) -> list[float]:
        """Take steps of the batch; see `Session`."""
        if layers:
            active = [self.layers[index] for index in layers]
            self.model.model.layers = torch.nn.ModuleList(active)
        cache = Cache(layers=list(self.layer_caches))
        clock = [self._clock()]
        for _ in range(steps):
            output = self.model(
                self.tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            for layer_cache in self.layer_caches:
                layer_cache.position += self.tokens.shape[1]
            self.tokens = output.logits[:, -1].argmax(-1, keepdim=True)
            clock.append(self._clock())
        return [after - before for before, after in itertools.pairwise(clock)]


def _page(layer: torch.nn.Module) -> Page:
    """The cache of one token in a layer."""
    keys = getattr(layer.self_attn, "k_proj", None)
    if keys is None:
        return Page(1, 0)
    return Page(1, 2 * keys.weight.shape[0] * keys.weight.element_size())
