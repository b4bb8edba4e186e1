"""The tensors of a safetensors checkpoint under a child's names, each read when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from puzzle.errors import UserError
from puzzle.model.weight_files import names_in, open_file, read_index, weight_files

Tensors = list[tuple[str, slice]]  # names in a child, and the rows of the stored tensor
WHOLE = slice(None)


def _same_name(name: str) -> Tensors:
    return [(name, WHOLE)]


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by a child's names, memory-mapped. As a context manager it unmaps the files."""

    def __init__(self, folder: Path, tensors: Callable[[str], Tensors] = _same_name) -> None:
        """`tensors`: where a stored tensor, or some of its rows, goes in a child."""
        index = read_index(folder)
        self._places: dict[str, tuple[safe_open, str, slice]] = {}
        for path in weight_files(folder):
            file = open_file(path)
            for stored in names_in(path, file, index):
                self._places |= {name: (file, stored, rows) for name, rows in tensors(stored)}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._places:
            raise UserError(f"parent: its safetensors files lack {name}; is a shard missing?")
        file, stored, rows = self._places[name]
        if rows == WHOLE:
            tensor: torch.Tensor = file.get_tensor(stored)
        else:
            tensor = file.get_slice(stored)[rows].clone()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap the files: what was read of them no longer counts as memory of this process."""
        for file, _stored, _rows in self._places.values():
            file.__exit__(None, None, None)
        self._places.clear()
