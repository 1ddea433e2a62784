"""The graphs of a drafter as ONNX Runtime sessions, some of their weights mapped from the model's file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.artifact import WEIGHTS
from dsopt.runtime.drafters.manifest import DraftManifest
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.kv import KvCache, LayerShape
from dsopt.runtime.session import ort, session_options

Arrays = Mapping[str, NDArray[Any]]


class Graph:
    """A session, and the mapped memory that it reads."""

    def __init__(self, directory: Path, file: str, manifest: DraftManifest) -> None:
        """`directory` is the drafter's, within the model's. Raises DsoptError when the graph cannot be loaded."""
        options = session_options()
        weights = directory.parent / WEIGHTS
        try:
            self._borrowed = {name: _map(weights, entry) for name, entry in manifest.borrowed.get(file, {}).items()}
            if self._borrowed:
                options.add_external_initializers(list(self._borrowed), [_value(a) for a in self._borrowed.values()])
            self.session = ort.InferenceSession(directory / file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            line = str(error).strip().splitlines()[0]
            raise DsoptError(f"{directory / file}: ONNX Runtime {ort.__version__} cannot load it: {line}") from error

    def run(self, inputs: Arrays) -> list[NDArray[Any]]:
        """All outputs in order, of a graph that has no cache."""
        return [np.asarray(output) for output in self.session.run(None, dict(inputs))]


class CachedGraph:
    """A graph bound to a cache and to the arrays of its outputs. A run writes behind the cache's valid positions."""

    def __init__(self, graph: Graph, manifest: DraftManifest, outputs: Arrays) -> None:
        shape = manifest.model
        layers = [LayerShape(layer, shape["kv_heads"], shape["head_dim"]) for layer in range(shape["layers"])]
        self.cache = KvCache(layers, shape["context_length"])
        self.outputs = outputs
        self._session, self._io = graph.session, graph.session.io_binding()
        self._generation = -1
        for name, array in outputs.items():
            self._io.bind_ortvalue_output(name, _value(array))

    def run(self, inputs: Arrays, rows: int) -> None:
        """Fills `outputs`; the cache is as long as before, the `rows` written behind it are not valid yet.

        Raises DsoptError when the context is full.
        """
        total = self.cache.length + rows
        self.cache.reserve(total)
        if self._generation != self.cache.generation:
            self._bind_cache()
        given = {**inputs, "seqlens_k": np.array([total - 1], np.int32), "total_length": np.array(total, np.int32)}
        for name, array in given.items():
            self._io.bind_ortvalue_input(name, _value(array))
        self._session.run_with_iobinding(self._io)

    def _bind_cache(self) -> None:
        for name, buffer in self.cache.buffers.items():
            value = _value(buffer)
            self._io.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._io.bind_ortvalue_output(f"present.{name}", value)
        self._generation = self.cache.generation


def _value(array: NDArray[Any]) -> Any:
    """An OrtValue over the array's own memory."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def _map(weights: Path, entry: Mapping[str, Any]) -> NDArray[Any]:
    return np.asarray(np.memmap(weights, np.dtype(entry["dtype"]), "r", int(entry["offset"]), tuple(entry["shape"])))
