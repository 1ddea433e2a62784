"""From how sure a drafter is of its tokens to how often such tokens are accepted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters.acceptance import Acceptance

_CLASSES = 10  # of confidence, counted apart
_LEAST = 1e-4  # a probability of 0 or 1 has no logit


class Confidence:
    """The survival of drafted tokens, of a drafter that has no head for it.

    What it goes by is the probability of the likeliest token, which is known before one is drawn. Its logit is divided
    by the temperature of the position (`bench --calibrate`), 1 until fitted, the last one from there on; how often
    tokens of about that confidence were right is counted on top.
    """

    def __init__(self, temperatures: Sequence[float] = ()) -> None:
        self._temperatures = tuple(temperatures) or (1.0,)
        self.acceptance = Acceptance(weight=8)
        self.begin()

    def begin(self) -> None:
        """A new sequence: nothing is known of what became of the last draft."""
        self.logits: list[float] = []
        """Of the last draft's tokens, uncalibrated."""
        self._drafted: list[tuple[int, int]] = []  # tokens, and their class of confidence
        self._kept: list[int] = []  # by the target since then, the anchor of that draft first

    def accept(self, tokens: Sequence[int]) -> None:
        """The target keeps these tokens."""
        if self._drafted:
            self._kept += tokens

    def start(self, anchor: int) -> None:
        """Count how much of the last draft was right, as far as is known by now; a new one begins."""
        for (drafted, confidence), token in zip(self._drafted, [*self._kept, anchor][1:], strict=False):
            self.acceptance.count(confidence, drafted == token)
            if drafted != token:
                break
        self.logits, self._drafted, self._kept = [], [], []

    def survival(self, probability: float) -> float:
        """Of the next token of the draft, whose likeliest choice has this probability."""
        calibrated = self._calibrated(probability)
        return self.acceptance.share(_class(calibrated), calibrated)

    def add(self, token: int, probability: float) -> float:
        """That token is drafted; returns its survival."""
        calibrated = self._calibrated(probability)
        self.logits.append(_logit(probability))
        self._drafted.append((token, _class(calibrated)))
        return self.acceptance.share(_class(calibrated), calibrated)

    def _calibrated(self, probability: float) -> float:
        temperature = self._temperatures[min(len(self.logits), len(self._temperatures) - 1)]
        return float(1 / (1 + np.exp(-_logit(probability) / temperature)))


def likeliest(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Of each row [n, k] the largest probability at this temperature, of the distribution itself at 0."""
    scaled = logits.astype(np.float64) / (temperature or 1.0)
    found: NDArray[np.float64] = 1 / np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1)
    return found


def _logit(probability: float) -> float:
    inside = min(max(probability, _LEAST), 1 - _LEAST)
    return float(np.log(inside / (1 - inside)))


def _class(probability: float) -> int:
    return min(int(probability * _CLASSES), _CLASSES - 1)
