"""Weights made from weights: a selection that is read when asked for, and a repaired one that waits on disk."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsopt.compiler.checkpoint import Tensor

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Selected(Tensor):
    """Some rows (of axis 0) and columns (of axis 1) of a tensor, ascending; None is all of them."""

    source: Tensor
    rows: Indices | None
    columns: Indices | None

    def _rows(self, start: int, stop: int) -> np.ndarray:
        if self.rows is None:
            data = self.source.read(start, stop)
        else:
            wanted = self.rows[start:stop]
            first = int(wanted[0])
            data = self.source.read(first, int(wanted[-1]) + 1)[wanted - first]
        return data if self.columns is None else data[:, self.columns]


def select(source: Tensor, *, rows: Indices | None = None, columns: Indices | None = None) -> Tensor:
    """A view of `source`; nothing is read."""
    kept = [len(axis) if axis is not None else size for axis, size in zip((rows, columns), source.shape, strict=False)]
    shape = (*kept, *source.shape[2:])
    nbytes = source.nbytes * _size(shape) // max(1, _size(source.shape))
    return Selected(source.name, shape, source.dtype, nbytes, source, rows, columns)


@dataclass(frozen=True)
class Spilled(Tensor):
    """A computed float32 weight in a nameless temporary file, so that those of a whole model need no memory."""

    data: np.memmap

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.data[start:stop])


def spill(name: str, weight: NDArray[np.float32]) -> Tensor:
    """Put a computed weight aside; the file vanishes with the last reference to it."""
    with tempfile.TemporaryFile() as file:
        data = np.memmap(file, np.float32, "w+", shape=weight.shape)
    data[:] = weight
    data.flush()
    return Spilled(name, weight.shape, "F32", weight.nbytes, data)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
