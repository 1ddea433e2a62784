"""The key-value cache: one buffer a layer and part, read and written in place by the graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.errors import DsoptError

_FIRST = 256  # positions of the first allocation: 11 MB for a 135M model, and few prompts outgrow it twice


@dataclass(frozen=True)
class LayerShape:
    """One layer's cache: `index` in the graph's names, heads, values a head."""

    index: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class CacheType:
    """An element type of the cache: ONNX's number, and a NumPy type of the same width to move it by."""

    onnx: int
    storage: type


CACHE_TYPES = {
    "tensor(float)": CacheType(1, np.float32),
    "tensor(float16)": CacheType(10, np.float16),
    "tensor(bfloat16)": CacheType(16, np.uint16),  # NumPy has none
    "tensor(int8)": CacheType(3, np.int8),
    "tensor(float8e4m3fn)": CacheType(17, np.uint8),
}


class KvCache:
    """Keys and values of one sequence, each `dtype` [1, heads, capacity, head_dim] for each layer.

    `length` positions are valid. Going back (`trim`) is O(1): the graph is told the length and ignores the rest.
    Capacity doubles when it runs out, up to `limit` positions.
    """

    def __init__(self, layers: Sequence[LayerShape], limit: int, dtype: type = np.float32) -> None:
        self.layers, self.limit, self.dtype = tuple(layers), limit, dtype
        self.length = 0
        self.written = 0  # positions that the last run filled, valid or not yet
        self.capacity = 0
        self.buffers: dict[str, NDArray[Any]] = {}
        self.generation = 0  # grows with each reallocation, so that bindings know they are stale
        self.reserve(1)

    def reserve(self, positions: int) -> None:
        """Make room for `positions` in all. Raises DsoptError past the context limit."""
        if positions > self.limit:
            raise DsoptError(
                f"the context is full: {positions} positions are needed, {self.limit} fit; "
                "shorten the prompt, lower -n or raise --ctx"
            )
        if positions <= self.capacity:
            return
        capacity = max(_FIRST, self.capacity)
        while capacity < positions:
            capacity *= 2
        self._grow(min(capacity, self.limit))

    def _grow(self, capacity: int) -> None:
        for layer in self.layers:
            for part in ("key", "value"):
                name = f"{layer.index}.{part}"
                buffer: NDArray[Any] = np.zeros((1, layer.heads, capacity, layer.head_dim), self.dtype)
                if self.length:
                    buffer[:, :, : self.length] = self.buffers[name][:, :, : self.length]
                self.buffers[name] = buffer
        self.capacity = capacity
        self.generation += 1

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on."""
        assert 0 <= length <= self.length
        self.length = self.written = length

    def extend(self, count: int) -> None:
        """Make `count` more positions valid, of those that the last run wrote but did not keep."""
        assert self.length + count <= self.written
        self.length += count

    def valid(self) -> dict[str, NDArray[np.float32]]:
        """The valid part of each buffer, float32 [heads, length, head_dim], to be saved."""
        return {
            name: buffer[0, :, : self.length].astype(np.float32, copy=False) for name, buffer in self.buffers.items()
        }

    def restore(self, saved: dict[str, NDArray[np.float32]], length: int) -> None:
        """Take over what `valid` gave. Raises DsoptError when it does not fit this model."""
        self.length = 0
        self.reserve(max(length, 1))
        for name, buffer in self.buffers.items():
            part = saved.get(name)
            if part is None or part.shape != (buffer.shape[1], length, buffer.shape[3]):
                raise DsoptError(f"the saved state does not fit this model (cache {name})")
            buffer[0, :, :length] = part
        self.length = length
