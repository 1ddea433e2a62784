"""Drafted rounds as they are, to calibrate a drafter's confidence on."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.drafters import ConfidentDrafter, Draft
from dsopt.runtime.drafters.model import ModelDrafter
from dsopt.runtime.model import Model
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.scheduler import Round, Scheduler
from dsopt.runtime.speculate import Speculation


class Rounds(Scheduler):
    """Verifies every draft whole, and remembers what the drafter thought of it and how much of it was accepted.

    A schedule that lets confidence choose the length would see only drafts that looked good.
    """

    def __init__(self, drafter: ConfidentDrafter, curve: VerifyCurve) -> None:
        super().__init__(curve)
        self._drafter = drafter
        if isinstance(drafter, ModelDrafter):
            drafter.worth = 0.0  # drafts on, however unsure
        self.confidence: list[NDArray[np.floating]] = []
        """Of each round, the logits of the tokens verified."""
        self.accepted: list[int] = []

    def ask(self, depth: int, room: int) -> int:
        return min(room, self._drafter.positions)

    def cut(self, draft: Draft, depth: int, drafting: float, *, anticipate: bool) -> int:
        return len(draft.tokens)

    def observe(self, done: Round) -> None:
        if done.verified:
            self.confidence.append(self._drafter.confidence[: done.verified])
            self.accepted.append(done.accepted)


def drafted_rounds(
    model: Model,
    prompts: Sequence[Sequence[int]],
    drafter: ConfidentDrafter,
    curve: VerifyCurve,
    sampling: Sampling,
    limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Rounds, list[int]]:
    """Answer the prompts, token ids each, with `limit` tokens at most. With each round 0 or 1: by turns of the
    prompts, so that what is fitted on one half can be judged on other texts; of the rounds, where there is one prompt.
    """
    rounds, folds = Rounds(drafter, curve), list[int]()
    sampler = Sampler(sampling)
    for index, prompt in enumerate(prompts):
        progress(index, len(prompts))
        speculation = Speculation(drafter, rounds)
        for _ in model.stream(prompt, limit=limit, sampler=sampler, speculation=speculation):
            pass
        made = range(len(folds), len(rounds.accepted))
        folds += [index % 2 if len(prompts) > 1 else number % 2 for number in made]
    progress(len(prompts), len(prompts))
    return rounds, folds
