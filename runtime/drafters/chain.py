"""Several drafters as one: the first that is sure of its first token drafts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters import Draft, Drafter

_SURE = 0.8


class ChainDrafter:
    """All follow the sequence. The last one drafts where none before it is sure; cheap ones stand first."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = tuple(drafters)
        self.taps = tuple(sorted({tap for drafter in drafters for tap in drafter.taps}))

    def begin(self) -> None:
        for drafter in self._drafters:
            drafter.begin()

    def accept(self, tokens: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        for drafter in self._drafters:
            own = [self.taps.index(tap) for tap in drafter.taps]
            drafter.accept(tokens, hidden[:, own] if hidden is not None and own else None)

    def draft(self, anchor: int, limit: int) -> Draft:
        for drafter in self._drafters[:-1]:
            draft = drafter.draft(anchor, limit)
            if draft.survival and draft.survival[0] >= _SURE:
                return draft
        return self._drafters[-1].draft(anchor, limit)
