"""Times of linear layers on one machine, asked for by shape, weight format and number of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dsopt.compiler.recipe import Format
from dsopt.compiler.safetensors_dir import read_json
from dsopt.runtime.errors import DsoptError

Cell = tuple[int, int, str, int]  # N, K, format, rows


def canonical(format: Format | str) -> str:
    """The one name of a format: int4 for int4-b32."""
    return str(Format.parse(format) if isinstance(format, str) else format)


@dataclass(frozen=True)
class KernelTable:
    """Seconds of one linear layer y [rows, N] = x [rows, K] W^T by (N, K, format, rows), on one machine."""

    machine: Mapping[str, Any]
    cells: Mapping[Cell, float]
    bodies: Mapping[int, float] = field(default_factory=dict)  # rows -> seconds of one block without its linears
    narrow_bodies: Mapping[int, float] = field(default_factory=dict)  # the same with a cache in int8

    @property
    def target(self) -> str:
        """The name of the target whose kernels were timed."""
        return str(self.machine.get("target", "cpu"))

    @property
    def dtype(self) -> str:
        """Of the activations."""
        return str(self.machine.get("dtype", "fp32"))

    @property
    def float_bytes(self) -> int:
        """Of a float of the graphs that it is for."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def formats(self) -> frozenset[str]:
        """What was timed."""
        return frozenset(form for _, _, form, _ in self.cells)

    def time(self, n: int, k: int, format: Format | str, rows: float) -> float:
        """Seconds of one layer; between measured rows and beyond them along the line through the two nearest.

        A shape that was not measured is taken from the others of its format: a fixed cost and a cost a weight,
        fitted. Raises DsoptError on a format that was not measured.
        """
        form = canonical(format)
        points = {m: t for (n_, k_, f, m), t in self.cells.items() if (n_, k_, f) == (n, k, form)}
        return _interpolate(points or self._fitted(n, k, form), rows)

    def other(self, rows: float, cache: str = "float") -> float:
        """Seconds of what is not a linear layer (attention, norms, activation) in one block; cache: float or int8."""
        bodies = self.bodies if cache == "float" else self.narrow_bodies
        if not bodies:
            raise DsoptError("the kernel table has no times of attention and norms; measure it with a body")
        return _interpolate(bodies, rows)

    def _fitted(self, n: int, k: int, form: str) -> dict[int, float]:
        found: dict[int, list[tuple[int, float]]] = {}
        for (n_, k_, f, m), seconds in self.cells.items():
            if f == form:
                found.setdefault(m, []).append((n_ * k_, seconds))
        if not found:
            raise DsoptError(f"the kernel table has no times of {form}; measure it with that format")
        return {m: _affine(points, n * k) for m, points in found.items()}

    def to_json(self) -> dict[str, Any]:
        """For the manifest's `profile`: the machine, and microseconds by shape, format and rows."""
        linears: dict[str, dict[str, dict[str, float]]] = {}
        for (n, k, form, rows), seconds in sorted(self.cells.items()):
            linears.setdefault(f"{n}x{k}", {}).setdefault(form, {})[str(rows)] = round(1e6 * seconds, 2)
        other, narrow = (
            {str(rows): round(1e6 * seconds, 2) for rows, seconds in sorted(bodies.items())}
            for bodies in (self.bodies, self.narrow_bodies)
        )
        told = {"machine": dict(self.machine), "microseconds": linears, "other_microseconds": other}
        return {**told, "other_int8_cache_microseconds": narrow} if narrow else told

    @classmethod
    def read(cls, path: Path, hint: str) -> "KernelTable":
        """That of a `dsopt.json`. Raises DsoptError, ending in `hint`, when it is missing or has none."""
        data = read_json(path, hint)
        if not data.get("profile"):
            raise DsoptError(f"{path} has no kernel times; {hint}")
        return cls.from_json(data["profile"])

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "KernelTable":
        """Raises DsoptError when `data` is not what `to_json` gave."""
        try:
            cells = {
                (*map(int, shape.split("x")), form, int(rows)): 1e-6 * float(us)
                for shape, formats in data["microseconds"].items()
                for form, times in formats.items()
                for rows, us in times.items()
            }
            bodies, narrow = (
                {int(rows): 1e-6 * float(us) for rows, us in times.items()}
                for times in (data["other_microseconds"], data.get("other_int8_cache_microseconds", {}))
            )
            return cls(dict(data["machine"]), cells, bodies, narrow)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DsoptError(f"not a kernel table ({error!r}); measure it again") from error


def _interpolate(points: Mapping[int, float], rows: float) -> float:
    known = sorted(points.items())
    if rows <= known[0][0]:
        return known[0][1]
    if len(known) == 1:
        return known[0][1] * rows / known[0][0]
    pairs = list(pairwise(known))
    (m0, t0), (m1, t1) = next((pair for pair in pairs if rows <= pair[1][0]), pairs[-1])
    return t0 + (t1 - t0) * (rows - m0) / (m1 - m0)


def _affine(points: Sequence[tuple[int, float]], weights: int) -> float:
    """seconds = a + b weights through the points, with the least relative error; a and b not negative."""
    x, y = (np.array(column, float) for column in zip(*points, strict=True))
    proportional = weights * float(np.mean(y / x))
    if len(points) == 1:
        return proportional
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones_like(y), rcond=None)
    return float(a + b * weights) if a >= 0 and b >= 0 else proportional
