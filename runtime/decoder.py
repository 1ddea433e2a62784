"""The token loop: a generator of small records. It knows token ids only; text is made above it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters import Drafter
from dsopt.runtime.sampling import logprob, logprobs
from dsopt.runtime.session import PREFILL_CHUNK, Binding

Choose = Callable[[NDArray[np.float32], Sequence[int]], int]


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token. Log-probabilities (natural, of the unmodified distribution) only where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    from_draft: bool = False


def prefill(binding: Binding, tokens: Sequence[int], drafter: Drafter | None = None) -> NDArray[np.float32]:
    """Append `tokens` in chunks; returns the logits [vocab] after the last one. A failure leaves whole chunks.

    The `drafter` is told of each chunk.
    """
    assert tokens, "prefill needs a token"
    binding.cache.reserve(binding.cache.length + len(tokens))
    size = getattr(binding, "chunk", None) or PREFILL_CHUNK
    last = (len(tokens) - 1) // size * size
    for start in range(0, last, size):
        ingest(binding, tokens[start : start + size], drafter)
    return ingest(binding, tokens[last:], drafter, rows=1)[-1]


def ingest(
    binding: Binding, tokens: Sequence[int], drafter: Drafter | None = None, rows: int = 0
) -> NDArray[np.float32]:
    """Append one chunk; returns the logits [rows, vocab] after its last `rows` tokens: the head sees no others."""
    logits = binding.run(np.asarray(tokens, np.int64), rows)
    if drafter is not None:
        drafter.accept(list(tokens), binding.hidden)
    return logits


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
    token, whose logits are needed. `choose(logits, history)` picks a token. With `top` = k each step carries its
    log-probability and the k best alternatives. A token is yielded before it is fed, so a caller who stops, or an
    interrupt, leaves a cache that is a prefix of what was yielded.
    """
    if top is None and binding.picks and getattr(choose, "greedy", False):
        yield from _decode_picks(binding, prompt, limit, end)
        return
    history = list(prompt)
    cache = binding.cache
    cache.trim(min(cache.length, len(history) - 1))
    logits = prefill(binding, history[cache.length :])
    token_in = np.empty(1, np.int64)
    for count in range(1, limit + 1):
        token = choose(logits, history)
        step = make_step(token, logits, top)
        history.append(token)
        yield step
        if token in end or count == limit:
            return
        token_in[0] = token
        logits = binding.run(token_in)[-1]


def _decode_picks(binding: Binding, prompt: Sequence[int], limit: int, end: frozenset[int]) -> Iterator[Step]:
    """As `decode`, greedily, on a device that tells the token: its logits never come here."""
    cache = binding.cache
    cache.trim(min(cache.length, len(prompt) - 1))
    ids = np.asarray(prompt[cache.length :], np.int64)
    cache.reserve(cache.length + len(ids))
    token = -1
    size = binding.chunk or PREFILL_CHUNK
    for start in range(0, len(ids), size):
        token = int(binding.pick(ids[start : start + size])[-1])
    for count in range(1, limit + 1):
        yield Step(token)
        if token in end or count == limit:
            return
        token = int(binding.pick(np.array([token], np.int64))[-1])


def make_step(token: int, logits: NDArray[np.float32], top: int | None, *, from_draft: bool = False) -> Step:
    """The step of `token`; with `top` = k its log-probability and the k best of `logits` [vocab]."""
    if top is None:
        return Step(token, from_draft=from_draft)
    return Step(token, logprob(logits, token), tuple(logprobs(logits, top)), from_draft)
