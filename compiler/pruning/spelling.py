"""How a model of fewer tokens says what another one says in a token: as the pieces that the token is merged from.

So one text can be read by both token for token, and their predictions be compared though their vocabularies differ: by
the probability of the first piece, and of those that follow it.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dsopt.compiler.pruning.vocabulary import Vocabulary

Ids = NDArray[np.int64]


class Spelling:
    """Old ids in new ids. A token without parts that is gone, which no text encodes to, is the first that is kept."""

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        """`size`: of the old vocabulary, with the rows of its tables that are no token."""
        self.vocabulary, self.size = vocabulary, size
        self._new = {int(old): new for new, old in enumerate(vocabulary.kept)}
        self._known: dict[int, tuple[int, ...]] = {}

    def pieces(self, token: int) -> tuple[int, ...]:
        """New ids of an old one."""
        if token not in self._known:
            if token in self._new:
                found: tuple[int, ...] = (self._new[token],)
            elif token in self.vocabulary.parts:
                first, second = self.vocabulary.parts[token]
                found = self.pieces(first) + self.pieces(second)
            else:
                found = (0,)
            self._known[token] = found
        return self._known[token]

    @cached_property
    def first(self) -> Ids:
        """[size]: the new id of each token's first piece."""
        return np.array([self.pieces(token)[0] for token in range(self.size)], np.int64)

    def spell(self, ids: Ids) -> tuple[Ids, Ids]:
        """(new ids of all pieces, where the pieces of each of `ids` end)."""
        pieces = [self.pieces(int(token)) for token in ids]
        return np.array([new for piece in pieces for new in piece], np.int64), np.cumsum([*map(len, pieces)])

    def windows(self, windows: Ids) -> Ids:
        """The same text [n, tokens], of which the last tokens go where it has more pieces."""
        return np.stack([self.spell(ids)[0][: len(ids)] for ids in windows])


def joined(log_p: NDArray[np.float64], first: Ids, size: int) -> NDArray[np.float64]:
    """ln of the probability of each first piece: log_p [rows, old] -> [rows, size]."""
    order = np.argsort(first, kind="stable")
    starts = np.searchsorted(first[order], np.arange(size))
    with np.errstate(divide="ignore"):
        return np.log(np.add.reduceat(np.exp(log_p[:, order]), starts, axis=1))
