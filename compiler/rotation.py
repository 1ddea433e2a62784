"""Channels rotated together, so that none stands out: an orthogonal matrix before a layer, undone in its columns.

Where the rotation comes from: the context of attention is a mean of values, so rotating the values of a key-value head
(rows of v) rotates the context of every head that shares it, with nothing left to do at run time (R2 of SpinQuant,
arXiv:2405.16406). What an MLP multiplies channel by channel is rotated as it comes, at run time (QuaRot,
arXiv:2404.00456): 64 channels together cost a seventh of the layer's time and leave a quarter of its loss.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor as Array

from dsopt.compiler.checkpoint import Tensor

RUN_TIME = 64  # channels rotated together at run time; 128 lose a fifth less and take two and a half times as long


def run_time_block(k: int) -> int:
    """How many of k channels are rotated together at run time."""
    return math.gcd(k, RUN_TIME)


@cache
def rotation(size: int) -> np.ndarray:
    """A Hadamard matrix with signs drawn for each row, orthogonal: float32 [size, size].

    Where `size` is no power of two it is of blocks along the diagonal, of the largest power that divides it.
    """
    block = np.ones((1, 1))
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (size, 1))  # values have a mean: plain sums would gather it
    return (signs * np.kron(np.eye(size // len(block)), block) / len(block) ** 0.5).astype(np.float32)


def rotated_columns(x: Array, head: int | None, *, back: bool = False) -> Array:
    """Each `head` columns of [.., K] in the basis `rotation(head)`, or `back` out of it; None leaves them."""
    if head is None:
        return x
    matrix = torch.from_numpy(rotation(head))
    return (x.unflatten(-1, (-1, head)) @ (matrix.T if back else matrix)).flatten(-2)


def rotated_gram(gram: Array, head: int | None) -> Array:
    """E[x x^T], [K, K], of inputs whose columns are rotated."""
    return rotated_columns(rotated_columns(gram, head).T, head)


@dataclass(frozen=True)
class Rotated(Tensor):
    """Each `head` channels of `source` in the basis `rotation(head)`: rows of axis 0, or the columns of a matrix."""

    source: Tensor
    head: int
    axis: int

    def _rows(self, start: int, stop: int) -> np.ndarray:
        matrix = rotation(self.head)
        if self.axis == 1:
            data = self.source.read(start, stop)
            return (data.reshape(len(data), -1, self.head) @ matrix).reshape(data.shape)
        first, last = start // self.head * self.head, -(-stop // self.head) * self.head
        data = self.source.read(first, last)
        rotated = matrix.T @ data.reshape(-1, self.head, data[:1].size)
        return np.asarray(rotated.reshape(data.shape)[start - first : stop - first])


def rotate(source: Tensor, head: int, axis: int) -> Rotated:
    """A view of `source`; nothing is read."""
    return Rotated(source.name, source.shape, source.dtype, source.nbytes, source, head, axis)
