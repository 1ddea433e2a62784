"""How often drafted tokens of a kind were right: counted, with a guess to begin with."""

from collections.abc import Hashable

_FORGET = 0.98  # of what was counted, with each new count: about the last 50 weigh


class Acceptance:
    """Running shares of right guesses by key. `weight`: how many counts the first guess is worth."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._counts: dict[Hashable, tuple[float, float]] = {}  # right ones, all

    def share(self, key: Hashable, guess: float) -> float:
        right, counted = self._counts.get(key, (0.0, 0.0))
        return (right + self._weight * guess) / (counted + self._weight)

    def count(self, key: Hashable, right: bool) -> None:
        known, counted = self._counts.get(key, (0.0, 0.0))
        self._counts[key] = (_FORGET * known + right, _FORGET * counted + 1)
