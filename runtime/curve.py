"""The verify curve: what a run of this model takes on this machine, by its rows and by the tokens in the cache.

And which widths give the same bits: a row's logits differ between widths where ONNX Runtime takes other kernels.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.artifact import GRAPH, WEIGHTS
from dsopt.runtime.decoder import advance, prefill
from dsopt.runtime.files import cache_dir, write_atomically
from dsopt.runtime.machine import cpu_name, gpu_name
from dsopt.runtime.session import Binding, Session, ort_version

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_FEW = (1, 2, 4, 8, 16, 32)  # of a model so slow that not all can be measured in the time
_BUDGET = 1.5  # seconds
_LEAST, _REPETITIONS = 3, 12  # runs of each width; the fastest counts, since all that disturbs makes slower
_CHECKS = 4  # runs of a width, compared with the widest
_SHALLOW, _DEEP = 64, 1024  # tokens in the cache
_VERSION = 4

Curve = TypeVar("Curve")


@dataclass(frozen=True)
class VerifyCurve:
    """seconds[i]: a run of widths[i] rows, all with logits, behind `depth` tokens; deep_seconds[i]: behind `deep`.

    Between the widths and depths, and beyond them, a run takes what a straight line says.
    """

    widths: tuple[int, ...]
    depth: int
    seconds_at_depth: tuple[float, ...]
    deep: int
    seconds_at_deep: tuple[float, ...]
    same_bits: tuple[int, ...]  # widths at which a row's logits were those of the widest run, bit for bit

    def __post_init__(self) -> None:
        times = (self.seconds_at_depth, self.seconds_at_deep)
        good = (
            len(self.widths) >= 2
            and all(len(row) == len(self.widths) and min(row) > 0 for row in times)
            and self.widths == tuple(sorted(set(self.widths)))
            and self.widths[0] == 1
            and self.depth < self.deep
            and set(self.same_bits) <= set(self.widths)
            and self.widths[-1] in self.same_bits
        )
        if not good:
            raise ValueError("not a verify curve")

    def seconds(self, width: int, depth: int) -> float:
        """A run of `width` rows behind `depth` tokens."""
        shallow, slope = self.line(width)
        return shallow + slope * max(depth - self.depth, 0)

    def line(self, width: int) -> tuple[float, float]:
        """Seconds of a run of `width` rows behind `self.depth` tokens, and what each further token adds."""
        shallow = _line(width, self.widths, self.seconds_at_depth)
        deep = _line(width, self.widths, self.seconds_at_deep)
        return shallow, max(deep - shallow, 0.0) / (self.deep - self.depth)


def verify_curve(session: Session, measuring: Callable[[], None] = lambda: None, *, fresh: bool = False) -> VerifyCurve:
    """Of this model, machine, device and number of threads: measured in two seconds, once, and kept in the cache.

    `measuring` is called before it is measured; `fresh` measures it anew.
    """
    path = cache_path("curves", session, _VERSION)
    return remembered(path, VerifyCurve, lambda: measure_curve(session), measuring, fresh=fresh)


def remembered(
    path: Path, kind: Callable[..., Curve], measure: Callable[[], Curve], measuring: Callable[[], None], *, fresh: bool
) -> Curve:
    """What the cache has at `path`, a dataclass of this `kind`; else, or if `fresh`, what `measure` makes."""
    known = None if fresh else _read(path, kind)
    if known is not None:
        return known
    measuring()
    curve = measure()
    try:
        write_atomically(path, json.dumps(asdict(cast(Any, curve))).encode())
    except OSError:
        return curve  # a read-only cache: measured again next time, nothing else
    return curve


def _read(path: Path, kind: Callable[..., Curve]) -> Curve | None:
    """None where it was never measured, or the entry is damaged."""
    try:
        return kind(**read_tuples(path))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def read_tuples(path: Path) -> dict[str, Any]:
    """A JSON object with its lists as tuples, other values as integers. Raises what reading damaged JSON raises."""
    raw = json.loads(path.read_bytes())
    return {name: tuple(v) if isinstance(v, list) else int(v) for name, v in raw.items()}


def measure_curve(session: Session, budget: float = _BUDGET) -> VerifyCurve:
    """Time runs of every width in turn, so that a slow moment meets them all; takes about `budget` seconds, more
    where a model needs it for three runs of each."""
    context = session.artifact.manifest.model["context_length"]  # whatever --ctx is: the curve is kept for all
    binding = session.bind(session.new_cache(limit=context))
    depth, deep = min(_SHALLOW, context // 4), min(_DEEP, context // 2)
    ids = np.random.default_rng(0).integers(session.vocab_size, size=_SHALLOW + WIDTHS[-1])
    prefill(binding, ids[:depth].tolist())
    step = min(_time(binding, 1, depth) for _ in range(2))
    slow = step * 2 * sum(WIDTHS) / 8 * (_LEAST + 1) > 4 * budget  # 8 rows are guessed to cost 2 steps
    widths = tuple(width for width in (_FEW if slow else WIDTHS) if width <= max(context // 4, 2))
    times: dict[tuple[int, int], list[float]] = {(width, depth): [] for width in widths}
    times |= {(width, deep): [] for width in (1, widths[-1])}
    started = time.perf_counter()
    for repetition in range(_REPETITIONS):
        if repetition >= _LEAST and time.perf_counter() - started > budget:
            break
        for (width, at), taken in times.items():
            taken.append(_time(binding, width, at))
    same = _same_bits(binding, ids[depth:], widths, depth)
    best = {key: min(taken[1:]) for key, taken in times.items()}  # the first one binds and allocates
    shallow = [best[width, depth] for width in widths]
    ends = [max(best[width, deep] - best[width, depth], 0.0) for width in (1, widths[-1])]
    added = np.interp(widths, (1, widths[-1]), ends).tolist()
    return VerifyCurve(widths, depth, tuple(shallow), deep, tuple(map(sum, zip(shallow, added, strict=True))), same)


def _same_bits(binding: Binding, ids: NDArray[np.int64], widths: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The widths above 1 that give the widest run's logits for its rows, a few runs each.

    A row alone is left out: it has kernels of its own, and in a small model agrees now and then by chance.
    """
    widest, same = widths[-1], []
    wanted = _logits(binding, ids[:widest], depth).copy()
    for width in widths[1:]:
        firsts = range(widest - width, -1, -width)[:_CHECKS]
        rows = [slice(first, first + width) for first in firsts]  # from the end: what is before them stays untouched
        if all(np.array_equal(_logits(binding, ids[part], depth + part.start), wanted[part]) for part in rows):
            same.append(width)
        else:
            _logits(binding, ids[:widest], depth)  # with other keys and values than the widest run's
    return tuple(same)


def _logits(binding: Binding, ids: NDArray[np.int64], at: int) -> NDArray[np.float32]:
    binding.cache.length = at
    return binding.run(ids, rows=len(ids))


def _time(binding: Binding, width: int, depth: int) -> float:
    """Seconds of one run. A deep cache holds zeros, which take as long as keys and values that mean something."""
    binding.cache.reserve(depth + width)
    binding.cache.length = depth
    ids, candidates = np.arange(width), min(binding.most_candidates, 2)  # on a device, as greedy verification has it
    start = time.perf_counter()
    advance(binding, ids, candidates, width, 0)
    return time.perf_counter() - start


def _line(width: int, widths: tuple[int, ...], seconds: tuple[float, ...]) -> float:
    if width <= widths[-1]:
        return float(np.interp(width, widths, seconds))
    slope = (seconds[-1] - seconds[-2]) / (widths[-1] - widths[-2])
    return seconds[-1] + max(slope, 0.0) * (width - widths[-1])


def cache_path(folder: str, session: Session, *what: object) -> Path:
    """Where `what` was measured of the model of `session` is kept: for this machine, device and number of threads."""
    files = session.artifact.manifest.files
    parts = [
        *what,
        *(files[name]["sha256"] for name in (GRAPH, WEIGHTS)),
        cpu_name(),
        session.device,
        gpu_name() if session.device == "cuda" else "",
        session.threads,
        ort_version(),
    ]
    return cache_dir() / folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"
