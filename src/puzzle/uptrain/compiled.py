"""Layers compiled by torch.compile while the child learns, where that pays.

What surrounds the matrix products of a layer (norms, rotary embedding, gating) becomes a few fused
loops. On two CPU cores the embedded parent's child learns 1.3 times as fast after a minute
of compiling, one program for every shape of block (benchmarks/compile.py). So `auto` compiles
long uptrainings on CPUs with a C++ compiler. On GPUs, where it has not been tried, and in several
processes it has to be asked for.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from puzzle.errors import UserError
from puzzle.stage import Job
from puzzle.uptrain.gkd import Pair

PAYS_FROM_FLOPS = 1e14  # of the whole uptraining, on a CPU
MOST_PROGRAMS = 256  # for one layer's code: by shapes of blocks, and with and without gradients


def has_compiler() -> bool:
    """Whether torch finds a C++ compiler, which it needs on CPUs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def is_wanted(job: Job, flops: float, processes: int) -> bool:
    """What the recipe says, or else whether it pays."""
    asked = job.child.uptrain.compile
    if asked != "auto":
        return asked
    return (
        job.run.device.type == "cpu"
        and processes == 1
        and flops >= PAYS_FROM_FLOPS
        and has_compiler()
    )


def check(job: Job) -> None:
    """Raises `UserError` where compiling is asked for and cannot be done."""
    if job.child.uptrain.compile is True and job.run.device.type == "cpu" and not has_compiler():
        raise UserError(
            "uptrain.compile: got true, but torch finds no C++ compiler; install one (g++) or set "
            "it to auto"
        )


@contextlib.contextmanager
def layers(pair: Pair) -> Iterator[None]:
    """Child's and parent's layers are compiled when they first run, and as they were afterwards."""
    models = (pair.child.model.layers, pair.parent.model.layers)
    compiled: list[nn.Module] = list(itertools.chain(*models))
    for layer in compiled:
        layer.compile(dynamic=False)
    limits = {"recompile_limit": MOST_PROGRAMS, "accumulated_recompile_limit": 4 * MOST_PROGRAMS}
    try:
        with torch._dynamo.config.patch(limits):
            yield
    finally:
        for layer in compiled:
            layer._compiled_call_impl = None
