"""Drafts of a second model: any compiled one with the same tokens, such as a smaller or a pruned one."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.decoder import ingest, prefill
from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.confidence import Confidence
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.model import Model
from dsopt.runtime.sampling import Candidates, Sampler, Sampling
from dsopt.runtime.session import PREFILL_CHUNK, Logits

_WORTH = 0.3  # a draft ends before a token that is accepted, with all before it, less often than this
_SINKS = 4  # tokens from the beginning that are never left out
_POSITIONS = 8  # with a temperature of their own


class ModelDrafter:
    """Follows the target lazily: what it has not seen is read when it drafts, so that a pause costs nothing.

    At temperature 0 its most probable tokens, else tokens drawn by the same rules as the target's, with their
    distributions. The survival of a token is counted acceptance by how sure the draft model was, which is known
    before the token is drawn.
    """

    taps: tuple[int, ...] = ()
    positions = _POSITIONS

    def __init__(self, model: Model, vocab_size: int, sampling: Sampling, temperatures: Sequence[float] = ()) -> None:
        """`vocab_size`: the target's. `sampling`: the target's; the drafter's random numbers are its own.
        `temperatures`: what `bench --calibrate` found."""
        seed = None if sampling.seed is None else sampling.seed + 1
        self._sampler = Sampler(replace(sampling, seed=seed))
        self._vocab, self._draws = vocab_size, sampling.temperature > 0
        self.worth = _WORTH
        self._binding = model.session.bind(model.session.new_cache())
        self._own_vocab = model.session.vocab_size
        self._confidence = Confidence(temperatures)
        self._read: list[int] = []  # what the cache holds
        self.begin()

    def begin(self) -> None:
        self._tokens: list[int] = []
        self._agreed = 0  # so many tokens of the sequence are those in the cache
        self._strange = False  # it has a token that the draft model does not know
        self._confidence.begin()

    @property
    def confidence(self) -> NDArray[np.float64]:
        return np.array(self._confidence.logits)

    def accept(self, tokens: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        self._tokens += tokens
        self._strange = self._strange or max(tokens, default=0) >= self._own_vocab
        self._confidence.accept(tokens)

    @property
    def unread(self) -> int:
        if self.silent:
            return 0
        self._agree()
        return len(self._tokens) - self._agreed

    @property
    def silent(self) -> bool:
        return self._strange or len(self._tokens) >= self._binding.cache.limit

    def read(self, count: int) -> None:
        new = self._tokens[len(self._tokens) - self.unread :][:count]
        self._forget_rest()
        for start in range(0, len(new), PREFILL_CHUNK):
            self._read += new[start : start + PREFILL_CHUNK]
            ingest(self._binding, new[start : start + PREFILL_CHUNK])

    def leave_out(self, count: int) -> None:
        """It begins anew with the first few tokens, which attention leans on (arXiv:2309.17453), and what follows."""
        start = len(self._tokens) - self.unread + count
        self._tokens = [*self._tokens[: min(start, _SINKS)], *self._tokens[start:]]
        self._agreed = 0

    def draft(self, anchor: int, limit: int) -> Draft:
        history = [*self._tokens, anchor]
        self._confidence.start(anchor)
        logits = self._catch_up(history)
        drafted: list[int] = []
        survival: list[float] = []
        drawn_from: list[NDArray[np.float64]] = []
        reached = 1.0
        while logits is not None and len(drafted) < limit:
            tokens, probabilities = self._distribution(logits, history)
            sure = float(probabilities.max())
            reached *= self._confidence.survival(sure)
            if reached < self.worth:
                break
            drafted.append(self._take(tokens, probabilities, drawn_from))
            survival.append(self._confidence.add(drafted[-1], sure))
            history.append(drafted[-1])
            logits = self._step(drafted[-1]) if len(drafted) < limit else None
        return Draft(tuple(drafted), tuple(survival), np.array(drawn_from) if drawn_from else None)

    def _catch_up(self, history: Sequence[int]) -> Logits | None:
        """Read what is new; the logits after it, None where the draft model has no room or not such a token."""
        cache = self._binding.cache
        self._agree()
        self._forget_rest()
        new = history[cache.length :]
        if len(history) > cache.limit or max(new) >= self._own_vocab:
            return None
        self._read += new
        logits = prefill(self._binding, new)
        assert not isinstance(logits, Candidates)  # none were asked for
        return logits

    def _agree(self) -> None:
        """Find how much of the sequence the cache holds already."""
        common = min(len(self._read), self._binding.cache.length, len(self._tokens))
        while self._agreed < common and self._read[self._agreed] == self._tokens[self._agreed]:
            self._agreed += 1

    def _forget_rest(self) -> None:
        """Of the cache, keep what agrees."""
        self._binding.cache.trim(min(self._agreed, self._binding.cache.length))
        del self._read[self._binding.cache.length :]

    def _step(self, token: int) -> Logits | None:
        if self._binding.cache.length == self._binding.cache.limit:
            return None
        self._read.append(token)
        return self._binding.run(np.array([token]))[-1]

    def _distribution(self, logits: Logits, history: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What a token is drawn from; at temperature 0 the model's own distribution."""
        logits = logits[: min(self._own_vocab, self._vocab)]
        if self._draws:
            return self._sampler.distribution(logits, history)
        weights = np.exp(logits - logits.max())
        return np.arange(len(logits)), weights / weights.sum()

    def _take(
        self, tokens: NDArray[np.int64], probabilities: NDArray[np.float64], drawn_from: list[NDArray[np.float64]]
    ) -> int:
        if not self._draws:
            return int(tokens[probabilities.argmax()])
        dense = np.zeros(self._vocab)
        dense[tokens] = probabilities
        drawn_from.append(dense)
        return self._sampler.draw(tokens, probabilities)


def check_same_tokens(target: Model, draft: Model) -> None:
    """Raises DsoptError unless a token id means the same to both."""
    if target.tokenizer.tokens() != draft.tokenizer.tokens():
        raise DsoptError(
            f"--draft {draft.artifact.directory}: its tokens are not those of {target.artifact.directory}; "
            "give a model with the same tokenizer, or --draft ngram"
        )
