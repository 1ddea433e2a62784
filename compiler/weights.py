"""Initializers that are computed when they are written: the weights of a model never stand in memory together."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from dsopt.compiler.checkpoint import Tensor
from dsopt.runtime.errors import DsoptError

_CHECKED = 1 << 20  # elements looked at together: the mask of a whole table would be a quarter of it


def lazy(name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], np.ndarray]) -> ir.LazyTensor:
    """A tensor whose content `make` returns each time it is asked for."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(make()), name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )


class Weight(ir.LazyTensor):
    """A float32 initializer backed by a checkpoint's tensor, which can also be read by rows."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor = tensor
        super().__init__(
            lambda: ir.tensor(self.read(0, tensor.shape[0]), name=name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(tensor.shape),
            name=name,
        )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of axis 0 as float32. Raises DsoptError on a weight that is no number: it would spread."""
        rows = self.tensor.read(start, stop)
        step = max(1, _CHECKED // max(1, rows[:1].size))
        if not all(np.isfinite(rows[i : i + step]).all() for i in range(0, len(rows), step)):
            raise DsoptError(f"tensor {self.tensor.name} has NaN or infinite weights; the checkpoint is damaged")
        return rows


class Shared:
    """Several arrays from one computation: made when the first is asked for, dropped when each was taken.

    `make` returns the arrays by name. Those named in `keep` stay, to be asked for again without a new computation.
    """

    def __init__(self, make: Callable[[], dict[str, np.ndarray]], keep: Sequence[str] = ()) -> None:
        self._make, self._keep = make, frozenset(keep)
        self._left: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def take(self, part: str) -> np.ndarray:
        with self._lock:
            if part not in self._left:
                self._left = self._make()
            return self._left[part] if part in self._keep else self._left.pop(part)


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` as an initializer of `graph` under its own name."""
    assert tensor.name is not None
    assert tensor.name not in graph.initializers, tensor.name
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer that is small and may be asked for again: all that ask by this name share it."""
    return graph.initializers.get(name) or initializer(graph, ir.tensor(array, name=name))
