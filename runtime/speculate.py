"""The verify loop: the model checks several drafted tokens in one run. It knows no drafter.

Every token is chosen from the model's own logits, in order, by the same sampler as in plain decoding. A draft only
decides how many rows of logits one run computes ahead (arXiv:2211.17192, arXiv:2302.01318).
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime import session as sessions
from dsopt.runtime.decoder import Step, advance, candidates_for, ingest, make_step
from dsopt.runtime.drafters import Draft, Drafter, ReadingDrafter
from dsopt.runtime.drafters.chain import is_sure, split
from dsopt.runtime.sampling import Row, Sampler
from dsopt.runtime.scheduler import Round, Scheduler, padded
from dsopt.runtime.session import Binding
from dsopt.runtime.tally import Tally

NEAR_TIE = 0.3  # logits: the largest lead that was seen to flip between runs of different width


@dataclass
class Speculation:
    """How one sequence is speculated on.

    drafter: None verifies nothing, which is of use with `widths` only.
    widths: rows that a run may have, rising (exact mode); () lets it have as many as are needed.
    """

    drafter: Drafter | None
    scheduler: Scheduler
    widths: tuple[int, ...] = ()
    tally: Tally = field(default_factory=Tally)
    kind: str = "none"  # of drafter, as the user named it
    exact_cost: float = 0.0  # by what share the narrowest run is slower than one of a single row


def speculate(
    binding: Binding,
    prompt: Sequence[int],
    speculation: Speculation,
    *,
    sampler: Sampler,
    limit: int,
    end: frozenset[int] = frozenset(),
    top: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """As `decoder.decode`: yield at most `limit` tokens after `prompt`, ending after a token of `end`.

    The same tokens: at temperature 0, and with drafts that are certain at any temperature, those of `decode`, up to
    what the width of a run does to the logits; with drafts that were drawn, tokens of the same distribution. At
    every yield the cache is a prefix of what was yielded, without the last token. `cancelled` is asked between two
    chunks of the prompt. Where a prefix of it is cached, a drafter with taps cannot see that: it is computed again, as
    much of it as the drafter would read, if the schedule finds that worth while, else the drafter goes without.
    """
    loop = _Loop(binding, list(prompt), speculation, sampler, end, top)
    logits = loop.read_prompt(cancelled, limit)
    if logits is None or limit == 0:
        return
    try:
        token = sampler(logits, loop.history)
        loop.history.append(token)
        yield make_step(token, logits, top)
        left = limit - 1
        while left and token not in end:
            left -= yield from loop.round(left)
            token = loop.history[-1]
    finally:  # however it ends
        emitted = len(loop.history) - len(prompt)
        speculation.scheduler.end(emitted, ended=emitted < limit)


class _Loop:
    """One generation. Between rounds the last token of `history`, the anchor, is not in the cache."""

    def __init__(
        self,
        binding: Binding,
        history: list[int],
        speculation: Speculation,
        sampler: Sampler,
        end: frozenset[int],
        top: int | None,
    ) -> None:
        self.history, self._prompt = history, len(history)
        self._binding, self._cache, self._sampler = binding, binding.cache, sampler
        self._drafter, self._scheduler = speculation.drafter, speculation.scheduler
        self._copier, self._reader = (None, None) if self._drafter is None else split(self._drafter)
        self._widths, self._tally = speculation.widths, speculation.tally
        self._end, self._top = end, top
        self._greedy = sampler.options.temperature == 0
        self._candidates = candidates_for(binding, sampler, top, least=2)  # the second tells a near tie
        self._mark = 0.0
        self._aside = 0.0  # seconds of bookkeeping since the last round was judged
        self._mixed = False  # the cache has rows of runs that were wider than plain decoding's

    def read_prompt(self, cancelled: Callable[[], bool], limit: int) -> Row | None:
        """Bring cache and drafter to the prompt's end; its logits, None when cancelled."""
        cache, prompt = self._cache, self.history
        cache.trim(min(cache.length, len(prompt) - 1))
        self._mixed = cache.length > 0  # how that was computed is not known
        self._begin(limit)
        cache.reserve(len(prompt))
        far = self._scheduler.too_far(len(prompt))
        logits, chunk = None, getattr(self._binding, "chunk", None) or sessions.PREFILL_CHUNK
        while cache.length < len(prompt) and not cancelled():
            tokens = prompt[cache.length :][:chunk]
            stop = cache.length + len(tokens)
            rows, shown = int(stop == len(prompt)), stop > far
            logits = ingest(self._binding, tokens, self._drafter, rows, self._candidates, shown=shown)
        return logits[-1] if logits is not None and cache.length == len(prompt) else None

    def _begin(self, limit: int) -> None:
        """Tell the drafter of what is cached, or compute again what it should see of that."""
        cached, prompt = self._cache.length, self.history
        if self._drafter is None:
            return
        self._scheduler.begin()
        if cached and self._drafter.taps:
            self._cache.trim(self._scheduler.keep(cached, len(prompt), limit))
            self._tally.reread_tokens = cached - self._cache.length
        self._drafter.begin()
        if self._cache.length:
            self._drafter.accept(prompt[: self._cache.length], None)

    def round(self, left: int) -> Generator[Step, None, int]:
        """Draft, verify, and yield what comes of it, at most `left` tokens; returns how many."""
        self._mark = time.perf_counter()
        depth, anchor = self._cache.length, self.history[-1]
        draft, asked, drafting = self._draft(anchor, left)
        plain = self._scheduler.plain_seconds(depth)
        self._mixed = self._mixed or bool(draft.tokens)
        self._spend()
        rows, first = self._run([anchor, *draft.tokens])
        verifying = self._lap()
        self._tally.verify_seconds += verifying
        self._tally.propose(len(draft.tokens))
        emitted = accepted = 0
        for position, logits in enumerate(rows[first : first + len(draft.tokens) + 1]):
            token = self._choose(logits, draft, position)
            from_draft = position < len(draft.tokens) and token == draft.tokens[position]
            step = self._emit(token, logits, from_draft, position, plain)
            emitted += 1
            yield step
            self._mark = time.perf_counter()
            if from_draft:
                self._cache.extend(1)
                accepted += 1
            if not from_draft or token in self._end:
                break
        drafting += self._accept([anchor, *draft.tokens[:accepted]], first)
        done = Round(depth, asked, len(draft.tokens), accepted, emitted, drafting, verifying, self._aside)
        self._aside = 0.0
        self._scheduler.observe(done)
        self._spend()
        return emitted

    def _draft(self, anchor: int, left: int) -> tuple[Draft, int, float]:
        """What is to be verified, how many tokens the drafter was asked for, and the seconds it took."""
        room = min(left - 1, self._cache.limit - self._cache.length - 1)
        if self._reader is not None:
            self._read(self._reader, room)
        if self._widths:
            room = min(room, self._widths[-1] - 1)
        asked, copied = self._ask(room)
        if not asked and not copied:
            self._tally.paused_rounds += self._drafter is not None and room > 0
            return Draft(), 0, 0.0
        self._spend()
        draft, asked = self._propose(anchor, asked, copied)
        seconds = self._lap()
        self._tally.draft_seconds += seconds
        draft = _first(draft, min(asked, _until_end(draft.tokens, self._end)))
        # What was drawn may not be judged by what came out of the draw; what is certain may.
        anticipate = self._greedy or draft.distributions is None
        count = self._scheduler.cut(draft, self._cache.length, seconds, anticipate=anticipate)
        return _first(draft, count), asked, seconds

    def _read(self, reader: ReadingDrafter, room: int) -> None:
        """Let the drafter read as much as the schedule allows now, or go on without it where it will not draft."""
        if reader.silent:
            self._drafter, self._reader = self._copier, None
            self._scheduler.give_up()
            return
        depth = self._cache.length
        left_out, count = self._scheduler.read(depth, room, reader.unread)
        if count == 0:
            if left_out and reader.taps:  # hidden states take room, tokens do not
                reader.leave_out(left_out)
            return
        self._spend()
        if left_out:
            reader.leave_out(left_out)
        reader.read(count)
        seconds = self._lap()
        self._tally.read_seconds += seconds
        self._tally.read_tokens += count
        self._scheduler.observe_reading(depth, count, seconds)

    def _ask(self, room: int) -> tuple[int, int]:
        """How many tokens to ask the drafter for, and how many the part of it that copies, beside one that reads."""
        if self._drafter is None:
            return 0, 0
        asked = self._scheduler.ask(self._cache.length, room)
        beside = self._copier is not None and (self._reader is not None or self._scheduler.reader is not None)
        return asked, self._scheduler.ask_free(self._cache.length, room) if beside else 0

    def _propose(self, anchor: int, asked: int, copied: int) -> tuple[Draft, int]:
        """A draft, and how many tokens it was asked for: a copy where that is sure, or no other drafter is asked."""
        draft = self._copier.draft(anchor, copied) if self._copier is not None and copied else Draft()
        if not asked or is_sure(draft):
            return draft, copied
        drafter = self._reader or self._drafter
        assert drafter is not None  # it was asked
        made = drafter.draft(anchor, asked)
        if self._reader is not None and not self._tally.starts:
            self._tally.starts, self._tally.start_tokens = 1, len(self.history) - self._prompt
        return made if made.tokens or not draft.tokens else draft, asked

    def _run(self, ids: list[int]) -> tuple[Sequence[Row], int]:
        """Logits after each of `ids`, and in which row they begin. Only the anchor is valid in the cache then.

        In exact mode a run is filled up, with tokens that are forgotten; where the context ends before, with the
        tokens that came before, which are computed again.
        """
        cache = self._cache
        width = min(padded(self._widths, len(ids)), cache.limit)
        back = max(cache.length + width - cache.limit, 0)
        filled = [*self.history[cache.length - back : cache.length], *ids]
        filled += [ids[-1]] * (width - len(filled))
        cache.trim(cache.length - back)
        return advance(self._binding, np.array(filled), self._candidates, width, back + 1), back

    def _choose(self, logits: Row, draft: Draft, position: int) -> int:
        if draft.distributions is None or position == len(draft.tokens) or self._greedy:
            return self._sampler(logits, self.history)
        drafted, drawn_from = draft.tokens[position], draft.distributions[position]
        return accept_or_replace(self._sampler, logits, self.history, drafted, drawn_from)

    def _emit(self, token: int, logits: Row, from_draft: bool, position: int, plain: float) -> Step:
        """`plain`: seconds that plain decoding takes for a token."""
        tally = self._tally
        watched = self._mixed and self._greedy and not self._widths
        if watched and self._sampler.margin(logits, self.history) < NEAR_TIE:
            tally.near_ties += 1
        if from_draft:
            tally.accept(position)
        self.history.append(token)
        step = make_step(token, logits, self._top, from_draft=from_draft)
        tally.emitted += 1
        tally.plain_seconds += plain
        tally.overhead_seconds += self._lap()
        return step

    def _accept(self, tokens: list[int], first: int) -> float:
        """Tell the drafter what was kept; returns the seconds it took."""
        if self._drafter is None:
            return 0.0
        self._spend()
        hidden = self._binding.hidden if self._drafter.taps else None  # a copy
        self._drafter.accept(tokens, None if hidden is None else hidden[first : first + len(tokens)])
        seconds = self._lap()
        self._tally.draft_seconds += seconds
        return seconds

    def _spend(self) -> None:
        """Since the last lap the loop did what plain decoding has no need of."""
        seconds = self._lap()
        self._aside += seconds
        self._tally.overhead_seconds += seconds

    def _lap(self) -> float:
        """Seconds since the last lap."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before


def accept_or_replace(
    sampler: Sampler, logits: Row, history: Sequence[int], drafted: int, drawn_from: NDArray[np.float64]
) -> int:
    """A token of the sampler's distribution p: `drafted`, drawn from q, with probability min(1, p/q), else one drawn
    from what p has more than q (arXiv:2211.17192). In float64; `drawn_from` is q, [vocab]."""
    tokens, p = sampler.distribution(logits, history)
    if sampler.uniform() * drawn_from[drafted] < p[tokens == drafted].sum():
        return drafted
    residual = np.maximum(p - drawn_from[tokens], 0)
    return sampler.draw(tokens, residual if residual.any() else p)  # none left: p is q but for rounding


def _first(draft: Draft, count: int) -> Draft:
    drawn_from = draft.distributions
    return Draft(draft.tokens[:count], draft.survival[:count], None if drawn_from is None else drawn_from[:count])


def _until_end(tokens: Sequence[int], end: frozenset[int]) -> int:
    """How many tokens there are up to the first end token; nothing comes after it."""
    return next((index + 1 for index, token in enumerate(tokens) if token in end), len(tokens))
