"""Running on a device of its own memory: caches and bindings whose buffers stay there.

Steps of few rows are captured as CUDA graphs, one for each number of rows: the graph replays with fixed addresses and
shapes, so each width has buffers of its own, and the attention mask is as long as the cache, ones and then zeros. The
number of ones tells attention the real length; the mask's own length is only an upper bound (see ONNX Runtime's
"CUDA graphs" and GroupQueryAttention's `seqlens_k` and `total_sequence_length`).
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.kv import CacheType, KvCache, LayerShape
from dsopt.runtime.sampling import Candidates
from dsopt.runtime.session import Binding, Logits

CAPTURED = 16  # rows of a step at most that replays as a graph: decode and verify, not prefill
CANDIDATES = 64  # of a row at most: beyond that all logits come back
DEVICE_CHUNK = 2048  # rows of a prompt's chunk: a card is not filled by those that are best for a processor
_NOT_CAPTURED = "-1"


class DeviceCache(KvCache):
    """As KvCache, with its buffers on a device. Growing copies through the host: rare, and once per doubling.

    `batch` sequences that advance together may share it; only a single one can be saved.
    """

    def __init__(self, layers: Sequence[LayerShape], limit: int, kind: CacheType, device: str, batch: int = 1) -> None:
        self.kind, self.batch, self._device = kind, batch, device
        self.values: dict[str, ort.OrtValue] = {}
        super().__init__(layers, limit)

    def _grow(self, capacity: int) -> None:
        for layer in self.layers:
            for part in ("key", "value"):
                name = f"{layer.index}.{part}"
                host: NDArray[Any] = np.zeros((self.batch, layer.heads, capacity, layer.head_dim), self.kind.storage)
                if self.length:
                    host[:, :, : self.length] = self.values[name].numpy()[:, :, : self.length]
                self._put(name, host)
        self.capacity = capacity
        self.generation += 1

    def _put(self, name: str, host: NDArray[Any]) -> None:
        self.values[name] = ort.OrtValue.ortvalue_from_numpy(host, self._device, 0)

    def valid(self) -> dict[str, NDArray[np.float32]]:
        """The valid part of each buffer, float32 [heads, length, head_dim], to be saved; codes of a quantized one."""
        return {name: _widen(value.numpy()[0, :, : self.length]) for name, value in self.values.items()}

    def restore(self, saved: dict[str, NDArray[np.float32]], length: int) -> None:
        """Take over what `valid` gave. Raises DsoptError when it does not fit this model."""
        self.length = 0
        self.reserve(max(length, 1))
        for layer, part in itertools.product(self.layers, ("key", "value")):
            name = f"{layer.index}.{part}"
            found = saved.get(name)
            if found is None or found.shape != (layer.heads, length, layer.head_dim):
                raise DsoptError(f"the saved state does not fit this model (cache {name})")
            host: NDArray[Any] = np.zeros((1, layer.heads, self.capacity, layer.head_dim), self.kind.storage)
            host[0, :, :length] = _narrow(found, self.kind.storage)
            self.values[name].update_inplace(host)
        self.length = length


def _widen(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _narrow(array: NDArray[np.float32], storage: type) -> NDArray[Any]:
    """The inverse of `_widen`, exact for what it gave."""
    if storage is np.uint16:
        return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(storage)


@dataclass(frozen=True)
class _Step:
    """The buffers of one number of rows in and out; their addresses stay for the life of the cache's allocation."""

    io: ort.IOBinding
    options: ort.RunOptions
    ids: ort.OrtValue
    mask: ort.OrtValue
    outputs: dict[str, ort.OrtValue]
    keep: tuple[Any, ...]  # what the binding points to


class DeviceBinding(Binding):
    """A session bound to one DeviceCache; `run` appends tokens to the sequence, `top` too and returns only candidates.

    `captured`: steps of at most that many rows replay as CUDA graphs; 0 is none.
    """

    chunk = DEVICE_CHUNK
    _graphs = itertools.count(1)  # ids of captured graphs, unique in a process

    def __init__(
        self, session: ort.InferenceSession, cache: DeviceCache, vocab_size: int, device: str, captured: int
    ) -> None:
        self.cache: DeviceCache = cache
        self._session, self._vocab, self._device, self._captured = session, vocab_size, device, captured
        self._captures: dict[tuple[int, int, int], _Step] = {}
        self._last: _Step | None = None
        self._generation = -1
        emits = any(output.name == "candidates.tokens" for output in session.get_outputs())
        self.most_candidates = min(CANDIDATES, vocab_size) if emits else 0

    @property
    def hidden(self) -> None:
        """No layer is tapped on the device."""
        return None

    def run(self, ids: NDArray[np.int64], rows: int = 1, keep: int | None = None) -> Logits:
        """Append ids int64 [n]; returns logits float32 [rows, vocab] of the last `rows` of them.

        With a cache of several sequences ids are [batch, n] and logits [batch * rows, vocab]. The array may be
        overwritten by the next run. With `keep` only so many of the positions written become valid now, more by
        `KvCache.extend`. Raises DsoptError when the context is full; on any failure the cache is as before.
        """
        return self._advance(ids, rows, keep).outputs["logits"].numpy().reshape(-1, self._vocab)

    def top(self, ids: NDArray[np.int64], count: int, rows: int = 1, keep: int | None = None) -> list[Candidates]:
        """As `run`, but of each row only the `count` largest logits, at most `most_candidates`; the others stay on the
        device."""
        assert 0 < count <= self.most_candidates
        outputs = self._advance(ids, rows, keep, count).outputs
        parts = (outputs[f"candidates.{part}"].numpy().reshape(-1, count) for part in ("tokens", "logits"))
        return [Candidates(tokens, logits) for tokens, logits in zip(*parts, strict=True)]

    def _advance(self, ids: NDArray[np.int64], rows: int, keep: int | None = None, candidates: int = 0) -> _Step:
        cache, count, rows = self.cache, ids.shape[-1], rows or 1  # a row of logits costs a device nothing
        total = cache.length + count
        cache.reserve(total)
        if cache.generation != self._generation:
            self._captures, self._generation = {}, cache.generation
        # A chunk of a prompt has a mask exactly as long as the sequence: attention's prefill wants it.
        fixed = count <= max(self._captured, 1)
        shape = count, rows, candidates
        step = self._fixed_step(shape) if fixed else self._make(shape, total, _NOT_CAPTURED)
        step.ids.update_inplace(np.ascontiguousarray(ids, np.int64).reshape(cache.batch, count))
        if fixed:
            step.mask.update_inplace(np.tile((np.arange(cache.capacity) < total).astype(np.int64), (cache.batch, 1)))
        self._session.run_with_iobinding(step.io, step.options)
        cache.length += count if keep is None else keep
        cache.written = total
        self._last = step  # what it holds may be read until the next run
        return step

    def _fixed_step(self, shape: tuple[int, int, int]) -> _Step:
        if shape not in self._captures:
            graph = str(next(self._graphs)) if shape[0] <= self._captured else _NOT_CAPTURED
            self._captures[shape] = self._make(shape, self.cache.capacity, graph)
        return self._captures[shape]

    def _make(self, shape: tuple[int, int, int], length: int, graph: str) -> _Step:
        """`shape`: rows in, rows of logits out, candidates of each; `length` is the mask's."""
        count, rows, candidates = shape
        io, options, batch = self._session.io_binding(), ort.RunOptions(), self.cache.batch
        options.add_run_config_entry("gpu_graph_id", graph)
        ids = self._new(np.zeros((batch, count), np.int64))
        mask = self._new(np.ones((batch, length), np.int64))
        start = ort.OrtValue.ortvalue_from_numpy(np.array([-rows], np.int64))  # read by the host
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("logits_start", start)):
            io.bind_ortvalue_input(name, value)
        outputs = {"logits": self._new(np.zeros((batch, rows, self._vocab), np.float32))}
        keep = [start]
        if self.most_candidates:
            number, sides = max(candidates, 1), (batch, rows, max(candidates, 1))
            keep.append(ort.OrtValue.ortvalue_from_numpy(np.array([number], np.int64)))
            io.bind_ortvalue_input("candidates.count", keep[-1])
            outputs["candidates.logits"] = self._new(np.zeros(sides, np.float32))
            outputs["candidates.tokens"] = self._new(np.zeros(sides, np.int64))
        for name, value in outputs.items():
            io.bind_ortvalue_output(name, value)
        self._point_at_cache(io)
        return _Step(io, options, ids, mask, outputs, tuple(keep))

    def _point_at_cache(self, io: ort.IOBinding) -> None:
        """By pointer: the buffer's NumPy type is only of the same width as the graph's type."""
        for name, value in self.cache.values.items():
            where = self._device, 0, self.cache.kind.onnx, value.shape(), value.data_ptr()
            io.bind_input(f"past_key_values.{name}", *where)
            io.bind_output(f"present.{name}", *where)

    def _new(self, array: NDArray[Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)


def cuda_options(session: ort.SessionOptions, captured: int) -> dict[str, str]:
    """Options of the CUDA provider; what belongs to the session is set there.

    4- and 8-bit weights whose shape allows it (blocks of 32 without zero points, N a multiple of 64 or 32) are
    rearranged at load for the CUTLASS kernels, unless $ORT_FPA_INTB_GEMM decides. They are not stored rearranged
    (`weight_prepacked`): the order is one card generation's, no function of the wheel makes it without a card, and such
    a file would run nowhere else.
    """
    if "ORT_FPA_INTB_GEMM" not in os.environ:
        session.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    session.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return {"enable_cuda_graph": str(int(captured > 0))}
