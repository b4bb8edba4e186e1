"""What two processes of an uptraining hold of their models after a forward: gloo, on CPUs."""

import faulthandler
import json
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.training import sharding
from puzzle.uptrain import UPTRAIN, stage
from puzzle.uptrain.gkd import Pair
from puzzle.uptrain.trainer import Trainer


class Matrices(TorchDispatchMode):
    """Storages that hold a whole matrix of a model, in whatever dtype, that operators have made."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.seen: weakref.WeakKeyDictionary[torch.UntypedStorage, None]
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is torch.Tensor and tensor.shape in self.shapes:
                self.seen[tensor.untyped_storage()] = None
        return out

    def alive_bytes(self) -> int:
        """FSDP2 frees by shrinking a storage to nothing."""
        return sum(storage.nbytes() for storage in self.seen)


def worker(rank: int, folder: Path, out: Path, keeps: bool) -> None:
    """Two steps; process 0 writes what was alive after each forward, and what the matrices take.

    `keeps`: a planted bug, copies of the weights that stay.
    """
    faulthandler.enable()
    torch.set_num_threads(1)
    rendezvous = f"file://{out}.rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    alive, kept = [], []

    def train(trainer: Trainer) -> None:
        original(trainer)
        element = torch.bfloat16.itemsize  # of products
        matrices = [p.numel() * element for p in trainer.pair.parameters() if p.dim() == 2]
        head = trainer.pair.child.lm_head.weight.numel() * element
        shown = {"alive": alive, "matrices": sum(matrices), "head_gradient": head}
        if rank == 0:
            out.write_text(json.dumps(shown))

    def call(pair: Pair, *args, **kwargs):
        shapes = {p.shape for p in pair.parameters() if p.dim() == 2}
        shapes |= {torch.Size(reversed(shape)) for shape in shapes}
        with Matrices(shapes) as matrices:
            result = nn.Module.__call__(pair, *args, **kwargs)
            if keeps:
                kept.extend(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
        alive.append(matrices.alive_bytes())
        return result

    original = Trainer.train
    try:
        run = Run.open(folder, Progress(quiet=True))
        job = run.child_job("main")
        with (
            mock.patch.object(Pair, "__call__", call),
            mock.patch.object(Trainer, "train", train),
        ):
            stage.distil(job, job.folder(UPTRAIN))
        sharding.barrier()
    finally:
        distributed.destroy_process_group()
    sharding.leave(0)
