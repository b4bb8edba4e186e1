"""No hardware at all: seconds from FLOPs and bytes against a device sheet, modelled, not measured.

A step over T tokens takes, per subblock, max(FLOPs / peak, bytes / bandwidth); bytes are the
weights once and the KV cache read by attention, of which a sliding window reads and keeps its own
tokens only. The sheets are in `devices.yaml` beside this file, with what `puzzle plan` needs
besides; `cost.device_sheet` may also be the path of a user's own file with the same keys for one
device.
"""

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import JsonValue

from puzzle import settings
from puzzle.config import ScenarioConfig
from puzzle.engines import Engine, EngineFacts, Page, cache_bytes
from puzzle.errors import UserError
from puzzle.model import child, parent
from puzzle.model.architecture import Architecture, Attention, Block, Subblock
from puzzle.model.modeling_puzzle import PuzzleConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KEYS = ("flops_per_s", "bytes_per_s", "step_overhead_s")
PLAN_KEYS = (
    *KEYS,
    "memory_bytes",
    "host_bytes",
    "devices",
    "interconnect_bytes_per_s",
    "network_bytes_per_s",
    "host_link_bytes_per_s",
    "disk_bytes_per_s",
)
MAY_BE_ZERO = ("step_overhead_s", "host_bytes")


def make(device_sheet: str) -> Engine:
    """The engine for the device of a sheet. Raises `UserError` for an unknown sheet."""
    figures = sheet(device_sheet)

    def serve(folder: Path, scenario: ScenarioConfig) -> RooflineSession:
        return RooflineSession(folder, scenario, figures)

    facts = EngineFacts(engine="roofline", version="1", device=device_sheet, count=1, sheet=figures)
    return Engine("roofline", measured=False, facts=facts, serve=serve, probe=serve)


def sheet(
    name: str, keys: Sequence[str] = KEYS, setting: str = "cost.device_sheet"
) -> dict[str, float]:
    """The figures of a device by its name, or by the path of a file.

    Raises `UserError` for an unknown one, and for a file without these keys.

    Args:
        name: of a device in `devices.yaml`, or of a user's own file.
        keys: which figures are wanted: `KEYS` for the engine, `PLAN_KEYS` for plans.
        setting: what is named where the file is wrong.
    """
    text = (files("puzzle") / "engines" / "devices.yaml").read_text(encoding="utf-8")
    sheets: dict[str, dict[str, float]] = yaml.safe_load(text)
    path = Path(name)
    if name not in sheets and not path.is_file():
        raise UserError(
            f"{setting}: got {name!r:.80}; expected one of {', '.join(sheets)}, or a YAML file "
            f"with the keys {', '.join(keys)}"
        )
    values = sheets[name] if name in sheets else settings.read_yaml(path, setting)
    missing = [key for key in keys if key not in values]
    unknown = [key for key in values if key not in PLAN_KEYS]
    if missing or unknown:
        wrong = f"no {', '.join(missing)}" if missing else f"unknown key {unknown[0]!r:.80}"
        raise UserError(f"{setting} {name}: {wrong}; expected the keys {', '.join(keys)}")
    figures = {key: _figure(values[key]) for key in keys}
    for key, figure in figures.items():
        if not math.isfinite(figure) or figure < 0 or (figure == 0 and key not in MAY_BE_ZERO):
            raise UserError(
                f"{setting} {name}: {key}: got {values[key]!r:.80}; expected a number above 0"
            )
    return figures


def _figure(value: JsonValue) -> float:
    """A number, also of a text such as 1e12, as which YAML reads it; NaN for anything else."""
    try:
        return float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return math.nan


class RooflineSession:
    """A checkpoint on a modelled device."""

    def __init__(
        self, folder: Path, scenario: ScenarioConfig, device_sheet: dict[str, float]
    ) -> None:
        if (folder / "architecture.json").exists():
            config = PuzzleConfig.from_pretrained(folder)
            self.architecture = child.read_architecture(folder)
            blocks = config.block_configs or []
            windows = [block.attention.get("window_length") for block in blocks]
            self.shape = parent.shape(config, self.architecture, windows)
            dtype = child.stored_dtype(config)
        else:
            described = parent.describe(str(folder))
            self.architecture = Architecture.of_parent(described.shape)
            self.shape, dtype = described.shape, described.dtype
        self.sheet = device_sheet
        stored = str(dtype).removeprefix("torch.")
        self.element_bytes = BYTES.get(stored if scenario.dtype == "auto" else scenario.dtype, 4)
        self.devices = scenario.tensor_parallel
        self.windows = self.shape.windows or (None,) * len(self.architecture)
        self.layers = list(range(len(self.architecture)))
        self.scenario, self.step = scenario, 0
        self.pages = [
            Page(1, self._cached_bytes(block), window)
            for block, window in zip(self.architecture, self.windows, strict=True)
        ]

    def __enter__(self) -> "RooflineSession":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def _copies(self, attention: Attention) -> float:
        """In how many devices every KV head is: all devices have at least one of each layer."""
        return max(1.0, self.devices / (attention.kv_heads or self.devices))

    def _cached_bytes(self, block: Block) -> int:
        """The keys and values of a token in a layer, on all devices together."""
        elements = self._copies(block.attention) * self.shape.kv_elements_per_token(block)
        return int(elements * self.element_bytes)

    def _seconds(
        self, parameters: int, tokens: int, cache_elements: float, attention_flops: float
    ) -> float:
        flops = 2 * parameters * tokens + attention_flops
        moved_bytes = self.element_bytes * (parameters + cache_elements)
        compute_s, memory_s = (
            flops / self.sheet["flops_per_s"],
            moved_bytes / self.sheet["bytes_per_s"],
        )
        return max(compute_s, memory_s) / self.devices

    def _subblock(self, variant: Subblock, batch: int, new: int, seen: "Seen") -> float:
        """One step: `new` tokens per sequence."""
        shape = self.shape
        if variant.kind == "no_op":
            return 0.0
        cache = batch * seen.keys * shape.kv_elements_per_token(variant)
        attention = 0.0
        if isinstance(variant, Attention) and variant.kind == "gqa":
            attention = 4.0 * batch * seen.pairs * shape.num_attention_heads * shape.head_dim
        return self._seconds(shape.parameters(variant), batch * new, cache, attention)

    @property
    def first_tokens(self) -> list[float]:
        """All at once; see `Session`."""
        return [1.0] * self.scenario.batch_size

    def memory_bytes(self) -> int:
        """Weights and KV cache; see `Session`."""
        parameters = self.architecture.parameters(self.shape)
        return parameters * self.element_bytes + cache_bytes(self.pages, self.scenario)

    def restart(self) -> None:
        """Nothing is started; see `Session`."""

    def begin(self, scenario: ScenarioConfig) -> None:
        """Start a batch; see `Session`."""
        self.scenario, self.step = scenario, 0

    def advance(self, steps: int, layers: Sequence[int] = ()) -> list[float]:
        """Take steps of the batch; see `Session`.

        Every decode step counts as the mean of all.
        """
        self.layers = list(layers) or self.layers
        seconds = []
        for _ in range(steps):
            seconds.append(self._step(self.scenario.input_length if self.step == 0 else 1))
            self.step += 1
        return seconds

    def _step(self, new: int) -> float:
        batch = self.scenario.batch_size
        head = self.shape.vocab_size * self.shape.hidden_size
        total_s = self._seconds(head, batch, 0, 0) + self.sheet["step_overhead_s"]
        of_step = Seen.of_prefill if self.step == 0 else Seen.of_decode
        seen = {window: of_step(self.scenario, window) for window in set(self.windows)}
        for index in self.layers:
            for half in self.architecture.blocks[index].subblocks:
                total_s += self._subblock(half, batch, new, seen[self.windows[index]])
        return total_s


class Seen(NamedTuple):
    """What the attention of a step looks at in one sequence."""

    keys: float  # that are read
    pairs: float  # of queries and keys

    @classmethod
    def of_prefill(cls, scenario: ScenarioConfig, window: int | None) -> "Seen":
        """Every token of the input looks at itself and those before it, within the window."""
        length = scenario.input_length
        beyond = max(0, length - (window or length))  # tokens that see exactly a window
        first = length - beyond
        return cls(length, first * (first + 1) / 2 + beyond * (window or 0))

    @classmethod
    def of_decode(cls, scenario: ScenarioConfig, window: int | None) -> "Seen":
        """The mean over the output's steps; without a window the one in the middle."""
        start, count = scenario.input_length, scenario.output_length
        keys = start + count / 2 + 1
        if window is not None:
            within = min(count, max(0, window - start))  # steps that see all that there is
            all_of_them = within * (start + (within + 1) / 2)
            keys = min(keys, (all_of_them + (count - within) * window) / count)
        return cls(keys, keys)
