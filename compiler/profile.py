"""The kernel table of this machine: how long one linear layer takes, by shape, weight format and number of rows.

Measured, not modelled: which kernel is fastest depends on the processor, the library and the number of rows in ways
that no table of peak rates tells. It takes seconds, and what was measured is kept in the user's cache.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import onnxruntime as ort

from dsopt.compiler.chains import Body, Chain, body_chain, forget_pools, linear_chain
from dsopt.compiler.kernel_table import Cell, KernelTable, canonical
from dsopt.compiler.recipe import Format
from dsopt.compiler.targets import find_target
from dsopt.runtime.files import cache_dir, write_atomically
from dsopt.runtime.machine import cpu_name, gpu_name
from dsopt.runtime.session import Session, default_threads

ROWS = (1, 2, 4, 8, 16, 128, 512)
FORMATS = ("none", "int4", "int4-zp", "int4-b64", "int4-b128", "int8", "int8-b64", "w8a8", "fp8")
PAST = 256  # cached positions behind which attention is timed

_TRAFFIC = 64 << 20  # bytes of weights a run reads at least: more than a cache holds,
_DEVICE_TRAFFIC = 256 << 20  # a card's of 50 MB too
_FEW_ROWS = 32  # from here on arithmetic hides the reading, and a short chain tells as much
_VERSION = 4  # of what is timed: cells of another are measured again
_SHORT, _LONGEST, _BODIES = 2, 400, 8  # copies then, at most, and of blocks
_DEVICE_SHORT = 8  # a card takes microseconds where the call around it takes tens of them
_MOST = {"cpu": 1 << 33, "cuda": 1 << 37}  # multiplications of a cell; larger ones are left to extrapolation
_ROUNDS = 3, 19  # at least, at most; and before them one that warms up

Progress = Callable[[int, int], None]  # cells measured, cells in all
Shape = tuple[int, int]  # N, K


def measure(
    shapes: Iterable[Shape] | Mapping[Shape, Sequence[Format | str]],
    rows: Sequence[int] = ROWS,
    formats: Iterable[Format | str] | None = None,
    target: str = "cpu",
    *,
    dtype: str | None = None,
    body: Body | None = None,
    caches: Sequence[str] = ("float",),
    threads: int | None = None,
    budget: float = 20.0,
    progress: Progress = lambda done, total: None,
) -> KernelTable:
    """The table of these (N, K) shapes; what the cache has not is measured, in about `budget` seconds and as many as it
    takes to make the graphs.

    Each time is of several rounds in which the formats of a shape take turns: what else runs on the machine slows all
    of them, by a tenth more or less from one minute to the next. So where one format is not known yet, all of the shape
    are measured again. `formats` are those of FORMATS that the target has unless said, here or for each
    shape; `dtype` (of activations and scales) is the target's first; `body` asks for the times of what stands between
    the linear layers too, with each of `caches`: float, int8.
    """
    chosen = find_target(target)
    floats = chosen.check_dtype(dtype)
    threads = Session.share_pool(threads or default_threads())
    store = _Store(_machine(chosen.name, floats, threads))
    usual = [form for form in FORMATS if form in chosen.linears[floats]] if formats is None else list(formats)
    by_shape = shapes if isinstance(shapes, Mapping) else dict.fromkeys(shapes, usual)
    wanted = [
        (n, k, form, m)
        for (n, k), offered in by_shape.items()
        for m in rows
        for form in dict.fromkeys(map(canonical, offered))
        if n * k * m <= _MOST[target]
    ]
    groups = [cells for cells in _by_shape(wanted) if not store.has(cells)]

    def make(cell: Cell) -> Chain:
        n, k, form, few = cell
        return linear_chain(Format.parse(form), n, k, _copies(form, n, k, few, chosen.device), chosen, floats)

    deadline, total = time.perf_counter() + budget, sum(map(len, groups))
    for number, cells in enumerate(groups):
        share = (deadline - time.perf_counter()) / (len(groups) - number)
        store.add(_in_turn(cells, make, share))
        progress(sum(map(len, groups[: number + 1])), total)
    bodies: dict[str, dict[int, float]] = {"float": {}, "int8": {}}
    if body is not None:
        kinds = {f"{body.name}@{PAST}{'-int8' * (cache == 'int8')}": cache for cache in caches}
        asked = [(0, 0, kind, m) for kind in kinds for m in rows]
        if not store.has(asked):
            store.add(
                _in_turn(
                    asked, lambda cell: body_chain(body, PAST, _BODIES, chosen, floats, kinds[cell[2]]), budget / 10
                )
            )
        for cell in asked:
            bodies[kinds[cell[2]]][cell[3]] = store.seconds(cell)
    forget_pools()
    return KernelTable(store.machine, {cell: store.seconds(cell) for cell in wanted}, bodies["float"], bodies["int8"])


def _by_shape(cells: Iterable[Cell]) -> list[list[Cell]]:
    groups: dict[Shape, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell[0], cell[1]), []).append(cell)
    return list(groups.values())


def _copies(form: str, n: int, k: int, rows: int, device: str) -> int:
    if rows >= _FEW_ROWS:
        return _SHORT if device == "cpu" else _DEVICE_SHORT
    nbytes = Format.parse(form).nbytes(n, k, 4 if device == "cpu" else 2)
    return min(-(-(_TRAFFIC if device == "cpu" else _DEVICE_TRAFFIC) // nbytes), _LONGEST)


def _in_turn(cells: Sequence[Cell], make: Callable[[Cell], Chain], seconds: float) -> dict[Cell, float]:
    """The times of cells by rounds over all of them, until `seconds` are over."""
    chains: dict[tuple[str, bool], Chain] = {}
    in_order = sorted(cells, key=lambda cell: cell[3])  # the formats of a number of rows side by side

    def run(cell: Cell) -> float:
        key = cell[2], cell[3] >= _FEW_ROWS
        if key not in chains:
            chains[key] = make(cell)
        return chains[key].seconds(cell[3])

    for cell in in_order:
        run(cell)
    rounds: list[dict[Cell, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < _ROUNDS[0] or (len(rounds) < _ROUNDS[1] and time.perf_counter() < end):
        rounds.append({cell: run(cell) for cell in in_order})
    return settled(rounds)


def settled(rounds: Sequence[Mapping[Cell, float]]) -> dict[Cell, float]:
    """What rounds over the same cells come to. A slow round is slow for all formats of a number of rows, so each is the
    median of what it took beside the others of its round, at the pace of the fastest round: the least time of a format
    may be of a moment that the others never had."""
    found: dict[Cell, float] = {}
    for rows in {cell[3] for cell in rounds[0]}:
        formats = [cell for cell in rounds[0] if cell[3] == rows]
        times = np.array([[taken[cell] for cell in formats] for taken in rounds])
        paces = np.median(times, 1, keepdims=True)
        found.update(zip(formats, (np.median(times / paces, 0) * paces.min()).tolist(), strict=True))
    return found


def _machine(target: str, dtype: str, threads: int) -> dict[str, Any]:
    """What the times depend on."""
    return {
        "device": cpu_name() if target == "cpu" else gpu_name(),
        "target": target,
        "dtype": dtype,
        "threads": threads,
        "onnxruntime": ort.__version__,
    }


class _Store:
    """The cells known of one machine, in a file of the user's cache, and in which run each was timed."""

    def __init__(self, machine: Mapping[str, Any]) -> None:
        self.machine = machine
        digest = sha256(json.dumps([_VERSION, machine], sort_keys=True).encode()).hexdigest()
        self._path = cache_dir() / "kernels" / f"{digest[:16]}.json"
        self._known = self._read()

    def seconds(self, cell: Cell) -> float:
        return self._known[cell][0]

    def has(self, cells: Iterable[Cell]) -> bool:
        """Whether all are known, and were timed in turn."""
        runs = {self._known[cell][1] if cell in self._known else None for cell in cells}
        return None not in runs and len(runs) <= 1

    def _read(self) -> dict[Cell, tuple[float, int]]:
        try:
            data = json.loads(self._path.read_bytes())
            return {
                (int(n), int(k), str(form), int(m)): (float(seconds), int(run))
                for n, k, form, m, seconds, run in data["cells"]
            }
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # nothing measured yet, or a damaged file: measure

    def add(self, cells: Mapping[Cell, float]) -> None:
        """Take up what one run timed and write the file; what another process wrote meanwhile stays."""
        run = time.time_ns()
        made = {cell: (seconds, run) for cell, seconds in cells.items()}
        self._known.update(made)
        known = {**self._known, **self._read(), **made}
        data = {"machine": self.machine, "cells": [[*cell, *times] for cell, times in sorted(known.items())]}
        write_atomically(self._path, json.dumps(data).encode())
