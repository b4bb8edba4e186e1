"""Where this process computes and how precisely: one object for device, dtypes and memory."""

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from puzzle.errors import UserError, reason

# On CPUs plain matrix products beat the fused kernel up to here (benchmarks/attention.py).
EAGER_UP_TO_TOKENS = 128
EFFICIENCY = 0.4  # the share of the rate of matrix products that whole training steps reach
USABLE = 0.92  # of memory: contexts of drivers, gaps between allocations and others take the rest
# What matrix products reach of the peak of a data sheet: 650 of an H100's 989 TFLOP/s.
PRODUCTS = 0.66
# What transfers reach of a link's peak, for large messages.
TRANSFERS = 0.7

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Placement:
    """How a frozen model is loaded."""

    dtype: torch.dtype
    device: torch.device
    attention: str  # transformers' name of the attention implementation


@dataclass(frozen=True)
class Memory:
    """What one device has, and its host; with `is_shared` they are the same memory."""

    device_bytes: int
    host_bytes: int  # of one machine
    devices: int = 1  # of this kind, on all machines together
    machines: int = 1
    is_shared: bool = False

    def lacks(self, device_bytes: float, host_bytes: float) -> str:
        """What is too small for so much on the device and beside it; empty where it fits."""
        if self.is_shared:
            device_bytes, host_bytes = device_bytes + host_bytes, 0
        pairs = {
            "device": (device_bytes, self.device_bytes),
            "host": (host_bytes, self.host_bytes),
        }
        for name, (needed, there) in pairs.items():
            if needed > USABLE * there:
                return (
                    f"{needed / 2**30:.1f} GiB of the {name}'s memory are needed, of "
                    f"{there / 2**30:.1f} GiB {USABLE * there / 2**30:.1f} can be used"
                )
        return ""


@dataclass(frozen=True)
class Sheet:
    """Devices that need not be here, to plan for: peaks by `engines/devices.yaml`, per second."""

    name: str
    memory: Memory
    flops: float  # of bf16 products
    network_bytes: float  # sent by a device to others, of its machine or of several
    link_bytes: float  # between a device and its host, one direction
    disk_bytes: float  # of the machine's disk, for each device


@dataclass(frozen=True)
class Device:
    """A torch device, and whether matrix products run in bfloat16 over float32 weights."""

    torch_device: torch.device
    bfloat16: bool
    planned: "Sheet | None" = None  # of a device that is only planned for

    @classmethod
    def of_sheet(cls, sheet: "Sheet") -> "Device":
        """A device that need not be here, to plan for."""
        return cls(torch.device("cpu" if sheet.memory.is_shared else "cuda"), True, sheet)

    @classmethod
    def choose(cls, name: str, precision: Precision) -> "Device":
        """The device of a recipe. Raises `UserError` for one that does not work here.

        `auto` is a GPU where there is one, and never the CPU beside a GPU that does not work.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
            if name == "cpu" and (unusable := unusable_gpu()):
                raise UserError(f"device auto: {unusable}; or compute without it: device=cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(
                f"device: got {name!r}, expected auto, cpu, cuda or cuda:NUMBER"
            ) from None
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device {name!r}: {reason(error)}; use device=auto or device=cpu"
            ) from None
        is_half = multiplies_in_bfloat16(device) if precision == "auto" else precision == "bfloat16"
        return cls(device, is_half)

    @property
    def type(self) -> str:
        """`cpu` or `cuda`."""
        return self.torch_device.type

    @property
    def has_bfloat16(self) -> bool:
        """Whether its hardware multiplies in bfloat16; an older CPU does it in software."""
        return multiplies_in_bfloat16(self.torch_device)

    def autocast(self) -> torch.autocast:
        """The context in which models compute."""
        return torch.autocast(self.type, torch.bfloat16, enabled=self.bfloat16)

    def attention_for(self, length: int) -> str:
        """The attention implementation for sequences of `length` tokens."""
        return "eager" if self.type == "cpu" and length <= EAGER_UP_TO_TOKENS else "sdpa"

    def frozen(self, dtype: torch.dtype, length: int) -> Placement:
        """How a frozen model of a checkpoint's `dtype` is loaded, for sequences of `length` tokens.

        It keeps its dtype on GPUs under autocast and is float32 elsewhere.
        """
        keeps = self.type == "cuda" and self.bfloat16
        return Placement(
            dtype if keeps else torch.float32, self.torch_device, self.attention_for(length)
        )

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, pinned where it comes from a GPU.

        From a GPU it is still being written when this returns: only that GPU may read it, or the
        host after a synchronisation.
        """
        if tensor.device.type != "cuda":
            return tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def fetched(self, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Tensors on the device, one after the other; on a GPU the next comes meanwhile."""
        if self.type != "cuda" or not tensors or tensors[0].is_cuda:
            yield from (tensor.to(self.torch_device) for tensor in tensors)
            return
        stream, main = torch.cuda.Stream(self.torch_device), torch.cuda.current_stream()
        stream.wait_stream(main)  # which may still be writing them

        def fetch(index: int) -> torch.Tensor:
            with torch.cuda.stream(stream):
                return tensors[index].to(self.torch_device, non_blocking=True)

        coming = fetch(0)
        for index in range(len(tensors)):
            main.wait_stream(stream)
            here = coming
            if index + 1 < len(tensors):
                coming = fetch(index + 1)
            here.record_stream(main)
            yield here

    @cached_property
    def memory(self) -> "Memory":
        """What one device and its host have; the same all the time, whatever is in use."""
        if self.planned is not None:
            return self.planned.memory
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.type == "cuda":
            gpu = torch.cuda.get_device_properties(self.torch_device).total_memory
            return Memory(gpu, host, torch.cuda.device_count())
        return Memory(host, host, is_shared=True)

    @property
    def memory_bytes(self) -> int:
        """What the device has: a GPU's memory, or this machine's."""
        return self.memory.device_bytes

    @cached_property
    def training_flops_per_s(self) -> float:
        """What training steps reach, from a square matrix product measured now (best of four).

        For a device that is not here, from the peak on its sheet.
        """
        if self.planned is not None:
            return EFFICIENCY * PRODUCTS * self.planned.flops
        size = 1024 if self.type == "cpu" else 8192
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        a = torch.randn(size, size, device=self.torch_device, dtype=dtype)
        best_s = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            (a @ a).sum().item()
            best_s = min(best_s, time.perf_counter() - began)
        return EFFICIENCY * 2 * size**3 / best_s


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether its hardware does; an older CPU does it in software."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda"


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor from which a GPU copies while it computes; any other tensor as it is."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor


def unusable_gpu() -> str | None:
    """Why torch cannot use the NVIDIA GPU that this machine has; None where it has none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or not (gpu := _nvidia_gpu()):
        return None
    if torch.version.cuda is None:
        return (
            f"there is a GPU ({gpu}), but torch {torch.__version__} is a build without CUDA; "
            "install one with it (README.md, Install)"
        )
    try:
        torch.cuda.init()
        why = "torch does not see it"
    except (RuntimeError, AssertionError) as error:
        why = reason(error).split(". Please")[0]
    return f"there is a GPU ({gpu}), but torch {torch.__version__} cannot use it: {why}"


def _nvidia_gpu() -> str:
    """The name of the first GPU that the driver lists; empty where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return listed.stdout.split("\n")[0].strip() if listed.returncode == 0 else ""


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers: training steps on CPUs become 1.3x faster.

    By default every activation of more than 128 KiB to 32 MiB is mapped anew, and its pages are
    zeroed on first touch. Called once by whatever owns the process (the command line).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most glibc accepts
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Give what is free back to the system, where memory matters more than speed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
