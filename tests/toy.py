"""A model of a few tokens with tabulated logits, whose cache remembers the tokens it was given."""

from collections.abc import Sequence

import numpy as np

from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.drafters import Draft
from dsopt.runtime.kv import KvCache, LayerShape
from dsopt.runtime.scheduler import Scheduler

TAPS = (0, 2)


class ToyBinding:
    """Logits depend on the last two tokens, by `table` [vocab, vocab, vocab]. `runs`: (cached, rows) of each run."""

    most_candidates = 0

    def __init__(self, table: np.ndarray, limit: int = 1000, taps: tuple[int, ...] = ()) -> None:
        self.cache = KvCache([LayerShape(0, 1, 1)], limit)
        self.table, self.taps = table.astype(np.float32), taps
        self.written: list[int] = []
        self.hidden: np.ndarray | None = None
        self.runs: list[tuple[int, int]] = []

    def run(self, ids: np.ndarray, rows: int = 1, keep: int | None = None) -> np.ndarray:
        length = self.cache.length
        self.cache.reserve(length + len(ids))
        self.runs.append((length, len(ids)))
        self.written[length:] = ids.tolist()
        self.cache.length = length + (len(ids) if keep is None else keep)
        self.cache.written = length + len(ids)
        if self.taps:
            new = enumerate(self.written[length:], length)
            self.hidden = np.array([[hidden(t, p)] * len(self.taps) for p, t in new])
        padded = [0, *self.written]
        first = max(len(self.written) - rows, 0)
        return np.array([self.table[padded[p], padded[p + 1]] for p in range(first, len(self.written))])


def hidden(token: int, position: int) -> list[int]:
    """What a tapped layer gives."""
    return [token, position]


def random_table(vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (vocab, vocab, vocab))


def curve(*seconds: float) -> VerifyCurve:
    """Runs of 1, 2, 3, ... rows, whatever the depth."""
    return VerifyCurve(tuple(range(1, len(seconds) + 1)), 0, seconds, 1, seconds, (len(seconds),))


class Forced(Scheduler):
    """Verifies whatever was drafted, of drafts whose length is drawn."""

    def __init__(self, seed: int = 0, longest: int = 6) -> None:
        super().__init__(curve(1.0, 1.0))
        self._random, self._longest = np.random.default_rng(seed), longest

    def ask(self, depth: int, room: int) -> int:
        return min(room, int(self._random.integers(0, self._longest + 1)))

    def cut(self, draft: Draft, depth: int, drafting: float, *, anticipate: bool) -> int:
        return len(draft.tokens)


class Oracle:
    """Drafts what is given as the coming text, but wrong from a drawn position on. Checks what it is told."""

    def __init__(self, text: Sequence[int], vocab: int, seed: int = 0, taps: tuple[int, ...] = ()) -> None:
        self.text, self.vocab, self.taps = list(text), vocab, taps
        self._random = np.random.default_rng(seed)
        self.begin()

    def begin(self) -> None:
        self.seen: list[int] = []

    def accept(self, tokens: Sequence[int], hidden_rows: np.ndarray | None) -> None:
        assert (hidden_rows is not None) == bool(self.taps)
        if hidden_rows is not None:
            wanted = [[hidden(t, p)] * len(self.taps) for p, t in enumerate(tokens, len(self.seen))]
            assert hidden_rows.tolist() == wanted
        self.seen += tokens
        assert self.seen == self.text[: len(self.seen)]

    def draft(self, anchor: int, limit: int) -> Draft:
        assert anchor == self.text[len(self.seen)]
        assert limit > 0
        coming = self.text[len(self.seen) + 1 :][:limit]
        for position in range(int(self._random.integers(0, limit + 1)), len(coming)):
            coming[position] = (coming[position] + 1) % self.vocab
        return Draft(tuple(coming))
