"""SmoothQuant (arXiv:2211.10438): outliers of activations moved into weights, where they do less harm.

A layer's inputs are divided by a scale a channel, its weights multiplied by it: y = (x / s) (W s)^T is what it was. The
division is folded into whatever makes x: the norm before q, k, v, before gate, up and before the head; the rows of v
before o (one scale for all heads that share a key-value head); the rows of up before down. Nothing is left to do at run
time, but where the head is tied to the embedding: a gathered row is divided.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor as Array

from dsopt.compiler.checkpoint import Tensor

Scales = Mapping[str, Array]
"""By name of the first layer that reads an input (q_proj, o_proj, gate_proj, down_proj, lm_head); float32 [K]."""


@dataclass(frozen=True)
class Scaled(Tensor):
    """A tensor with rows (of axis 0) and columns (of axis 1) multiplied; None is 1."""

    source: Tensor
    rows: np.ndarray | None
    columns: np.ndarray | None

    def _rows(self, start: int, stop: int) -> np.ndarray:
        data = self.source.read(start, stop)
        if self.rows is not None:
            data *= self.rows[start:stop].reshape(-1, *[1] * (data.ndim - 1))
        if self.columns is not None:
            data *= self.columns
        return data


def scale(source: Tensor, *, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> Scaled:
    """A view of `source`; nothing is read. A view of a view is one view."""
    if isinstance(source, Scaled):
        rows, columns = _product(source.rows, rows), _product(source.columns, columns)
        source = source.source
    return Scaled(source.name, source.shape, source.dtype, source.nbytes, source, rows, columns)


def _product(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return b if a is None else a if b is None else a * b


def smoothing_scales(absmax: Array, weights: Array, alpha: float) -> Array:
    """max|x|^alpha / max|w|^(1 - alpha) of each input channel, float32 [K].

    absmax [K] of the inputs, `weights` [K] the largest magnitudes in the columns of all layers that read them.
    """
    floor = 1e-5 * float(absmax.max().clamp_min(1e-30))
    scales = absmax.clamp_min(floor) ** alpha / weights.clamp_min(1e-5 * float(weights.max())) ** (1 - alpha)
    return scales / scales.log().mean().exp()  # the overall size is free: keep it, that nothing over- or underflows


def smoothed_gram(gram: Array, scales: Array) -> Array:
    """E[x x^T], [K, K], of inputs that are divided by `scales` [K]."""
    return gram / scales / scales[:, None]


def shared_channels(x: Array, heads: int, kv_heads: int) -> Array:
    """[heads * d] -> [kv_heads * d]: the largest of the heads that share a key-value head."""
    return x.reshape(kv_heads, heads // kv_heads, -1).amax(1).flatten()


def repeat_channels(x: Array, heads: int, kv_heads: int) -> Array:
    """[kv_heads * d] -> [heads * d]: each key-value head's channels for all heads that share it."""
    return x.reshape(kv_heads, 1, -1).expand(-1, heads // kv_heads, -1).flatten()


def column_maxima(weights: list[Array]) -> Array:
    """The largest magnitude in each column of weights [N, K] that read one input: [K]."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
