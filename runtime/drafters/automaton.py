"""A suffix automaton over a growing sequence: where its longest repeated end has stood before."""

_REFRESHED = 8  # ancestors of a state that learn of a new occurrence: bounds the work of a token


class SuffixAutomaton:
    """All substrings of a sequence of tokens, in O(1) amortised time a token and at most two states a token.

    A. Blumer et al., "The smallest automaton recognizing the subwords of a text", 1985.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # State 0 is the empty string. A state stands for the substrings that end at the same places; its length is
        # that of the longest, its link the state of the longest suffix that ends at more places.
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [-1]  # where an occurrence ends, a late one
        self._last = 0
        self._match = (0, -1)

    def extend(self, token: int) -> None:
        """Append a token."""
        position = len(self.tokens)
        self.tokens.append(token)
        state = self._new(self._length[self._last] + 1, {}, 0, position)
        suffix = self._last
        while suffix >= 0 and token not in self._next[suffix]:
            self._next[suffix][token] = state
            suffix = self._link[suffix]
        if suffix >= 0:
            self._link[state] = self._state_after(suffix, token)
        self._last = state
        repeated = self._link[state]
        self._match = (self._length[repeated], self._end[repeated])
        for _ in range(_REFRESHED):
            if repeated <= 0:
                break
            self._end[repeated] = position
            repeated = self._link[repeated]

    def match(self) -> tuple[int, int]:
        """The longest end of the sequence that occurred before: its length, 0 for none, and where that occurrence
        ended, an index of `tokens`."""
        return self._match

    def _new(self, length: int, successors: dict[int, int], link: int, end: int) -> int:
        self._next.append(successors)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    def _state_after(self, suffix: int, token: int) -> int:
        """The state of `suffix` + token alone, split off from longer strings that end at fewer places."""
        longer = self._next[suffix][token]
        length = self._length[suffix] + 1
        if self._length[longer] == length:
            return longer
        clone = self._new(length, dict(self._next[longer]), self._link[longer], self._end[longer])
        while suffix >= 0 and self._next[suffix].get(token) == longer:
            self._next[suffix][token] = clone
            suffix = self._link[suffix]
        self._link[longer] = clone
        return clone
