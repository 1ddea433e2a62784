"""Drafters: what proposes tokens for the model to verify. One a file; the verifier knows only this interface.

The target has a cache of processed tokens and one token chosen but not processed yet, the anchor. A drafter follows
the processed tokens (`accept`) and proposes what may come after the anchor (`draft`). It keeps nothing of a proposal
that was not accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens, at most as many as asked for, none where the drafter has no idea.

    survival: for each token an estimate of the probability that it is accepted, given that those before it are;
        () where the drafter has none.
    distributions: float64 [n, vocab], what each token was drawn from; None where it was not drawn but is certain
        given what stands before it (a point mass).
    """

    tokens: tuple[int, ...] = ()
    survival: tuple[float, ...] = ()
    distributions: NDArray[np.float64] | None = None


class Drafter(Protocol):
    """Proposes tokens for one sequence."""

    taps: tuple[int, ...]
    """Layers of the target whose outputs `accept` wants, () for none."""

    def begin(self) -> None:
        """Forget everything: a new sequence starts, empty."""

    def accept(self, tokens: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """The target processed `tokens` [n] and keeps them: a chunk of the prompt, or what a round accepted.

        `hidden` [n, taps, width]: the outputs of the tapped layers at these tokens; None without taps, and where they
        are not to be had: then a drafter with taps leaves out these tokens and what it has not read before them.
        """

    def draft(self, anchor: int, limit: int) -> Draft:
        """At most `limit` tokens that may follow the processed tokens and `anchor`."""


@runtime_checkable
class ReadingDrafter(Drafter, Protocol):
    """One that must read the sequence before it can draft, which takes time: when it does is the scheduler's choice.

    `accept` only remembers; `draft` reads what is still unread.
    """

    @property
    def unread(self) -> int:
        """Tokens that it was given and has not read; 0 where it is silent."""

    @property
    def silent(self) -> bool:
        """It cannot draft for this sequence any more, and need not be told of it."""

    def read(self, count: int) -> None:
        """Read at most so many of them."""

    def leave_out(self, count: int) -> None:
        """The first `count` of them will never be read, nor need be what was read before them."""


@runtime_checkable
class ConfidentDrafter(Drafter, Protocol):
    """One whose survival comes from how sure it is, a number that calibration puts right."""

    positions: int
    """Of a draft, with a temperature each."""

    @property
    def confidence(self) -> NDArray[np.floating]:
        """Of the last draft's tokens, the logit of each one's acceptance as the drafter has it, uncalibrated [n]."""
