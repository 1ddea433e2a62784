"""The token loop: a generator of small records. It knows token ids only; text is made above it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters import Drafter
from dsopt.runtime.sampling import Candidates, Row, logprob, logprobs
from dsopt.runtime.session import PREFILL_CHUNK, Binding

Choose = Callable[[Any, Sequence[int]], int]
"""A row of logits and the tokens so far -> a token. `Sampler` is one, and takes candidates (`Row`) too."""


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token. Log-probabilities (natural, of the unmodified distribution) only where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    from_draft: bool = False


def candidates_for(binding: Binding, choose: object, top: int | None, least: int = 1) -> int:
    """How many candidates of a row `choose` (a Sampler, perhaps) needs of it, `least` or more.

    0 where it needs all logits, or `top` asks for their probabilities, or the binding has no candidates to give.
    """
    wanted = getattr(choose, "candidates", 0)
    count = max(wanted, least) if wanted and top is None else 0
    return count if count <= binding.most_candidates else 0


def advance(
    binding: Binding, ids: NDArray[np.int64], candidates: int, rows: int = 1, keep: int | None = None
) -> Sequence[Row]:
    """As `Binding.run`; with `candidates` as `Binding.top`."""
    return binding.top(ids, candidates, rows, keep) if candidates else list(binding.run(ids, rows, keep))


def prefill(binding: Binding, tokens: Sequence[int], drafter: Drafter | None = None, candidates: int = 0) -> Row:
    """Append `tokens` in chunks; returns the logits after the last one. A failure leaves whole chunks.

    The `drafter` is told of each chunk.
    """
    assert tokens, "prefill needs a token"
    binding.cache.reserve(binding.cache.length + len(tokens))
    size = getattr(binding, "chunk", None) or PREFILL_CHUNK
    last = (len(tokens) - 1) // size * size
    for start in range(0, last, size):
        ingest(binding, tokens[start : start + size], drafter)
    return ingest(binding, tokens[last:], drafter, rows=1, candidates=candidates)[-1]


def ingest(
    binding: Binding,
    tokens: Sequence[int],
    drafter: Drafter | None = None,
    rows: int = 0,
    candidates: int = 0,
    *,
    shown: bool = True,
) -> Sequence[Row]:
    """Append one chunk; returns the logits, or candidates, after its last `rows` tokens: the head sees no others.

    Without rows what is returned means nothing; a device keeps its logits then. Unless `shown`, the drafter gets no
    hidden states of the chunk.
    """
    candidates = candidates if rows else min(binding.most_candidates, 1)
    made = advance(binding, np.asarray(tokens, np.int64), candidates, rows)
    if drafter is not None:
        drafter.accept(list(tokens), binding.hidden if shown and drafter.taps else None)
    return made


def decode(
    binding: Binding,
    prompt: Sequence[int],
    *,
    choose: Choose,
    limit: int,
    end: frozenset[int] = frozenset(),
    top: int | None = None,
) -> Iterator[Step]:
    """Yield at most `limit` tokens after `prompt`, one a step, ending after a token of `end`.

    `prompt` is the whole token sequence; what the cache already holds of it is not computed again, except the last
    token, whose logits are needed. `choose(logits, history)` picks a token; on a device a sampler whose choice a few
    logits decide gets only those. With `top` = k each step carries its log-probability and the k best alternatives. A
    token is yielded before it is fed, so a caller who stops, or an interrupt, leaves a cache that is a prefix of what
    was yielded.
    """
    history, cache = list(prompt), binding.cache
    candidates = candidates_for(binding, choose, top)
    cache.trim(min(cache.length, len(history) - 1))
    row = prefill(binding, history[cache.length :], candidates=candidates)
    token_in = np.empty(1, np.int64)
    for count in range(1, limit + 1):
        token = choose(row, history)
        step = make_step(token, row, top)
        history.append(token)
        yield step
        if token in end or count == limit:
            return
        token_in[0] = token
        row = advance(binding, token_in, candidates)[-1]


def make_step(token: int, logits: Row, top: int | None, *, from_draft: bool = False) -> Step:
    """The step of `token`; with `top` = k its log-probability and the k best of `logits` [vocab]."""
    if top is None:
        return Step(token, from_draft=from_draft)
    assert not isinstance(logits, Candidates)
    return Step(token, logprob(logits, token), tuple(logprobs(logits, top)), from_draft)
