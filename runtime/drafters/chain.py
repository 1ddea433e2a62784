"""Several drafters as one: the first that is sure of its first token drafts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters import Draft, Drafter, ReadingDrafter

_SURE = 0.8


class ChainDrafter:
    """All follow the sequence; cheap ones stand first. The last one drafts where none before it is sure.

    Those that must read do so together, and each drafts once all have read.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = tuple(drafters)
        self.taps = tuple(sorted({tap for drafter in drafters for tap in drafter.taps}))

    def begin(self) -> None:
        for drafter in self._drafters:
            drafter.begin()

    def accept(self, tokens: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        for drafter in self._drafters:
            if getattr(drafter, "silent", False):
                continue
            own = [self.taps.index(tap) for tap in drafter.taps]
            drafter.accept(tokens, hidden[:, own] if hidden is not None and own else None)

    @property
    def unread(self) -> int:
        return max((drafter.unread for drafter in self._drafters if isinstance(drafter, ReadingDrafter)), default=0)

    @property
    def silent(self) -> bool:
        """All that must read are."""
        return all(drafter.silent for drafter in self._drafters if isinstance(drafter, ReadingDrafter))

    def read(self, count: int) -> None:
        for drafter in self._drafters:
            if isinstance(drafter, ReadingDrafter):
                drafter.read(count)

    def leave_out(self, count: int) -> None:
        behind = self.unread - count
        for drafter in self._drafters:
            if isinstance(drafter, ReadingDrafter) and drafter.unread > behind:
                drafter.leave_out(drafter.unread - behind)

    def draft(self, anchor: int, limit: int) -> Draft:
        unsure = Draft()
        for drafter in self._drafters:
            draft = drafter.draft(anchor, limit)
            if draft.tokens and (drafter is self._drafters[-1] or is_sure(draft)):
                return draft
            unsure = unsure if unsure.tokens else draft
        return unsure


def is_sure(draft: Draft) -> bool:
    """Of its first token: no other drafter need be asked."""
    return bool(draft.tokens and draft.survival and draft.survival[0] >= _SURE)


def members(drafter: Drafter) -> tuple[Drafter, ...]:
    """The drafters that it is made of."""
    return drafter._drafters if isinstance(drafter, ChainDrafter) else (drafter,)


def split(drafter: Drafter) -> tuple[Drafter | None, ReadingDrafter | None]:
    """The part of it that need not read before it drafts, and the part that must."""
    copying = [member for member in members(drafter) if not isinstance(member, ReadingDrafter)]
    reading = [member for member in members(drafter) if isinstance(member, ReadingDrafter)]
    return _one_of(copying), _one_of(reading)


def _one_of(drafters: Sequence[Any]) -> Any:
    return ChainDrafter(drafters) if len(drafters) > 1 else next(iter(drafters), None)
