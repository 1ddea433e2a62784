"""A toy model and a drafter that reads, by a clock that only their runs move."""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import numpy as np
from toy import ToyBinding, curve, random_table

from dsopt.runtime.costs import MOST
from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.decoder import decode
from dsopt.runtime.drafters import Draft, Drafter
from dsopt.runtime.drafters.curve import DraftCurve
from dsopt.runtime.drafters.experience import Experience
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.scheduler import Reader, Scheduler
from dsopt.runtime.speculate import Speculation, speculate
from dsopt.runtime.tally import Tally

VOCAB, CONTEXT = 8, 12000
TABLE = random_table(VOCAB)
TABLE[..., :] += np.random.default_rng(1).normal(0, 0.1, VOCAB)
RUNS = [1 + 0.1 * width for width in range(MOST + 1)]
STEP = RUNS[0]
PIECES, DRAFTS = (16, 128), (1, 4, 8)


class Timed(ToyBinding):
    """A run takes what the curve says."""

    def __init__(self, clock: SimpleNamespace, taps: tuple[int, ...] = ()) -> None:
        super().__init__(TABLE, CONTEXT, taps)
        self.clock = clock

    def run(self, ids: np.ndarray, rows: int = 1, keep: int | None = None) -> np.ndarray:
        self.clock.now += target().seconds(len(ids), 0)
        return super().run(ids, rows, keep)


def target() -> VerifyCurve:
    return curve(*RUNS)


def reading(count: int, depth: int = 0) -> float:
    """Seconds of reading `count` tokens at once; they grow with what was read before."""
    return (0.3 + 0.03 * count) * (1 + depth / 3000)


def drafting(count: int) -> float:
    return 0.05 + 0.2 * count


MEASURED = DraftCurve(DRAFTS, tuple(map(drafting, DRAFTS)), PIECES, tuple(map(reading, PIECES)))


class Slow:
    """Drafts what is given as the coming text, each token right with the chance `right`, once it has read."""

    def __init__(
        self, clock: SimpleNamespace, text: Sequence[int], right: float, taps: tuple[int, ...] = (), slower: float = 1
    ) -> None:
        self.clock, self.text, self.right, self.taps, self.slower = clock, text, right, taps, slower
        self._random = np.random.default_rng(0)
        self.largest = 0.0  # seconds of reading at once
        self.most_unread, self.context = 0, CONTEXT
        self.begin()

    def begin(self) -> None:
        self.seen = self.read_up_to = self.left_out = 0

    def accept(self, tokens: Sequence[int], hidden: np.ndarray | None) -> None:
        self.seen += len(tokens)
        if self.taps and hidden is None:
            self.read_up_to = self.left_out = self.seen
        self.most_unread = max(self.most_unread, self.unread)

    @property
    def unread(self) -> int:
        return 0 if self.silent else self.seen - self.read_up_to

    @property
    def silent(self) -> bool:
        return self.seen >= self.context

    def read(self, count: int) -> None:
        assert 0 < count <= self.unread
        self._pass(reading(count, self.read_up_to - self.left_out))
        self.read_up_to += count

    def leave_out(self, count: int) -> None:
        assert 0 < count < self.unread
        self.read_up_to += count
        self.left_out = self.read_up_to

    def _pass(self, seconds: float) -> None:
        self.clock.now += self.slower * seconds
        self.largest = max(self.largest, self.slower * seconds)

    def draft(self, anchor: int, limit: int) -> Draft:
        assert self.unread <= 8  # a draft reads no more than a round leaves
        self.read_up_to = self.seen
        self._pass(drafting(limit))
        coming = list(self.text[self.seen + 1 :][:limit])
        for position, hit in enumerate(self._random.random(len(coming)) < self.right):
            coming[position] = coming[position] if hit else (coming[position] + 1) % VOCAB
        return Draft(tuple(coming))


@cache
def text(prompt: int, limit: int = 2000) -> list[int]:
    """A prompt of so many tokens and the answer to it."""
    start = np.random.default_rng(prompt).integers(VOCAB, size=prompt).tolist()
    steps = decode(ToyBinding(TABLE, CONTEXT), start, choose=Sampler(Sampling(repeat_penalty=1.3)), limit=limit)
    return [*start, *(step.token for step in steps)]


def answer(
    clock: SimpleNamespace,
    drafter: Drafter,
    scheduler: Scheduler,
    prompt: int,
    limit: int,
    cached: int = 0,
    widths: tuple[int, ...] = (),
) -> tuple[list[float], Tally]:
    """Seconds since the first token at each further one; the tokens are those of plain decoding."""
    binding, speculation = Timed(clock, drafter.taps), Speculation(drafter, scheduler, widths)
    whole, times = text(prompt), list[float]()
    if cached:
        binding.run(np.array(whole[:cached]))
    choose = Sampler(Sampling(repeat_penalty=1.3))
    got = []
    for step in speculate(binding, whole[:prompt], speculation, sampler=choose, limit=limit):
        got.append(step.token)
        times.append(clock.now)
    assert got == whole[prompt:][:limit]
    return [time - times[0] for time in times[1:]], speculation.tally


def scheduler(experience: Experience | None = None, *, beside: bool = False) -> Scheduler:
    return Scheduler(target(), (), Reader(MEASURED, experience or Experience(), beside))


def slower(times: list[float]) -> float:
    """At any token, wherever the answer ends: the time since the first against that of plain decoding."""
    return max((time / (STEP * count) for count, time in enumerate(times, 1)), default=1.0)
