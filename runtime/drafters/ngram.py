"""Drafts copied from the text itself: what followed the longest earlier occurrence of its end. No weights."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.acceptance import Acceptance
from dsopt.runtime.drafters.automaton import SuffixAutomaton

# Matches of about the same length are counted together: 0, 1, 2, 3, 4, 5-6, 7-8, ...
_LENGTHS = (1, 2, 3, 4, 5, 7, 9, 13, 17, 33)
# First guesses of how often the next token is right, a match length each.
_GUESSES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.55, 0.65, 0.75, 0.8, 0.85, 0.9)
_POSITIONS = 8  # of a draft, counted apart; those behind count as the last


class NgramDrafter:
    """Follows prompt and answer. A draft continues the latest earlier occurrence of the longest repeated end.

    The survival of a token is counted acceptance, by the length of the match it goes on from and, where drafts were
    judged, by its position in the draft. What would have been drafted is counted at every token of the answer,
    whether or not anyone asked: knowing better costs nothing.
    """

    taps: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._by_length, self._by_position = Acceptance(weight=8), Acceptance(weight=8)
        self.begin()

    def begin(self) -> None:
        self._text = SuffixAutomaton()
        self._ahead = False  # the anchor of the last draft is in the text already
        self._answering = False
        self._judged: Iterator[tuple[int, tuple[int, int]]] = iter(())  # tokens of the last draft, and their keys

    def accept(self, tokens: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        if self._ahead:
            assert tokens[0] == self._text.tokens[-1], "what is accepted begins with the anchor of the last draft"
        for token in tokens[self._ahead :]:
            self._append(token)
        self._ahead = False

    def draft(self, anchor: int, limit: int) -> Draft:
        if not self._ahead:
            self._append(anchor)
        self._ahead = self._answering = True
        length, end = self._text.match()
        if length == 0:
            self._judged = iter(())
            return Draft()
        text, period = self._text.tokens, len(self._text.tokens) - 1 - end
        # A match that overlaps the end repeats itself from there on.
        tokens = tuple(text[end + 1 + index % period] for index in range(limit))
        keys = [(_class(length), min(position, _POSITIONS - 1)) for position in range(limit)]
        self._judged = iter(list(zip(tokens, keys, strict=True)))
        return Draft(tokens, tuple(self._survival(length, position) for position in range(limit)))

    def _survival(self, length: int, position: int) -> float:
        """Once `position` tokens were right, the match is so much longer."""
        grown = _class(length + position)
        guess = self._by_length.share(grown, _GUESSES[grown])
        return self._by_position.share((_class(length), min(position, _POSITIONS - 1)), guess)

    def _append(self, token: int) -> None:
        length, end = self._text.match()
        if length and self._answering:
            self._by_length.count(_class(length), self._text.tokens[end + 1] == token)
        drafted, key = next(self._judged, (token, None))
        if key is not None:
            self._by_position.count(key, drafted == token)
        if drafted != token:
            self._judged = iter(())
        self._text.extend(token)


def _class(length: int) -> int:
    return bisect_right(_LENGTHS, length)
