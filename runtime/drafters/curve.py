"""The draft curve: what drafting and reading take on this machine, of a drafter that must read before it drafts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsopt.runtime.curve import cache_path, remembered
from dsopt.runtime.drafters import Drafter, ReadingDrafter
from dsopt.runtime.session import PREFILL_CHUNK

if TYPE_CHECKING:
    from dsopt.runtime.model import Model

_COUNTS = (1, 4, 8)  # tokens of a draft
_PIECE = 16  # tokens read at once, and PREFILL_CHUNK
_DEPTH = 512  # tokens that are read before drafts are timed, at most
_ACCEPTED, _REPETITIONS = 4, 4  # tokens that a round keeps; drafts of each length
_VERSION = 1


@dataclass(frozen=True)
class DraftCurve:
    """draft_seconds[i]: a draft of counts[i] tokens, with reading what a round accepted. read_seconds[i]: reading
    pieces[i] tokens at once. Between them a straight line."""

    counts: tuple[int, ...]
    draft_seconds: tuple[float, ...]
    pieces: tuple[int, ...]
    read_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        for xs, ys in ((self.counts, self.draft_seconds), (self.pieces, self.read_seconds)):
            if not xs or len(xs) != len(ys) or xs != tuple(sorted(set(xs))) or xs[0] < 1 or min(ys) <= 0:
                raise ValueError("not a draft curve")

    def reading(self, count: int) -> float:
        """Seconds to read so many tokens, in pieces of the largest size and a rest."""
        whole, rest = divmod(count, self.pieces[-1])
        seconds = whole * self.read_seconds[-1]
        return seconds + (float(np.interp(rest, self.pieces, self.read_seconds)) if rest else 0.0)


def draft_curve(
    identity: str, model: "Model", make: Callable[[], ReadingDrafter], measuring: Callable[[], None], *, fresh: bool
) -> DraftCurve:
    """Of the drafter that `make` makes, for `model`, on this machine: measured in a second or two, once, and kept in
    the cache under its `identity`.

    One is made to be measured, and forgotten: what it drafts for random tokens would spoil what it counts.
    """
    path = cache_path("draft-curves", model.session, identity, _VERSION)
    return remembered(path, DraftCurve, lambda: measure_draft_curve(make(), model), measuring, fresh=fresh)


def measure_draft_curve(drafter: ReadingDrafter, model: "Model") -> DraftCurve:
    """Time reading and drafting. The drafter forgets its sequence; what it counted is spoilt."""
    room = max(model.session.context // 4, 2)
    pieces = tuple(sorted({min(_PIECE, room), min(PREFILL_CHUNK, room)}))
    reading = []
    for piece in pieces:
        taken = []
        for seed in range(_REPETITIONS):
            drafter.begin()
            _show(drafter, model, piece + 1, seed)  # those that join a token with the next leave one to the draft
            start = time.perf_counter()
            drafter.read(piece)
            taken.append(time.perf_counter() - start)
        reading.append(min(taken[1:]))  # the first one binds and allocates
    counts = [count for count in _COUNTS if count <= room]
    drafting = draft_seconds(drafter, model, counts, min(room, PREFILL_CHUNK))
    return DraftCurve(tuple(counts), tuple(drafting), pieces, tuple(reading))


def draft_seconds(drafter: Drafter, model: "Model", counts: Sequence[int], depth: int = _DEPTH) -> list[float]:
    """What drafts of so many tokens take behind random ones, with what a round accepted to be read first.

    The least of a few; in proportion where fewer tokens came of it.
    """
    from dsopt.runtime.drafters.chain import members
    from dsopt.runtime.drafters.model import ModelDrafter

    for member in members(drafter):
        if isinstance(member, ModelDrafter):
            member.worth = 0.0  # random tokens surprise it, and it would give up
    drafter.begin()
    coming = len(counts) * _REPETITIONS * _ACCEPTED + max(counts) + 1
    _show(drafter, model, max(min(depth, model.session.context - coming), 1))
    drafter.draft(0, counts[0])  # reads all that, and allocates
    found = []
    for count in counts:
        taken = []
        for _ in range(_REPETITIONS):
            _show(drafter, model, _ACCEPTED)
            start = time.perf_counter()
            drafted = len(drafter.draft(0, count).tokens)
            taken.append((time.perf_counter() - start) * (count / drafted if drafted else 1))
        found.append(min(taken))
    drafter.begin()
    return found


def _show(drafter: Drafter, model: "Model", count: int, seed: int = 0) -> None:
    """Let the target keep so many random tokens, beginning with 0, the anchor of the draft before."""
    hidden = np.zeros((count, len(drafter.taps), model.artifact.manifest.model["hidden_size"]), np.float32)
    ids = np.random.default_rng((count, seed)).integers(model.tokenizer.vocab_size, size=count)
    ids[0] = 0
    drafter.accept(ids.tolist(), hidden if drafter.taps else None)
