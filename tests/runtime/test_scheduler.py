"""Lengths against brute force, and what speculation may cost when it does not pay."""

from collections.abc import Callable

import numpy as np
import pytest
from toy import curve

from dsopt.runtime.costs import MOST
from dsopt.runtime.drafters import Draft
from dsopt.runtime.scheduler import Round, Scheduler, padded

WIDE = [1 + 0.1 * width for width in range(MOST + 1)]


def rates(seconds: list[float], survival: list[float], drafting: float) -> list[float]:
    """Tokens a second for each length; plain decoding is favoured by 2 %."""
    expected = [1 + sum(np.prod(survival[: j + 1]) for j in range(length)) for length in range(len(survival) + 1)]
    found = [tokens / (drafting + s) for tokens, s in zip(expected, seconds, strict=False)]
    return [1.02 * found[0], *found[1:]]


def draft(survival: list[float]) -> Draft:
    return Draft(tuple(range(len(survival))), tuple(survival))


@pytest.mark.parametrize("seed", range(40))
def test_the_length_is_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    seconds = np.cumsum(random.uniform(0, 0.6, 8)) + 1  # a staircase
    survival, drafting = random.uniform(0.3, 1, 7).tolist(), random.uniform(0, 0.5)
    scheduler = Scheduler(curve(*seconds.tolist()))
    found = rates(seconds.tolist(), survival, drafting)
    assert scheduler.cut(draft(survival), 5, drafting, anticipate=True) == int(np.argmax(found))

    early = next((length for length in range(7) if found[length + 1] <= found[length]), 7)
    assert scheduler.cut(draft(survival), 5, drafting, anticipate=False) == early


def test_whether_a_token_is_verified_depends_on_none_that_comes_later() -> None:
    random = np.random.default_rng(0)
    scheduler = Scheduler(curve(1, 1.3, 1.9, 2.0, 2.8, 3.0))
    for _ in range(300):
        survival = random.uniform(0.2, 1, 5).tolist()
        count = scheduler.cut(draft(survival), 0, 0.1, anticipate=False)
        for position in range(5):
            changed = [*survival[: position + 1], *random.uniform(0, 1, 4 - position)]
            assert (scheduler.cut(draft(changed), 0, 0.1, anticipate=False) > position) == (count > position)


def test_padding_takes_the_next_width() -> None:
    assert [padded((2, 4, 8), rows) for rows in (1, 2, 3, 5, 8)] == [2, 2, 4, 8, 8]
    assert padded((), 3) == 3
    flat = Scheduler(curve(*WIDE), (8,))
    assert flat.cut(draft([0.1] * 7), 0, 0.0, anticipate=True) == 7  # the rows are there anyway


def simulate(
    steps: int, cost: Callable[[int], float], chance: Callable[[int], float], seconds: list[float] = WIDE
) -> tuple[float, int]:
    """Seconds for `steps` tokens, and rounds that drafted: drafts of n cost `cost(n)`, each token of them is right
    with a chance that depends on how many tokens there are already."""
    scheduler, random = Scheduler(curve(*seconds)), np.random.default_rng(0)
    spent, tokens, drafted = 0.0, 0, 0
    while tokens < steps:
        asked = scheduler.ask(tokens, MOST)
        survival = [0.7] * asked
        count = scheduler.cut(draft(survival), tokens, cost(asked), anticipate=True) if asked else 0
        accepted = 0
        while accepted < count and random.random() < chance(tokens):
            accepted += 1
        drafting, verifying = cost(asked) if asked else 0.0, seconds[count] * random.uniform(0.97, 1.03)
        scheduler.observe(Round(tokens, asked, count, accepted, accepted + 1, drafting, verifying))
        spent, tokens, drafted = spent + drafting + verifying, tokens + accepted + 1, drafted + (asked > 0)
    return spent, drafted


@pytest.mark.parametrize(("price", "trials"), [(0.0, 0.5), (0.3, 4)])
def test_a_drafter_that_is_always_wrong_costs_three_percent_and_some_trials(price: float, trials: float) -> None:
    for steps in (100, 1000, 5000):
        spent, _ = simulate(steps, lambda n: price * n, lambda at: 0.0)
        assert spent <= 1.03 * steps * WIDE[0] + trials


@pytest.mark.parametrize("aside", [0.005, 0.05])
def test_bookkeeping_is_in_the_account(aside: float) -> None:
    """What the loop spends beside the model and the drafter leaves that much less to try drafts with."""
    scheduler, tried = Scheduler(curve(*WIDE)), 0.0
    for depth in range(3000):
        asked = scheduler.ask(depth, 4)
        drafting = 0.3 * bool(asked)
        verifying = WIDE[asked]
        scheduler.observe(Round(depth, asked, asked, 0, 1, drafting, verifying, aside))
        tried += drafting + verifying - WIDE[0]
    assert tried == pytest.approx(max(0.02 - aside, 0) * 3000 + 2, abs=2)


def test_a_good_drafter_is_used_and_one_that_gets_better_found_out() -> None:
    plain = 2000 * WIDE[0]
    for price in (0.0, 0.05):
        always, drafted = simulate(2000, lambda n, price=price: price * n, lambda at: 0.9)
        assert always < plain / 2
        later, _ = simulate(2000, lambda n, price=price: price * n, lambda at: 0.9 if at > 500 else 0.0)
        assert later < plain * 0.75
        assert drafted > 200


def test_a_machine_slower_than_the_curve_does_not_look_like_a_loss() -> None:
    scheduler = Scheduler(curve(*WIDE))
    for step in range(200):
        asked = scheduler.ask(step, MOST)
        assert asked > 0
        scheduler.observe(Round(step, asked, 4, 2, 3, 0.0, 1.6 * WIDE[4]))
    assert scheduler.plain_seconds(0) == pytest.approx(1.6 * WIDE[0], rel=0.3)


def test_nothing_is_asked_for_where_there_is_no_room() -> None:
    assert Scheduler(curve(1.0, 1.0)).ask(10, 0) == 0
