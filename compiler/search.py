"""A search under a budget: choose, build, measure, and choose again.

Losses are estimates and add up only nearly, so what was chosen is built and measured, the estimates are scaled by what
they missed, and the choice is made again; the best that held the budget wins.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsopt.compiler.goal import Goal
from dsopt.compiler.knapsack import Assignment, Space
from dsopt.runtime.errors import DsoptError

ROUNDS = 3
_OPTIMISM = 1.35  # what builds lose beside their estimates, before one was measured: 1.15 to 1.4 on SmolLM2
_HALVINGS = 7  # of the range in which the least loss lies
_STEPS = 45  # by a quarter: to ten thousand times the budget


@dataclass(frozen=True)
class Round:
    """One build: what was expected of it, and its measured loss in nats a token."""

    assignment: Assignment
    measured: float


def search(space: Space, goal: Goal, measure: Callable[[Assignment], float]) -> tuple[Round | None, list[Round]]:
    """Build and `measure` at most ROUNDS assignments; the fastest within the goal, or None, and all rounds.

    Raises DsoptError when no assignment is expected to fit.
    """
    rounds: list[Round] = []
    for _ in range(ROUNDS):
        budget = _budget(rounds, goal.loss)
        made = space.fastest(budget, goal.size) if rounds else first_choice(space, goal)
        if made is None:  # estimates may be too high: let the measurement decide
            made = _gentler(space, goal, budget, rounds) if rounds else _gentlest(space, goal)
        if made is None or any(made.is_as(before.assignment) for before in rounds):
            break
        rounds.append(Round(made, measure(made)))
        if 0.85 * goal.loss <= rounds[-1].measured <= goal.loss:
            break
    fitting = [r for r in rounds if r.measured <= goal.loss]
    return min(fitting, key=lambda r: r.assignment.seconds, default=None), rounds


def first_choice(space: Space, goal: Goal) -> Assignment | None:
    """What `search` builds first where something is expected to fit."""
    return space.fastest(_budget([], goal.loss), goal.size)


def _budget(rounds: Sequence[Round], loss: float) -> float:
    """The estimated loss at which a build should measure `loss`, a little inside: the next choice errs in its own way.

    Between two builds, one on each side, along the line through both in logarithms; else by the ratio of the last. The
    last round keeps more distance where no build fits yet: a miss would leave nothing.
    """
    is_last_hope = len(rounds) == ROUNDS - 1 and all(r.measured > loss for r in rounds)
    aim = (0.88 if is_last_hope else 0.97) * loss
    points = sorted((max(r.measured, 1e-7), max(r.assignment.loss, 1e-9)) for r in rounds)
    under, over = [p for p in points if p[0] <= loss], [p for p in points if p[0] > loss]
    if under and over and over[0][1] > under[-1][1]:
        (m0, e0), (m1, e1) = under[-1], over[0]
        share = math.log(aim / m0) / math.log(m1 / m0)
        return float(e0 * (e1 / e0) ** min(max(share, 0.1), 0.9))
    if not rounds:
        return loss / _OPTIMISM
    measured, estimated = max(rounds[-1].measured, 1e-7), max(rounds[-1].assignment.loss, 1e-9)
    return aim * estimated / measured


def _gentler(space: Space, goal: Goal, budget: float, rounds: Sequence[Round]) -> Assignment | None:
    """Of nearly the least expected loss that there is, more than `budget`; None where that is not less than missed."""
    missed = [r.assignment.loss for r in rounds if r.measured > goal.loss]
    if not missed:
        return None
    low, high = budget, min(missed) * (1 - 1e-6)
    best = space.fastest(high, goal.size)
    for _ in range(_HALVINGS if best else 0):
        middle = math.sqrt(low * high)
        made = space.fastest(middle, goal.size)
        if made is None:
            low = middle
        else:
            best, high = made, middle
    return best


def _gentlest(space: Space, goal: Goal) -> Assignment:
    """Of little more expected loss than the least that there is, which is more than a first build should have."""
    budget = goal.loss / _OPTIMISM
    for _ in range(_STEPS):
        budget *= 1.25
        made = space.fastest(budget, goal.size)
        if made is not None:
            return made
    limit = f" in {goal.size / 1e6:.0f} MB" if goal.size else ""
    raise DsoptError(f"no choice of kernels loses as little as {goal.budget}{limit}; allow more")
