"""From a row of logits to a token. NumPy only.

The order is: repetition penalty, then at temperature 0 the largest logit, else temperature, top-k, top-p,
min-p and one draw from what is left, renormalised. Ties go to the lower token id everywhere.
"""

import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.errors import DsoptError, UsageError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy. A wrong value raises UsageError.

    temperature: logits are divided by it; 0 takes the largest logit.
    top_k: only the k largest logits stay; 0 is off.
    top_p: only the smallest set of most probable tokens whose mass is at least p stays, counted after top-k
        (nucleus sampling, arXiv:1904.09751); 1 is off.
    min_p: only tokens at least min_p times as probable as the most probable one stay, after the temperature
        (arXiv:2407.01082); 0 is off.
    repeat_penalty: the logit of each distinct token among the last `repeat_last_n` of the history (prompt and
        answer) is divided by it where positive, multiplied where negative, once (CTRL, arXiv:1909.05858);
        1 is off.
    repeat_last_n: 0 looks at none of the history, -1 at all of it.
    seed: of the random numbers; None draws one from the operating system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature, penalty, seed = self.temperature, self.repeat_penalty, self.seed
        _check("--temp", temperature, 0 <= temperature < math.inf, "0 (greedy) or more, such as 0.7")
        _check("--top-k", self.top_k, self.top_k >= 0, "0 (off) or a number of tokens, such as 40")
        _check("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off), such as 0.95")
        _check("--min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1, such as 0.05")
        _check("--repeat-penalty", penalty, 0 < penalty < math.inf, "above 0, 1 is off, such as 1.1")
        _check("--repeat-last-n", self.repeat_last_n, self.repeat_last_n >= -1, "-1 (all), 0 (none) or more")
        _check("--seed", seed, seed is None or seed >= 0, "0 or more")


@dataclass(frozen=True, slots=True)
class Candidates:
    """The largest logits of a row and their tokens, [n] each, largest first: what a device brings back of it."""

    tokens: Ids
    logits: Floats


Row = Floats | Candidates
"""The logits of one position: all of them, or as many as decide."""


def _check(option: str, value: float | None, good: bool, wanted: str) -> None:
    if not good:
        raise UsageError(f"{option} is {value}; it must be {wanted}")


class Sampler:
    """Chooses tokens by `options` and holds the random numbers: one a token, none at temperature 0."""

    seed: int
    """The seed in use, to be told to the user."""

    def __init__(self, options: Sampling) -> None:
        self.options = options
        # 32 bits are enough to be unlikely twice, and few enough to be typed again.
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def __call__(self, logits: Row, history: Sequence[int]) -> int:
        """The next token. `logits` is [vocabulary] and left as it is, or at least as many as `candidates` says;
        `history`: prompt and answer so far.

        Raises DsoptError when the logits are broken (NaN, an infinite maximum); -inf forbids a token.
        """
        logits = self._penalise(logits, history)
        if self.options.temperature == 0:
            return _most_probable(logits)
        return self.draw(*self._truncate(logits))

    @property
    def candidates(self) -> int:
        """How many of the largest logits decide, whatever the history; 0 where it takes all of them."""
        if self.options.repeat_penalty != 1 and self.options.repeat_last_n != 0:
            return 0
        return 1 if self.options.temperature == 0 else self.options.top_k

    def uniform(self) -> float:
        """A random number, at least 0 and below 1."""
        return float(self._random.random())

    def draw(self, tokens: Ids, weights: Doubles) -> int:
        """One of `tokens`, with probabilities in proportion to `weights`, which need not sum to 1."""
        mass = np.cumsum(weights)
        # The first token whose cumulated mass exceeds u < 1 of the whole.
        return int(tokens[np.searchsorted(mass, self.uniform() * mass[-1], side="right")])

    def margin(self, logits: Row, history: Sequence[int]) -> float:
        """By how much the largest logit, after the penalty, exceeds the second."""
        logits = self._penalise(logits, history)
        if isinstance(logits, Candidates):
            return float(logits.logits[0] - logits.logits[1])
        best = _largest(logits)
        others = max(part.max(initial=-math.inf) for part in (logits[:best], logits[best + 1 :]))
        return float(logits[best] - others)

    def distribution(self, logits: Row, history: Sequence[int]) -> tuple[Ids, Doubles]:
        """What `__call__` draws from: the tokens that may come, and their probabilities, which sum to 1."""
        logits = self._penalise(logits, history)
        if self.options.temperature == 0:
            return np.array([_most_probable(logits)]), np.ones(1)
        tokens, weights = self._truncate(logits)
        return tokens, weights / weights.sum()

    def state(self) -> dict[str, Any]:
        """The seed and the state of the random numbers, as JSON can hold it (with integers of 128 bits)."""
        return {"seed": self.seed, "generator": self._random.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state()` was taken. Raises DsoptError when it is not such a state."""
        try:
            generator = np.random.PCG64(0)
            generator.state = state["generator"]
            seed = operator.index(state["seed"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DsoptError(f"the saved sampling state is damaged ({error!r}); start anew with --seed") from error
        self.seed, self._random = seed, np.random.Generator(generator)

    def _penalise(self, logits: Row, history: Sequence[int]) -> Row:
        penalty, last = self.options.repeat_penalty, self.options.repeat_last_n
        if penalty == 1 or last == 0 or len(history) == 0:
            return logits
        assert not isinstance(logits, Candidates), "a penalty needs all logits"
        recent = np.asarray(history if last < 0 else history[-last:], dtype=np.int64)
        logits = logits.copy()
        seen = logits[recent]  # read first, so that a token that is there twice is penalised once
        logits[recent] = np.where(seen > 0, seen / penalty, seen * penalty)
        return logits

    def _truncate(self, row: Row) -> tuple[Ids, Doubles]:
        """The tokens that survive, and their unnormalised probabilities (the most probable token has 1)."""
        options = self.options
        if isinstance(row, Candidates):
            assert 0 < options.top_k <= row.tokens.size
            order = np.argsort(row.tokens[: options.top_k])
            tokens, logits = row.tokens[order], row.logits[order]
        else:
            tokens = _top(row, options.top_k or row.size)
            logits = row[tokens]
        peak = float(logits[_largest(logits)])
        # A tiny temperature may overflow to -inf, which is the right limit.
        with np.errstate(over="ignore"):
            weights = np.exp((logits.astype(np.float64) - peak) / options.temperature)
        if options.top_p < 1:
            nucleus = _nucleus(weights, options.top_p)
            tokens, weights = tokens[nucleus], weights[nucleus]
        kept = weights >= options.min_p if options.min_p > 0 else weights > 0
        return tokens[kept], weights[kept]


def logprobs(logits: Floats, top: int) -> list[tuple[int, float]]:
    """The `top` most probable tokens with their natural log-probabilities, best first.

    Of the model's own distribution, before penalty, temperature and truncation; summed in float64.
    `logits` is [vocabulary]. Raises DsoptError when the logits are broken.
    """
    total = _log_sum(logits)
    tokens = _sorted_top(logits, min(top, logits.size))
    return [(int(token), float(logits[token]) - total) for token in tokens]


def logprob(logits: Floats, token: int) -> float:
    """The natural log-probability of `token`, as in `logprobs`."""
    return float(logits[token]) - _log_sum(logits)


def _most_probable(row: Row) -> int:
    if isinstance(row, Candidates):
        return int(row.tokens[_largest(row.logits)])
    return _largest(row)


def _largest(logits: Floats) -> int:
    """The first index of the largest logit. Raises DsoptError unless it is finite (argmax finds any NaN)."""
    best = int(np.argmax(logits))
    if not math.isfinite(logits[best]):
        wrong = f"the largest of {logits.size} is {float(logits[best])}"
        raise DsoptError(f"the model's logits are broken ({wrong}); compile it again with --quant none to compare")
    return best


def _log_sum(logits: Floats) -> float:
    peak = float(logits[_largest(logits)])
    return peak + math.log(np.exp(logits.astype(np.float64) - peak).sum())


def _top(values: NDArray[Any], count: int) -> Ids:
    """The indices of the `count` largest values, in rising order; of equal values the first ones."""
    if count >= values.size:
        return np.arange(values.size)
    if count == 0:
        return np.arange(0)
    border = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _sorted_top(values: NDArray[Any], count: int) -> Ids:
    """The indices of the `count` largest values, largest first; of equal values the first ones first."""
    tokens = _top(values, count)
    return tokens[np.argsort(-values[tokens], kind="stable")]


def _nucleus(weights: Doubles, mass: float) -> Ids:
    """The indices, largest first, of the fewest weights whose sum is at least `mass` of the whole."""
    wanted = mass * weights.sum()
    count = 256  # nearly always enough, and far cheaper than sorting a vocabulary
    while True:
        best = _sorted_top(weights, count)
        cumulated = np.cumsum(weights[best])
        if cumulated[-1] >= wanted or best.size == weights.size:
            return best[: int(np.searchsorted(cumulated, wanted)) + 1]
        count *= 8
