"""Fake CUDA: tensors on `cuda` compute nothing, all else is real; what a GPU would notice is noted.

A tensor on `cuda` is a fake tensor: shapes, dtypes, strides and devices, no data. Tensors on the
CPU are real, and what comes back from the device has made-up contents (ones, or zeros where they
are integers), so that a whole run goes through its files. An operator that mixes devices fails as
it would on a GPU. Noted, by the line of Puzzle that did it: host synchronisations, copies between
host and device, operators that touch many bytes, live bytes of the device.

Not covered: kernels, numerics, speed, NCCL, vLLM's own runner.
"""

import collections
import contextlib
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SOURCES = str(Path(__file__).parents[2] / "src" / "puzzle") + "/"
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks") + "/"
DEVICE_BYTES = 80 << 30
LARGE_HOST = 1 << 20  # elements: copies to the host beyond it stay uninitialised, untouched pages
DEVICE = torch.device("cuda", 0)
# cudaErrors are looked for, sizes are data: the host waits for the device
SYNCHRONISES = {"_local_scalar_dense", "is_nonzero", "_linalg_check_errors"}
DATA_DEPENDENT = {"nonzero", "masked_select", "unique_dim", "_unique2", "_unique", "equal"}
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze",
    "squeeze", "detach", "alias", "split", "split_with_sizes", "as_strided", "unbind", "reshape",
    "_reshape_alias", "lift_fresh", "empty", "empty_strided", "empty_like", "new_empty",
    "new_empty_strided", "unflatten", "diagonal", "set_",
}  # fmt: skip


def place() -> str:
    """`file.py:line function` of the innermost line of ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for root in (SOURCES, BENCHMARKS):
            if name.startswith(root):
                file = name.removeprefix(root)
                return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


class FakeCuda(TorchDispatchMode):
    """What happens on the device while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, int]
        self.sizes = weakref.WeakKeyDictionary()
        self.live_bytes = self.peak_bytes = 0
        self.operators = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; the peak is what is alive now."""
        self.peak_bytes = self.live_bytes
        self.syncs: collections.Counter[str] = collections.Counter()
        # copies to the device of anything but token ids and masks, whose bytes do not matter
        self.unpinned: collections.Counter[str] = collections.Counter()
        self.unpinned_bytes: collections.Counter[str] = collections.Counter()
        self.largest: dict[str, int] = {}  # bytes of an operator that is no product, by its place

    # -------------------------------------------------------------------------------- dispatch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled: leaves out a wrapper around every operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [t for t in tensors if t.device.type == "cuda"]
        target = kwargs.get("device")
        target = torch.device(target) if target is not None else None
        if target is not None and target.type == "cuda":
            kwargs["device"] = DEVICE
        elif not on_device:
            return self._on_host(func, args, kwargs)
        self.operators += 1
        if name in SYNCHRONISES:
            self.syncs[place()] += 1
            return None if name == "_linalg_check_errors" else _made_up_number(args[0])
        if name in DATA_DEPENDENT:
            self.syncs[place()] += 1
            if name == "equal":
                return True
        if on_device and target is not None and target.type == "cpu":
            return self._to_host(args[0], kwargs)
        if name == "copy_" and args[0].device.type == "cpu":
            self._wait((args[2:] and args[2]) or kwargs.get("non_blocking"), args[0])
            return args[0]
        if name in ("_to_copy", "copy_"):
            self._to_device(args[0] if name == "_to_copy" else args[1], name, args, kwargs)
        with self.fake:
            if len(on_device) < len(tensors):
                args, kwargs = tree_map_only(torch.Tensor, _faked, (args, kwargs))
            out = func(*args, **kwargs)
        self._note(name, on_device, out)
        return out

    def _on_host(self, func, args, kwargs):
        pinned = bool(kwargs.pop("pin_memory", False))
        out = func(*args, **kwargs)
        if pinned:
            self.pinned.add(out.untyped_storage())
        return out

    def _to_host(self, source: torch.Tensor, kwargs) -> torch.Tensor:
        out = made_up(source.shape, kwargs.get("dtype") or source.dtype)
        self._wait(False, out)  # the new tensor is not pinned
        return out

    def _wait(self, non_blocking: object, host: torch.Tensor) -> None:
        if not (non_blocking and host.untyped_storage() in self.pinned):
            self.syncs[place()] += 1

    def _to_device(self, source: torch.Tensor, name: str, args, kwargs) -> None:
        if source.device.type != "cpu" or source.dim() == 0:
            return
        if source.is_floating_point() and source.untyped_storage() not in self.pinned:
            where = place()
            self.unpinned[where] += 1
            self.unpinned_bytes[where] += source.numel() * source.element_size()

    # ---------------------------------------------------------------------------------- figures

    def _note(self, name: str, inputs: list[torch.Tensor], out: object) -> None:
        outputs = [t for t in tree_leaves(out) if isinstance(t, FakeTensor)]
        for tensor in outputs:
            self._track(tensor)
        if name in VIEWS or name in PRODUCTS or "attention" in name:
            return
        touched = {id(t): t.numel() * t.element_size() for t in (*inputs, *outputs)}
        where, size = place(), sum(touched.values())
        if name.startswith(("embedding", "index", "gather", "scatter")):  # touch rows, not tables
            size = 2 * sum(t.numel() * t.element_size() for t in outputs)
        self.largest[where] = max(self.largest.get(where, 0), size)

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage in self.sizes:
            return
        size = storage.nbytes()
        self.sizes[storage] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live_bytes -= size


def _faked(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor beside device tensors, as a fake one: its device is checked, not its data."""
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def made_up(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A host tensor with contents nobody computed."""
    if shape.numel() > LARGE_HOST:
        return torch.empty(shape, dtype=dtype)
    return (
        torch.ones(shape, dtype=dtype)
        if dtype.is_floating_point
        else torch.zeros(shape, dtype=dtype)
    )


def _made_up_number(tensor: torch.Tensor) -> bool | float | int:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 0


# ------------------------------------------------------------------------------- the rest of torch


def _tolist(tensor: torch.Tensor) -> object:
    """A list comes by one copy, not by one per number."""
    return tensor.cpu().tolist() if tensor.device.type == "cuda" else _TOLIST(tensor)


def _tensor(data: object, *, device: object = None, **kwargs) -> torch.Tensor:
    """`torch.tensor`, which would look for a real device."""
    if device is None or torch.device(device).type != "cuda":
        return _TENSOR(data, device=device, **kwargs)
    return _TENSOR(data, device="cpu", **kwargs).to(device)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch chooses on a recent GPU: flash without a mask, memory-efficient with one.

    On a CPU-only build it would find no kernel and take the mathematical definition, whose
    probabilities fill the memory.
    """
    if not isinstance(query, FakeTensor):
        return _ATTENTION(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        raise RuntimeError("Expected query, key, and value to have the same dtype")
    kernels, half = torch.ops.aten, query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and half and query.shape[-1] <= 256:
        flash = kernels._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    bias = None
    if attn_mask is not None:
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient = kernels._scaled_dot_product_efficient_attention
    needs_sum = torch.is_grad_enabled() and query.requires_grad
    return efficient(query, key, value, bias, needs_sum, dropout_p, is_causal, scale=scale)[0]


class _RmsNorm(torch.autograd.Function):
    """As CUDA's one kernel, which keeps its input; a CPU-only build takes it apart."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * (1 if weight is None else weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        return grad * x, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _Silu(torch.autograd.Function):
    """One kernel forward and one backward, where a CPU-only build has none for the latter."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


def _rms_norm(
    x: torch.Tensor,
    normalized_shape: object,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    if not isinstance(x, FakeTensor):
        return _RMS_NORM(x, normalized_shape, weight, eps)
    if torch.is_autocast_enabled("cuda"):  # one of the functions that it runs in float32
        x, weight = x.float(), None if weight is None else weight.float()
    return _RmsNorm.apply(x, weight)


def _silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    return _Silu.apply(x) if isinstance(x, FakeTensor) else _SILU(x, inplace)


def _apply(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, which would swap the contents of parameters in place: puts new ones."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                moved = function(parameter.detach())
                owner._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else function(buffer)
    return module


_TENSOR = torch.tensor
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_RMS_NORM, _SILU = torch.nn.functional.rms_norm, torch.nn.functional.silu
_TOLIST = torch.Tensor.tolist
_GENERATOR = torch.Generator


class _Stream:
    """Streams and events order kernels; there are none."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = DEVICE

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Everything on `cuda` is fake inside. `shim.load` must have come before torch."""
    import torch.amp.autocast_mode
    import torch.cuda.amp.common

    _device_constructors()  # remembers `torch.tensor` itself, not what replaces it here
    mode = FakeCuda()
    properties = types.SimpleNamespace(
        name="fake", total_memory=DEVICE_BYTES, multi_processor_count=132, major=9, minor=0
    )

    def pin(tensor: torch.Tensor, *args: object) -> torch.Tensor:
        copy = tensor.clone()
        mode.pinned.add(copy.untyped_storage())
        return copy

    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_name": lambda *a: "fake",
        "get_device_capability": lambda *a: (9, 0),
        "get_device_properties": lambda *a: properties,
        "mem_get_info": lambda *a: (DEVICE_BYTES - mode.live_bytes, DEVICE_BYTES),
        "max_memory_allocated": lambda *a: mode.peak_bytes,
        "max_memory_reserved": lambda *a: mode.peak_bytes,
        "memory_allocated": lambda *a: mode.live_bytes,
        "reset_peak_memory_stats": lambda *a: mode.reset(),
        "synchronize": lambda *a: None,
        "empty_cache": lambda: None,
        "set_device": lambda *a: None,
        "_lazy_init": lambda: None,
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: _Stream(),
        "current_stream": lambda *a: _Stream(),
        "default_stream": lambda *a: _Stream(),
        "initial_seed": lambda: 0,
        "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *a: None,
        "manual_seed_all": lambda seed: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        autocast = torch.amp.autocast_mode
        stack.enter_context(
            mock.patch.object(autocast, "amp_definitely_not_available", lambda: False, create=True)
        )
        stack.enter_context(
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        )
        stack.enter_context(
            mock.patch.object(torch, "Generator", lambda device="cpu": _GENERATOR("cpu"))
        )
        stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        kernels = {
            "scaled_dot_product_attention": _attention,
            "rms_norm": _rms_norm,
            "silu": _silu,
        }
        stack.enter_context(mock.patch.multiple(torch.nn.functional, **kernels))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin))
        stack.enter_context(
            mock.patch.object(
                torch.Tensor, "is_pinned", lambda t, *a: t.untyped_storage() in mode.pinned
            )
        )
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda t, s: None))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", _tolist, create=True))
        stack.enter_context(mode)
        yield mode
