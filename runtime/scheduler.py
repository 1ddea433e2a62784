"""How many tokens to draft and to verify in a round, by what the rounds cost on this machine.

The length is the one with the most tokens a second: (1 + sum of the cumulative survival) / (draft time + verify
time(width)), Algorithm 1 of DSpark (arXiv:2607.05147) for one request, with the measured verify curve as its table.
"""

from dataclasses import dataclass

import numpy as np

from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.drafters import Draft

MOST = 31  # tokens of a draft: the verify curve ends at 32 rows
_MARGIN = 1.02  # how much better than plain decoding a draft must promise to be
_LOSS = 0.015  # share of the time that speculation may have lost, and plain steps that it may lose on top,
_GRANT, _FREE_GRANT = 2.0, 1.0  # fewer where drafts are free: what copies the text learns without trying
_WON = 6.0  # plain steps won that may be lost again before anyone looks
_RATE = 0.1  # weight of the newest observation in a running mean
_SURVIVAL = 0.75  # of a draft's tokens, each given those before it, until counted
_FIRST = 4  # tokens asked for until the cost of drafts is known
_FREE = 0.01  # drafts that cost less than this share of a step are asked for as long as they go


@dataclass(frozen=True, slots=True)
class Round:
    """What a round was: tokens in the cache before it; drafted tokens asked for, verified, accepted; tokens given;
    seconds of drafting and of verifying."""

    depth: int
    asked: int
    verified: int
    accepted: int
    emitted: int
    drafting: float
    verifying: float


def padded(widths: tuple[int, ...], rows: int) -> int:
    """The rows of a run in which `rows` are needed: the next of `widths`, rising, () for any number."""
    return next((width for width in widths if width >= rows), rows)


class Scheduler:
    """Decides by the curve, by the drafter's survival estimates and by what rounds really cost and gave.

    `widths`: what runs are padded to (exact mode). What speculation loses against plain
    decoding is kept in an account: while that is more than a small share of the time so far, nothing is drafted. Time
    passes, and so the next attempt comes by itself, at a cost that is bounded for good.
    """

    def __init__(self, curve: VerifyCurve, widths: tuple[int, ...] = ()) -> None:
        self._curve, self._widths = curve, widths
        self._lines: dict[int, tuple[float, float]] = {}  # of the curve, by width
        self._pace = _Pace()
        self._cost = _DraftCost()
        self._survival = np.cumprod(np.full(MOST, _SURVIVAL))
        self.begin()

    def begin(self) -> None:
        """A new sequence: the account is empty, the drafter knows nothing of it."""
        self._lost = self._elapsed = 0.0
        self._cost.begin()

    def plain_seconds(self, depth: int) -> float:
        """What one token of plain decoding takes, now."""
        return self._run_seconds(1, depth)

    def ask(self, depth: int, room: int) -> int:
        """How many tokens to ask the drafter for, at most `room`; 0 leaves it alone. Looks at past rounds only."""
        room = min(room, MOST)
        step = self._seconds(0, depth)
        if room < 1:
            return 0
        if self._cost.of(room) < _FREE * step:
            most = room if self._cost.is_known else min(room, _FIRST)
            return most if self._lost < _FREE_GRANT * step + _LOSS * self._elapsed else 0
        grant = _GRANT * step + _LOSS * self._elapsed
        tokens = 1 + np.concatenate([[0], np.cumsum(self._survival[:room])])
        seconds = np.array([self._cost.of(n) + self._seconds(n, depth) for n in range(room + 1)])
        best = int(np.argmax(tokens[1:] / seconds[1:])) + 1
        loss = seconds[best] - tokens[best] * step / _MARGIN
        if loss < 0 and self._lost < grant:
            return best
        return best if self._lost + loss + self._cost.to_catch_up() < grant else 0

    def cut(self, draft: Draft, depth: int, drafting: float, *, anticipate: bool) -> int:
        """How many tokens of `draft`, which took `drafting` seconds, to verify.

        The best of all lengths if `anticipate`; else the first after which the next is no better, so that whether a
        token is verified depends on none that was drawn with or after it (section 4.2, Appendix A).
        """
        survival = np.cumprod(draft.survival) if draft.survival else self._survival
        best, count = _MARGIN / (drafting + self._seconds(0, depth)), 0
        tokens = 1.0
        for length in range(1, min(len(draft.tokens), MOST) + 1):
            tokens += survival[length - 1]
            rate = tokens / (drafting + self._seconds(length, depth))
            if rate > best:
                best, count = rate, length
            elif not anticipate:
                break
        return count

    def observe(self, done: Round) -> None:
        """Learn from a round."""
        width = padded(self._widths, done.verified + 1)
        expected = self._run_seconds(width, done.depth)
        self._pace.observe(width, done.verifying / expected)
        for position in range(done.verified):
            self._survival[position] += _RATE * ((done.accepted > position) - self._survival[position])
        drafting = self._cost.observe(done.asked, done.drafting, done.emitted)
        step = self._seconds(0, done.depth)
        verifying = min(done.verifying, 2 * expected)  # a hiccup of the machine is no loss
        self._elapsed += drafting + verifying
        if done.asked and (done.verified or drafting > _FREE * step):
            self._lost = max(self._lost + drafting + verifying - done.emitted * step, -_WON * step)

    def _seconds(self, drafted: int, depth: int) -> float:
        """What a run takes that verifies so many tokens."""
        return self._run_seconds(padded(self._widths, drafted + 1), depth)

    def _run_seconds(self, width: int, depth: int) -> float:
        if width not in self._lines:
            self._lines[width] = self._curve.line(width)
        shallow, slope = self._lines[width]
        return (shallow + slope * max(depth - self._curve.depth, 0)) * self._pace.of(width)


class _Pace:
    """How much slower than the curve runs are now: all of them, and each width against all."""

    def __init__(self) -> None:
        self._all = 1.0
        self._widths: dict[int, float] = {}

    def of(self, width: int) -> float:
        return self._all * self._widths.get(width, 1.0)

    def observe(self, width: int, ratio: float) -> None:
        """`ratio`: what a run took against what was expected."""
        ratio = min(max(ratio, 0.5), 2.0)  # one hiccup says little
        self._all *= ratio ** (_RATE / 2)
        self._widths[width] = self._widths.get(width, 1.0) * ratio ** (_RATE / 2)


class _DraftCost:
    """Seconds of drafting so many tokens; what the drafter must read first is counted apart."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._reading = 0.0  # a token
        self.begin()

    def begin(self) -> None:
        self._unread, self._begun = 0, False

    @property
    def is_known(self) -> bool:
        return bool(self._seconds)

    def of(self, count: int) -> float:
        """Estimated; in proportion to the nearest count known, 0 before the first."""
        if count == 0 or not self._seconds:
            return 0.0
        nearest = min(self._seconds, key=lambda known: abs(known - count))
        return self._seconds[nearest] * count / nearest

    def to_catch_up(self) -> float:
        """Seconds for the tokens given since the last draft, beyond what every draft reads."""
        return self._reading * self._unread

    def observe(self, asked: int, seconds: float, emitted: int) -> float:
        """Returns the seconds without those of reading a prompt or a long pause."""
        if not asked:
            self._unread += emitted
            return seconds
        unread, self._unread, begun = self._unread, 0, self._begun
        self._begun = True
        if not begun:
            return 0.0
        known = self._seconds.get(asked)
        if unread > MOST:
            self._reading = max(seconds - self.of(asked), 0.0) / unread
            return seconds
        self._seconds[asked] = seconds if known is None else known + _RATE * (min(seconds, 2 * known) - known)
        return seconds
