"""How many tokens to draft and to verify in a round, by what the rounds cost on this machine.

The length is the one with the most tokens a second: (1 + sum of the cumulative survival) / (draft time + verify
time(width)), Algorithm 1 of DSpark (arXiv:2607.05147) for one request, with the measured verify curve as its table.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.costs import MOST, RATE, DraftCost, Pace
from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.curve import DraftCurve
from dsopt.runtime.drafters.experience import Experience
from dsopt.runtime.session import PREFILL_CHUNK

_MARGIN = 1.02  # how much better than plain decoding a draft must promise to be
_LOSS = 0.02  # share of the time that speculation may have lost, and plain steps that it may lose on top,
_GRANT, _FREE_GRANT = 2.0, 0.6  # fewer where drafts are free: what copies the text learns without trying
_SHARED_LOSS = 0.01  # share of each, where one that copies and one that reads draft
_ODDS = 1.5  # what a start on experience must promise for each second that it stakes
_DOUBT = 4.0  # how much more must have been saved up to start a drafter that gained nothing before
BEGINNING = 512  # tokens that a drafter begins with, at most: it goes by what stands near
_WINDOWS = (BEGINNING, 256, 128, 64, 32)
_MOST_GAIN = 0.5  # of the steps that are left a drafter hardly saves more
_WON = 6.0  # plain steps won that may be lost again before anyone looks
_SURVIVAL = 0.75  # of a draft's tokens, each given those before it, until counted
_FIRST = 4  # tokens asked for until the cost of drafts is known
_FREE = 0.01  # drafts that cost less than this share of a step are asked for as long as they go
_NEAR = 8  # unread tokens that a draft reads itself: what a round accepts, as its cost was measured


@dataclass(frozen=True, slots=True)
class Round:
    """What a round was: tokens in the cache before it; drafted tokens asked for, verified, accepted; tokens given;
    seconds of drafting, of verifying, and of bookkeeping that plain decoding has not."""

    depth: int
    asked: int
    verified: int
    accepted: int
    emitted: int
    drafting: float
    verifying: float
    aside: float = 0.0


@dataclass(frozen=True)
class Reader:
    """What is known beforehand of a drafter that must read the sequence: its costs, and what it was worth so far.

    beside: it drafts where one that copies the text is not sure.
    """

    curve: DraftCurve
    experience: Experience
    beside: bool = False


def padded(widths: tuple[int, ...], rows: int) -> int:
    """The rows of a run in which `rows` are needed: the next of `widths`, rising, () for any number."""
    return next((width for width in widths if width >= rows), rows)


class Scheduler:
    """Decides by the curve, by the drafter's survival estimates and by what rounds really cost and gave.

    `widths`: what runs are padded to (exact mode). What speculation loses against plain decoding is kept in an account:
    while that is more than a small share of the time so far, nothing is drafted. Time passes, and so the next attempt
    comes by itself, at a cost that is bounded for good.

    `reader`: of a drafter that must read before it can draft, None for one that need not. Its reading is paid from the
    same account, and nothing is read or drafted that the account could not bear if all of it were in vain. So it begins
    late, when plain decoding has gone on for so long that the attempt is a small share of it; or at once, where
    experience promises more than is staked and as much was won before.
    """

    def __init__(self, curve: VerifyCurve, widths: tuple[int, ...] = (), reader: Reader | None = None) -> None:
        self._curve, self._widths, self.reader = curve, widths, reader
        self._share = _SHARED_LOSS if reader and reader.beside else _LOSS
        self._lines: dict[int, tuple[float, float]] = {}  # of the curve, by width
        # Of runs that verify 1 to MOST tokens, which are asked for together: rows, and lines of the curve.
        self._rows = np.array([padded(widths, drafted + 1) for drafted in range(1, MOST + 1)])
        self._shallow, self._slope = np.array([curve.line(int(rows)) for rows in self._rows]).T
        self._pace = Pace()
        self._cost = DraftCost(reader.curve if reader else None)
        self._survival = np.cumprod(np.full(MOST, _SURVIVAL))
        self.begin()

    def begin(self) -> None:
        """A new sequence: the accounts are empty, the drafter knows nothing of it."""
        self._elapsed = 0.0
        self._lost = 0.0  # seconds, by reading and by drafts that cost something
        self._lost_free = 0.0  # by drafts that cost nothing but their verification
        self._stake: float | None = None  # seconds that may be lost on top, once that is decided
        self._reading, self._begun, self._unread = False, False, _NEAR + 1
        self._started = self._gained = self._paid = 0.0  # plain steps: since it had read; won; paid for all else

    def plain_seconds(self, depth: int) -> float:
        """What one token of plain decoding takes, now."""
        return self._run_seconds(1, depth)

    def keep(self, cached: int, prompt: int, left: int) -> int:
        """How many of `cached` tokens of a prompt of `prompt` tokens stay as they are; those behind them are computed
        anew, so that the drafter sees the layers it reads. An answer may have `left` tokens.

        In exact mode all stay: computed in other pieces they could have other bits.
        """
        if self.reader is None:
            return 0
        kept = self.too_far(prompt)
        if kept >= cached or self._widths:
            return cached
        chunks, rest = divmod(cached - kept, PREFILL_CHUNK)
        seconds = chunks * self._run_seconds(PREFILL_CHUNK, kept) + (self._run_seconds(rest, kept) if rest else 0.0)
        stake = self._worth_staking(prompt, left - 1, prompt, seconds)
        if not stake:
            return cached  # whether to stake on what comes behind them is another question
        self._stake = stake
        self._pay(seconds, cached)
        return kept

    def too_far(self, unread: int) -> int:
        """How many of so many unread tokens, the first ones, will not be read, whenever reading begins."""
        return max(unread - BEGINNING, 0) if self.reader is not None else 0

    def read(self, depth: int, room: int, unread: int) -> tuple[int, int]:
        """What the drafter is to do now, beside a plain step, about the `unread` tokens: leave out so many, the first
        ones, for good; and read so many behind them. `room`: tokens that the answer may have beyond the next.

        Reading begins when the account bears all of it and a draft. Waiting alone would not bring it there where a
        token costs more to read than a step adds to the account; then the latest tokens must do.
        """
        self._unread, left_out = unread, 0
        if self.reader is not None and self._stake is None:
            self._stake = self._worth_staking(depth, room, unread)
        if self.reader is None or unread <= _NEAR or room < 1:
            self._reading = False
            return self.too_far(unread), 0
        if not self._reading:
            window = self._window(depth, room, unread)
            self._reading, left_out = window > 0, unread - window
        chunk = min(unread - left_out, PREFILL_CHUNK)
        if not self._reading or self._lost + self._cost.of_reading(chunk) > self._grant(depth):
            self._reading = False  # where it has begun, it turned out dearer than was expected
            return self.too_far(unread), 0
        self._unread = unread - left_out - chunk
        return left_out, chunk

    def give_up(self) -> None:
        """The drafter that must read cannot draft for this sequence any more."""
        self._reading, self._begun, self._unread = False, False, _NEAR + 1

    def observe_reading(self, depth: int, count: int, seconds: float) -> None:
        """So many tokens were read."""
        self._cost.observe_reading(count, seconds)
        self._pay(seconds, depth)

    def ask(self, depth: int, room: int) -> int:
        """How many tokens to ask the drafter for, at most `room`; 0 leaves it alone. Looks at past rounds only.

        Of a drafter with a part that copies the text, all but that.
        """
        room = min(room, MOST)
        if room < 1 or (self.reader is not None and self._unread > _NEAR):
            return 0
        step, left = self._seconds(0, depth), self._grant(depth) - self._lost
        if self.reader is None and self._cost.of(room) < _FREE * step:
            return self.ask_free(depth, room)
        rates, risks = self._prospects(depth, room)
        borne = risks <= left
        return int(np.argmax(np.where(borne, rates, 0))) + 1 if borne.any() else 0

    def ask_free(self, depth: int, room: int) -> int:
        """As `ask`, of drafts that cost nothing."""
        room = min(room, MOST)
        most = room if self._cost.is_known else min(room, _FIRST)
        borne = self._lost_free < _FREE_GRANT * self._seconds(0, depth) + self._share * self._elapsed
        return most if borne else 0

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
            self._survival[position] += RATE * ((done.accepted > position) - self._survival[position])
        step = self._seconds(0, done.depth)
        free = done.drafting <= _FREE * step
        if done.asked and not (free and self.reader):
            self._cost.observe(done.asked, done.drafting)
        verifying = min(done.verifying, 2 * expected)  # a hiccup of the machine is no loss
        self._elapsed += done.drafting + verifying + done.aside
        self._lost += done.aside
        if self.reader is None:  # else that one bears it
            self._lost_free += done.aside
        self._paid += done.aside / step
        won = done.emitted - (done.drafting + verifying) / step if done.asked else 0.0
        if free and done.verified:
            self._lost_free = max(self._lost_free - won * step, -_WON * step)
        elif not free:
            self._lost = max(self._lost - won * step, -_WON * step)
            self._gained += won
        self._begun = self._begun or self._unread <= _NEAR
        self._started += done.emitted * self._begun

    def end(self, emitted: int, *, ended: bool) -> None:
        """The answer has so many tokens; `ended`: not because no more were wanted. Experience is noted."""
        if self.reader is None:
            return
        self.reader.experience.note(
            emitted, ended=ended, started=self._started, gained=self._gained, won=self._gained - self._paid
        )

    def _worth_staking(self, depth: int, room: int, unread: int, seconds: float = 0.0) -> float:
        """Seconds to stake on reading at once: that, two attempts, and `seconds`. 0 where experience does not promise
        more within `room` tokens, or less was won so far."""
        assert self.reader is not None
        step, experience = self._seconds(0, depth), self.reader.experience
        most = min(experience.won, experience.promise(room) / _ODDS) * step
        if room < 1 or most <= seconds:
            return 0.0
        whole = seconds + self._cost.of_reading(min(unread, BEGINNING)) + 2 * self._risk(depth, room)
        return whole if most >= whole else 0.0

    def _risk(self, depth: int, room: int) -> float:
        """Seconds lost where a draft of the length that is best is all wrong."""
        rates, risks = self._prospects(depth, min(room, MOST))
        return float(risks[np.argmax(rates)])

    def _window(self, depth: int, room: int, unread: int) -> int:
        """How many of the unread tokens to read, the latest, to begin with; 0 to wait. As many as the account bears,
        and the rest of the answer could pay for."""
        borne = min(self._grant(depth) - self._lost, _MOST_GAIN * room * self._seconds(0, depth))
        if self.reader is not None and self.reader.experience.disappoints:
            borne /= _DOUBT
        least = min(unread, _WINDOWS[-1])
        if self._cost.of_reading(least) > borne:
            return 0  # as nearly always, and so asked first
        borne -= self._risk(depth, room)
        sizes = (min(unread, window) for window in _WINDOWS)
        return next((size for size in sizes if self._cost.of_reading(size) <= borne), 0)

    def _prospects(self, depth: int, room: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of rounds that draft 1 to `room` tokens: tokens a second, and seconds lost where none is accepted."""
        deeper = max(depth - self._curve.depth, 0)
        runs = (self._shallow[:room] + self._slope[:room] * deeper) * self._pace.of_each(self._rows[:room])
        seconds = self._cost.up_to(room) + runs
        tokens = 1 + np.cumsum(self._survival[:room])
        return tokens / seconds, seconds - self._seconds(0, depth)

    def _grant(self, depth: int) -> float:
        """Seconds that may have been lost by now."""
        if self.reader is None:
            return _GRANT * self._seconds(0, depth) + self._share * self._elapsed
        return (self._stake or 0.0) + self._share * self._elapsed

    def _pay(self, seconds: float, depth: int) -> None:
        self._lost += seconds
        self._elapsed += seconds
        self._paid += seconds / self._seconds(0, depth)

    def _seconds(self, drafted: int, depth: int) -> float:
        """What a run takes that verifies so many tokens."""
        return self._run_seconds(padded(self._widths, drafted + 1), depth)

    def _run_seconds(self, width: int, depth: int) -> float:
        if width not in self._lines:
            self._lines[width] = self._curve.line(width)
        shallow, slope = self._lines[width]
        return (shallow + slope * max(depth - self._curve.depth, 0)) * self._pace.of(width)
