"""A stage in one of several processes, with all that it allocates counted: gloo, on CPUs."""

import faulthandler
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

from puzzle import pipeline
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Job
from puzzle.training import sharding
from puzzle.uptrain.trainer import Trainer


def peak_bytes(do: Callable[[], None]) -> int:
    """The most that is alive at a time of what is allocated meanwhile, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        do()
    changes, events = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    alive = peak = 0
    for _, size in sorted(changes):
        alive += size
        peak = max(peak, alive)
    return peak


class Sent:
    """What this process sends while a step of uptraining is taken, by the size of collectives."""

    def __init__(self) -> None:
        self.bytes, self.counts = 0.0, False

    def counting(self, collective: Callable[..., object], whole: int) -> Callable[..., object]:
        """The collective, counted; argument number `whole` is the tensor of all processes."""
        names = ("output_tensor", "output", "input_tensor", "input")[2 * whole :][:2]

        def call(*args, **kwargs):
            if self.counts:
                given = [kwargs[name] for name in names if name in kwargs]
                tensor = given[0] if given else args[whole]
                size = distributed.get_world_size()
                self.bytes += tensor.nbytes * (size - 1) / size
            return collective(*args, **kwargs)

        return call

    def step(self, original: Callable[..., object]) -> Callable[..., object]:
        """A step, in which is counted."""

        def call(*args, **kwargs):
            self.counts = True
            try:
                return original(*args, **kwargs)
            finally:
                self.counts = False

        return call


def worker(rank: int, size: int, folder: Path, stage: str, out: Path) -> None:
    """Do a stage's work as one of `size` processes; write what was alive and what was sent."""
    faulthandler.enable()
    torch.set_num_threads(1)
    rendezvous = f"file://{out}.rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    sent = Sent()
    names = ("all_gather_single", "reduce_scatter_single")
    if not hasattr(distributed, names[0]):  # before torch 2.13
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
    gather, scatter = (getattr(distributed, name) for name in names)
    run = Run.open(folder, Progress(quiet=True))
    work = next(one for one in pipeline.STAGES if one.name == stage)
    job = Job(run) if stage in ("library", "score") else run.child_job("main")
    with (
        mock.patch.object(distributed, names[0], sent.counting(gather, 0)),
        mock.patch.object(distributed, names[1], sent.counting(scatter, 1)),
        mock.patch.object(Trainer, "_step", sent.step(Trainer._step)),
    ):
        peak = peak_bytes(lambda: work.work().execute(job, job.folder(work)))
    shown = {"peak": peak, "sent": sent.bytes}
    Path(f"{out}.{rank}").write_text(json.dumps(shown))
    sharding.barrier()
    distributed.destroy_process_group()
    sharding.leave(0)
