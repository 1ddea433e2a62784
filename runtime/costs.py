"""What runs and drafts are expected to take: by their measured curves, and as observed since."""

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters.curve import DraftCurve
from dsopt.runtime.session import PREFILL_CHUNK

MOST = 31  # tokens of a draft: the verify curve ends at 32 rows
RATE = 0.1  # weight of the newest observation in a running mean


class Pace:
    """How much slower than the curve runs are now: all of them, and each width against all."""

    def __init__(self) -> None:
        self._all, self._seen = 1.0, 0
        self._widths = np.ones(PREFILL_CHUNK + 1)

    def of(self, width: int) -> float:
        return self._all * float(self._widths[width])

    def of_each(self, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._all * self._widths[widths]

    def observe(self, width: int, ratio: float) -> None:
        """`ratio`: what a run took against what was expected."""
        ratio = min(max(ratio, 0.5), 2.0)  # one hiccup says little
        self._seen += 1
        self._all *= ratio ** max(RATE / 2, 1 / (self._seen + 1))  # the machine may be another one than it was
        self._widths[width] *= ratio ** (RATE / 2)


class DraftCost:
    """Seconds of drafting so many tokens, by the draft curve where there is one, and as observed since; of reading, by
    the curve and by what the last piece took against it."""

    def __init__(self, curve: DraftCurve | None) -> None:
        self._curve, self._reading = curve, 1.0
        self._by_curve: dict[int, float] = {}  # seconds of reading: the same few counts are asked for at every token
        self._known = dict(zip(curve.counts, curve.draft_seconds, strict=True)) if curve else {}
        self._estimates = np.zeros(MOST + 1)
        if self._known:
            self._estimate()

    @property
    def is_known(self) -> bool:
        return bool(self._known)

    def of(self, count: int) -> float:
        """Estimated; in proportion beyond the counts known, 0 before the first."""
        return float(self._estimates[count])

    def up_to(self, count: int) -> NDArray[np.float64]:
        """Of 1 to `count` tokens."""
        return self._estimates[1 : count + 1]

    def observe(self, asked: int, seconds: float) -> None:
        known = self.of(asked) or seconds
        self._known[asked] = known + RATE * (min(seconds, 2 * known) - known)
        self._estimate()

    def _estimate(self) -> None:
        counts = sorted(self._known)
        most, slope = counts[-1], self._known[counts[-1]] / counts[-1]
        inside = np.interp(range(most + 1), [0, *counts], [0.0, *(self._known[n] for n in counts)])
        self._estimates = np.concatenate([inside, slope * np.arange(most + 1, MOST + 1)])

    def of_reading(self, count: int) -> float:
        if self._curve is None:
            return 0.0
        if count not in self._by_curve:
            self._by_curve[count] = self._curve.reading(count)
        return self._by_curve[count] * self._reading

    def observe_reading(self, count: int, seconds: float) -> None:
        assert self._curve is not None
        self._reading = min(max(seconds / self._curve.reading(count), 0.5), 8.0)  # deep in a text it takes longer
