"""An ONNX Runtime session over an artifact: token ids and a cache in, logits out."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # the wheels upload usage data unless told not to
# The provider's tiled attention is the slower one on a CPU: for 128 rows by half at an empty cache, by a tenth at 4000
# positions, even from there on. It saves the memory of the scores, which a chunk of a prompt has little of.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")

import onnxruntime as ort
from numpy.typing import NDArray

from dsopt.runtime.artifact import Artifact
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.kv import CACHE_TYPES, CacheType, KvCache, LayerShape
from dsopt.runtime.sampling import Candidates

Logits = NDArray[np.float32]
_FEW = 64  # runs of so few rows keep what is bound for their shape: decoding and verification alternate widths
# Rows a run at most. Attention over a chunk does not look at the half of the score matrix that a mask would hide: 512
# tokens in four chunks take a fifth less time than in one, and matrix kernels are as fast at 128 rows as at 512.
PREFILL_CHUNK = 128


def default_threads() -> int:
    """Physical cores this process may use: a second thread on a core only waits for its vector units."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:  # noqa: PTH123
                cores.add(file.read().strip())
        except OSError:
            cores.add(str(cpu))  # no such file outside Linux: count logical ones
    return len(cores)


def check_threads(threads: int | None) -> None:
    """Raises UsageError on more threads than processors: each would only wait for another's."""
    processors = os.cpu_count()
    if threads is not None and processors is not None and threads > processors:
        raise UsageError(f"--threads is {threads}; this machine has {processors} processors, give at most as many")


def ort_version() -> str:
    """Of ONNX Runtime."""
    return str(ort.__version__)


class Session:
    """A loaded model. Immutable: what a sequence remembers is in its KvCache, what a call needs is in a Binding.

    All sessions of a process share one thread pool: pools of their own would spin against each other when two
    sessions take turns. Its size is that of the first session.
    """

    _pool_threads: int | None = None

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        context: int | None = None,
        device: str = "cpu",
        captured: int = 16,
    ) -> None:
        """`device` is cpu or cuda (`devices.choose_device` finds it). On cuda, steps of at most `captured` rows replay
        as CUDA graphs: decode and verify, not prefill; 0 is none."""
        check_threads(threads)
        self.artifact, self.device, self._captured = artifact, device, captured
        self.threads = self.share_pool(threads or default_threads())
        limit = artifact.manifest.model["context_length"]
        if context is not None and not 0 < context <= limit:
            raise DsoptError(f"--ctx is {context}; this model has at most {limit} positions")
        self.context = context or limit
        self._session = _load(artifact, device, captured)
        self.layers = _layers(self._session)
        self.vocab_size = artifact.manifest.model["vocab_size"]

    @classmethod
    def share_pool(cls, threads: int) -> int:
        """Make the process's thread pool, once; returns the size it has. Sessions are made after it."""
        if cls._pool_threads is None:
            ort.set_global_thread_pool_sizes(threads, 1)
            Session._pool_threads = threads
        return cls._pool_threads or threads

    @property
    def cache_type(self) -> str:
        """The cache's element type, as llama-bench writes it."""
        return _LLAMA_BENCH_TYPES[_cache_type(self._session).onnx]

    def new_cache(self, batch: int = 1, limit: int | None = None) -> KvCache:
        """An empty cache of at most `limit` positions, as many as the context has unless given; on a device it may be
        of `batch` sequences that advance together."""
        kind, limit = _cache_type(self._session), limit or self.context
        if self.device == "cpu":
            assert batch == 1
            return KvCache(self.layers, limit, kind.storage)
        from dsopt.runtime.cuda import DeviceCache

        return DeviceCache(self.layers, limit, kind, self.device, batch)

    def bind(self, cache: KvCache, taps: Sequence[int] = ()) -> "Binding":
        """`taps`: layers whose outputs each run gives too. Raises DsoptError where the graph has them not."""
        widths = {output.name: output.shape[-1] for output in self._session.get_outputs()}
        missing = [tap for tap in taps if f"tap.{tap}" not in widths]
        if missing:
            raise DsoptError(
                f"{self.artifact.directory}: has no output for layer {missing[0]}, which the drafter reads; "
                "compile model and drafter together with --draft"
            )
        if self.device == "cpu":
            tapped = {f"tap.{tap}": widths[f"tap.{tap}"] for tap in taps}
            return Binding(self._session, cache, self.vocab_size, tapped)
        if taps:
            raise DsoptError(f"{self.artifact.directory}: drafters that read layers run on the CPU only; --device cpu")
        from dsopt.runtime.cuda import DeviceBinding, DeviceCache

        assert isinstance(cache, DeviceCache)
        return DeviceBinding(self._session, cache, self.vocab_size, self.device, self._captured)


class _Step:
    """What a run of one shape reads and writes: ids [1, n], logits [1, rows, vocab], taps [1, n, width]."""

    def __init__(self, count: int, logits: Logits, taps: Mapping[str, int]) -> None:
        self.ids, self.logits = np.empty((1, count), np.int64), logits
        self.taps = [np.empty((1, count, width), np.float32) for width in taps.values()]
        start = np.array([-logits.shape[1] or count], np.int64)
        self.inputs = {"input_ids": _value(self.ids), "logits_start": _value(start)}
        taps_out = {name: _value(tap) for name, tap in zip(taps, self.taps, strict=True)}
        self.outputs = {"logits": _value(self.logits), **taps_out}


class Binding:
    """A session bound to one cache; `run` appends tokens to the sequence.

    Cache buffers are bound once for each allocation, as past and present alike; a step rebinds only what changes.
    """

    most_candidates = 0  # that `top` can give: 0 where logits are at hand anyway
    chunk: int | None = None  # rows of a prompt that a run should have at most, where PREFILL_CHUNK is not the best

    def __init__(
        self, session: ort.InferenceSession, cache: KvCache, vocab_size: int, taps: Mapping[str, int] | None = None
    ) -> None:
        self.cache = cache
        self._session, self._vocab, self._taps = session, vocab_size, taps or {}
        self._io = session.io_binding()
        self._generation = -1
        self._logits = np.empty((1, 0, vocab_size), np.float32)
        self._steps: dict[tuple[int, int], _Step] = {}
        self._shape = (0, 0)  # rows in, rows of logits out
        self._mask = np.ones((1, 0), np.int64)

    def run(self, ids: NDArray[np.int64], rows: int = 1, keep: int | None = None) -> Logits:
        """Append ids int64 [n]; returns logits float32 [rows, vocab] of the last `rows` of them, 0 being none.

        The array is overwritten by the next run. With `keep` only so many of the positions
        written become valid now, more by `KvCache.extend`. Raises DsoptError when the context is full; on any
        failure, an interrupt included, the cache is as before.
        """
        cache, total = self.cache, self.cache.length + len(ids)
        cache.reserve(total)
        if cache.generation != self._generation:
            self._bind_cache()
        if self._shape != (len(ids), rows):
            self._bind_shape((len(ids), rows))
        step = self._steps[self._shape]
        step.ids[0, :] = ids
        self._io.bind_ortvalue_input("attention_mask", _value(self._mask[:, :total]))
        self._session.run_with_iobinding(self._io)
        cache.length += len(ids) if keep is None else keep
        cache.written = total
        return step.logits[0]

    def top(self, ids: NDArray[np.int64], count: int, rows: int = 1, keep: int | None = None) -> list[Candidates]:
        """As `run`, but of each row only the `count` largest logits, at most `most_candidates`."""
        raise AssertionError("candidates are asked of a binding that has none")

    @property
    def hidden(self) -> NDArray[np.float32] | None:
        """The tapped layers' outputs of the last run, float32 [n, taps, width], a copy; None without taps."""
        return np.stack([tap[0] for tap in self._steps[self._shape].taps], axis=1) if self._taps else None

    def _bind_cache(self) -> None:
        for name, buffer in self.cache.buffers.items():
            value = _value(buffer)
            self._io.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._io.bind_ortvalue_output(f"present.{name}", value)
        self._mask = np.ones((1, self.cache.capacity), np.int64)
        self._generation = self.cache.generation

    def _bind_shape(self, shape: tuple[int, int]) -> None:
        self._shape = (-1, -1)  # of neither, should an interrupt come between
        if shape not in self._steps:
            self._steps[shape] = self._new_step(*shape)
        for name, value in self._steps[shape].inputs.items():
            self._io.bind_ortvalue_input(name, value)
        for name, value in self._steps[shape].outputs.items():
            self._io.bind_ortvalue_output(name, value)
        self._shape = shape

    def _new_step(self, count: int, rows: int) -> _Step:
        if rows > self._logits.shape[1]:
            self._logits = np.empty((1, rows, self._vocab), np.float32)
            self._steps.clear()
        for shape in [shape for shape in self._steps if shape[0] > _FEW]:
            del self._steps[shape]
        return _Step(count, self._logits[:, :rows], self._taps)


def _value(array: NDArray[Any]) -> Any:
    """An OrtValue over the array's own memory, which must outlive it."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def session_options() -> ort.SessionOptions:
    """What every session of the process is made with."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # `logits_start` being input and initializer is meant, not worth a warning
    options.use_per_session_threads = False
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def _load(artifact: Artifact, device: str, captured: int) -> ort.InferenceSession:
    options = session_options()
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        from dsopt.runtime.cuda import cuda_options

        providers = [("CUDAExecutionProvider", cuda_options(options, captured))]
    try:
        # Its own fallback would print on stdout and go on, on the CPU.
        session = ort.InferenceSession(artifact.graph, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        line = str(error).strip().splitlines()[0]
        raise DsoptError(f"{artifact.graph}: ONNX Runtime {ort.__version__} cannot load it: {line}") from error
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        from dsopt.runtime.devices import missing_provider

        reason = missing_provider("CUDAExecutionProvider") or "its CUDA provider did not load"
        raise DsoptError(f"--device cuda: ONNX Runtime {ort.__version__} took the CPU in its place: {reason}")
    return session


def _cache_type(session: ort.InferenceSession) -> CacheType:
    return CACHE_TYPES[next(i.type for i in session.get_inputs() if i.name.endswith(".key"))]


_LLAMA_BENCH_TYPES = {1: "f32", 10: "f16", 16: "bf16", 3: "i8", 17: "f8"}


def _layers(session: ort.InferenceSession) -> list[LayerShape]:
    shapes = {i.name: i.shape for i in session.get_inputs() if i.name.endswith(".key")}
    return [LayerShape(int(name.split(".")[1]), shape[1], shape[3]) for name, shape in shapes.items()]
