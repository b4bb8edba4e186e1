"""No hardware at all: seconds from FLOPs and bytes against a device sheet. Every figure is
modelled, not measured.

A step over T tokens takes, per subblock, max(FLOPs / peak, bytes / bandwidth); bytes are the
weights once and the KV cache read by attention. The sheets are in `devices.yaml` beside this file;
`cost.device_sheet` may also be the path of a user's own file with the same keys.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from puzzle.config import ScenarioConfig
from puzzle.engines import Timing
from puzzle.errors import UserError
from puzzle.model import child, parent
from puzzle.model.architecture import Architecture, Attention, Subblock
from puzzle.model.modeling_puzzle import PuzzleConfig

NAME, MEASURED = "roofline", False
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def available() -> str | None:
    return None


def sheet(name: str) -> dict[str, float]:
    """`flops_per_s`, `bytes_per_s`, `step_overhead_s` of a device. Raises `UserError` for an
    unknown one.
    """
    sheets = yaml.safe_load(
        (files("puzzle") / "engines" / "devices.yaml").read_text(encoding="utf-8")
    )
    if name in sheets:
        return sheets[name]
    path = Path(name)
    own = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    keys = {"flops_per_s", "bytes_per_s", "step_overhead_s"}
    if not isinstance(own, dict) or set(own) != keys:
        raise UserError(
            f"cost.device_sheet: got {name!r}; expected one of {', '.join(sheets)}, or a YAML file with {sorted(keys)}"
        )
    try:
        return {key: float(value) for key, value in own.items()}  # YAML reads 1e12 as text
    except (TypeError, ValueError):
        raise UserError(
            f"cost.device_sheet {name}: every value must be a number; got {own}"
        ) from None


def describe(device_sheet: str) -> dict[str, Any]:
    return {"engine": NAME, "version": "1", "device": device_sheet, **sheet(device_sheet)}


class RooflineSession:
    def __init__(self, folder: Path, scenario: ScenarioConfig, device_sheet: str) -> None:
        if (folder / "architecture.json").exists():
            config = PuzzleConfig.from_pretrained(folder)
            self.architecture, self.shape, dtype = (
                child.read_architecture(folder),
                parent.shape(config),
                config.dtype,
            )
        else:
            served = parent.describe(str(folder), trust_remote_code=True)
            self.architecture, self.shape, dtype = (
                Architecture.of_parent(served.shape),
                served.shape,
                served.dtype,
            )
        self.sheet = sheet(device_sheet)
        name = str(dtype).removeprefix("torch.") if scenario.dtype == "auto" else scenario.dtype
        self.bytes, self.devices = BYTES.get(name, 4), scenario.tensor_parallel
        kv = [self.shape.kv_elements_per_token(block.attention) for block in self.architecture]
        self.pages = [(1, elements * self.bytes) for elements in kv]

    def __enter__(self) -> "RooflineSession":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def _seconds(
        self, parameters: int, tokens: int, cache_elements: float, attention_flops: float
    ) -> float:
        flops = 2 * parameters * tokens + attention_flops
        moved = self.bytes * (parameters + cache_elements)
        return (
            max(flops / self.sheet["flops_per_s"], moved / self.sheet["bytes_per_s"]) / self.devices
        )

    def _subblock(self, variant: Subblock, batch: int, new: int, context: float) -> float:
        """One step: `new` tokens per sequence, `context` earlier tokens to attend to (a mean)."""
        shape = self.shape
        if variant.kind == "no_op":
            return 0.0
        cache = batch * (context + new) * shape.kv_elements_per_token(variant)
        real = isinstance(variant, Attention) and variant.kind == "gqa"
        width = shape.num_attention_heads * shape.head_dim
        attention = 4.0 * batch * new * (context + (new + 1) / 2) * width if real else 0.0
        return self._seconds(shape.parameters(variant), batch * new, cache, attention)

    def time_batch(self, scenario: ScenarioConfig, layers: Sequence[Sequence[int]] = ()) -> Timing:
        """Every decode step counts as one at the middle of the output: attention grows linearly
        with the context.
        """
        B, I, O = scenario.batch_size, scenario.input_length, scenario.output_length  # noqa: E741
        head = (
            self._seconds(self.shape.vocab_size * self.shape.hidden_size, B, 0, 0)
            + self.sheet["step_overhead_s"]
        )

        def step(chosen: Sequence[int], new: int, context: float) -> float:
            blocks = [self.architecture.blocks[index] for index in chosen]
            return head + sum(
                self._subblock(v, B, new, context) for b in blocks for v in (b.attention, b.ffn)
            )

        plans = layers or [range(len(self.architecture))]
        decode = [step(chosen, 1, I + O / 2) for chosen in plans[1:O] or plans[:1]]
        steps = [decode[min(index, len(decode) - 1)] for index in range(O - 1)]
        return Timing(step(plans[0], I, 0), tuple(steps))


def open_session(
    folder: Path, scenario: ScenarioConfig, log: Path, device_sheet: str, probe: bool
) -> RooflineSession:
    return RooflineSession(folder, scenario, device_sheet)
