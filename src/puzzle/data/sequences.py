"""The packed corpus as its readers see it: batches that are a pure function of (seed, step).

Exact resume therefore needs no data-loader state. Reads the safetensors shards that `corpus.build`
writes: `<folder>/<split>-NNNNN.safetensors` (`tokens` and `documents`, int32, and `counted`, uint8,
all [sequences, S]).

The four sides of the split share no document, and each has one use: BLD, calibration and
uptraining read `train`; block scores `score`; whatever else chooses (the weights that uptraining
keeps, where BLD stops) `validation`; and only `evaluate` reads `test`, which chooses nothing.

Shape legend: N sequences, S sequence length, B batch.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from puzzle.errors import UserError

Split = Literal["train", "score", "validation", "test"]
HELD_OUT: tuple[Split, ...] = ("score", "validation", "test")


class _Slice(Protocol):
    """A tensor on disk."""

    def __getitem__(self, rows: slice) -> torch.Tensor: ...


class Sequences:
    """The packed sequences of one side of the split; rows are read from disk on demand.

    `batch(step, size)` walks through seeded permutations of the rows, one per epoch. It depends on
    nothing but (seed, step, size), so a resumed run sees exactly the batches it would have seen.
    """

    def __init__(self, folder: Path, split: Split, seed: int = 0) -> None:
        """`folder` holds the shards of a finished corpus."""
        self.split, self.seed, self.join = split, [seed], 1
        self._files = [
            safe_open(path, framework="pt")
            for path in sorted(folder.glob(f"{split}-*.safetensors"))
        ]
        self._shards = [file.get_slice("tokens") for file in self._files]
        self._documents = [file.get_slice("documents") for file in self._files]
        self._counted = [file.get_slice("counted") for file in self._files]
        shapes = [shard.get_shape() for shard in self._shards]
        self._first_rows = np.cumsum([0, *(shape[0] for shape in shapes)])
        self.sequence_length: int = shapes[0][1]
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None  # number, its permutation

    def view(self, join: int = 1, seed: int = 0) -> "Sequences":
        """The same rows as longer sequences, in another order, or both.

        Raises `UserError` where the rows do not fill one sequence of that length.

        Args:
            join: how many neighbouring rows of the packed stream make one sequence.
            seed: any number above 0 gives another order.
        """
        other = copy.copy(self)
        other.join, other._epoch = self.join * join, None
        other.seed = [*self.seed, seed] if seed else self.seed
        other.sequence_length = self.sequence_length * join
        if not len(other):
            raise UserError(
                f"corpus: its {len(self)} sequences of {self.sequence_length} tokens do not fill "
                f"one of {other.sequence_length}; "
                "add text, raise corpus.train_tokens or ask for shorter sequences"
            )
        return other

    def __len__(self) -> int:
        """N, counted in joined sequences."""
        return int(self._first_rows[-1]) // self.join

    def rows(self, indices: Iterable[int]) -> torch.Tensor:
        """int64 [len(indices), S]: the sequences with these numbers, in the packed order."""
        return self._read(self._shards, indices)

    def documents(self, indices: Iterable[int]) -> torch.Tensor:
        """int64 [len(indices), S]: the document that each token of these sequences is of."""
        return self._read(self._documents, indices)

    def counted(self, indices: Iterable[int]) -> torch.Tensor:
        """bool [len(indices), S]: whether quality is measured on each token.

        Of chats only what the assistant says is counted, of all other text every token.
        """
        return self._read(self._counted, indices).bool()

    def _read(self, shards: list[_Slice], indices: Iterable[int]) -> torch.Tensor:
        rows = []
        for index in indices:
            for row in range(index * self.join, (index + 1) * self.join):
                shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
                offset = int(row - self._first_rows[shard])
                rows.append(shards[shard][offset : offset + 1])
        if not rows:
            return torch.empty(0, self.sequence_length, dtype=torch.long)
        return torch.cat(rows).long().view(-1, self.sequence_length)

    def batch(self, step: int, size: int) -> torch.Tensor:
        """int64 [B, S]: batch number `step` of `size` sequences."""
        positions = range(step * size, (step + 1) * size)
        return self.rows(self._shuffled(position) for position in positions)

    def head(self, count: int) -> torch.Tensor:
        """int64 [min(count, N), S]: a fixed sample without repetition.

        For validation and calibration.
        """
        return self.batch(0, min(count, len(self)))

    def head_documents(self, count: int) -> torch.Tensor:
        """int64 [min(count, N), S]: the document of each token of `head`."""
        return self.documents(self._shuffled(position) for position in range(min(count, len(self))))

    def head_counted(self, count: int) -> torch.Tensor:
        """bool [min(count, N), S]: whether quality is measured on each token of `head`."""
        return self.counted(self._shuffled(position) for position in range(min(count, len(self))))

    def _shuffled(self, position: int) -> int:
        """The sequence that stands at a position of the endless shuffled stream."""
        epoch, offset = divmod(position, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([*self.seed, epoch])
            self._epoch = (epoch, generator.permutation(len(self)))
        return int(self._epoch[1][offset])
