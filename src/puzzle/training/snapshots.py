"""Checkpoints that are written while training goes on, by any number of processes.

A snapshot is copied to the host's memory before the next step and written beside it by a thread.
Every process writes its own slices of sharded tensors; process 0 writes the index when all files
are there, so an index means a complete checkpoint, and then removes what the last one named. Any
number of processes can go on from it: slices are joined by their first row.

    uptrain.json                         {step, files, notes}
    uptrain.40.0-of-2.safetensors        slices; `rows` in the metadata: the first row of each
"""

import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch.distributed.tensor import DTensor

from puzzle.artifacts import Record
from puzzle.training import checkpoint, sharding
from puzzle.training.checkpoint import Modules, Optimizers

POLL_S = 0.02


class Index(Record):
    """`<name>.json`: a complete checkpoint."""

    step: int
    files: list[str]
    notes: dict[str, JsonValue]


def read(folder: Path, name: str) -> Index | None:
    """The last complete checkpoint of this name."""
    path = folder / f"{name}.json"
    index = Index.read(path) if path.exists() else None
    if index is not None and all((folder / file).exists() for file in index.files):
        return index
    return None


class Snapshots:
    """The checkpoints in a folder, written by one thread of each process, one at a time."""

    def __init__(self, folder: Path) -> None:
        """What no index names is left of an interrupted writer and goes."""
        self.folder, self.writer = folder, threading.Thread()
        self.failure: Exception | None = None
        self.abandoned = threading.Event()
        indices = (Index.read(path) for path in folder.glob("*.json") if _is_index(path))
        named = {file for index in indices for file in index.files}
        if sharding.rank() == 0:
            for path in folder.glob("*-of-*.safetensors*"):
                if path.name not in named:
                    path.unlink(missing_ok=True)
        sharding.barrier()

    def save(
        self,
        name: str,
        step: int,
        modules: Modules,
        optimizers: Optimizers,
        notes: Mapping[str, JsonValue],
    ) -> None:
        """Copy what is trained, and write it while the caller goes on. Every process calls it."""
        self.wait()
        rows: dict[str, int] = {}
        slices: dict[str, torch.Tensor] = {}
        for key, tensor in checkpoint.tensors(modules, optimizers).items():
            first, part = _slice(tensor)
            if sharding.rank() == 0 or isinstance(tensor, DTensor):
                rows[key], slices[key] = first, part.detach().to("cpu", copy=True)
        size = sharding.size()
        files = [f"{name}.{step}.{rank}-of-{size}.safetensors" for rank in range(size)]
        index = Index(step=step, files=files, notes=dict(notes))
        arguments = (name, index, slices, rows, sharding.rank())
        self.writer = threading.Thread(target=self._write, args=arguments, daemon=True)
        self.writer.start()

    def wait(self) -> None:
        """Until the last snapshot is written; raises what kept it from that."""
        if self.writer.ident is not None:
            self.writer.join()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the writer, without waiting for other processes."""
        self.abandoned.set()
        if self.writer.ident is not None:
            self.writer.join()

    def _write(
        self,
        name: str,
        index: Index,
        slices: dict[str, torch.Tensor],
        rows: dict[str, int],
        rank: int,
    ) -> None:
        try:
            path = self.folder / index.files[rank]
            checkpoint.write(path, slices, {"rows": json.dumps(rows)})
            if rank != 0:
                return
            while not all((self.folder / file).exists() for file in index.files):
                if self.abandoned.wait(POLL_S):
                    return
            before = read(self.folder, name)
            index.write(self.folder / f"{name}.json")
            for file in set(before.files if before else []) - set(index.files):
                (self.folder / file).unlink(missing_ok=True)
        except Exception as error:  # of the disk, told at the next step
            self.failure = error

    def restore(self, name: str, modules: Modules, optimizers: Optimizers) -> Index | None:
        """Load the last complete checkpoint in place; None where there is none."""
        self.wait()
        index = read(self.folder, name)
        if index is not None:
            with ExitStack() as stack:
                paths = [self.folder / file for file in index.files]
                files = [stack.enter_context(checkpoint.opened(path)) for path in paths]
                slices = _Slices(files)
                checkpoint.load(slices.places, slices.read, modules, optimizers)
        return index


def _is_index(path: Path) -> bool:
    return any(path.parent.glob(f"{path.stem}.*-of-*.safetensors"))


def _slice(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(first row, this process's rows) of a tensor; all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    count, size = len(tensor), tensor.device_mesh.size()
    each = -(-count // size)  # as torch.chunk, which FSDP2 shards by
    return min(tensor.device_mesh.get_local_rank() * each, count), tensor.to_local()


class _Slices:
    """Full tensors by name, joined from the slices in all files."""

    def __init__(self, files: list[Any]) -> None:
        self.places: dict[str, list[tuple[int, Any]]] = {}
        for file in files:
            for key, row in json.loads(file.metadata()["rows"]).items():
                self.places.setdefault(key, []).append((row, file))

    def read(self, key: str) -> torch.Tensor:
        """Slices in the order of their rows; some of small tensors are empty."""
        parts = sorted(self.places[key], key=lambda part: part[0])
        tensors: list[torch.Tensor] = [file.get_tensor(key) for _, file in parts]
        filled = [tensor for tensor in tensors if tensor.numel()]
        return torch.cat(filled) if len(filled) > 1 else (filled or tensors)[0]
