"""Choices against brute force; rounds with a measurement that is made up."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from dsopt.compiler.goal import Goal
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.knapsack import FLOAT_CACHE, Assignment, Option, Space, _undominated, formats_of
from dsopt.compiler.recipe import Format
from dsopt.compiler.search import ROUNDS, search
from dsopt.compiler.sites import Choice, Site
from dsopt.runtime.errors import DsoptError, UsageError

FORMS = [Choice(Format.parse(text)) for text in ("int8", "int4", "int4-zp", "w8a8")]


def instance(seed: int, count: int = 5) -> tuple[list[Site], list[list[Option]]]:
    """Sites of sizes and speeds as they are met: milliseconds and megabytes, the faster the worse."""
    rng = np.random.default_rng(seed)
    sites, found = [], []
    for number in range(count):
        name, scale = f"site-{number}", rng.uniform(0.2, 2)
        losses, seconds = np.sort(rng.exponential(0.01, 4)), np.sort(rng.uniform(1e-3, 5e-3, 4))[::-1]
        sizes = rng.uniform(1e5, 1e6, 4)
        sites.append(Site(name, (name, f"{name}-twin"), number, 64, 64))
        columns = zip(FORMS, losses, seconds, sizes, strict=True)
        found.append([Option(c, float(a), float(scale * b), int(scale * n)) for c, a, b, n in columns])
    return sites, found


def offered(site: Site, table: KernelTable, workload: str) -> list[Choice]:
    return [option.choice for option in Space.of([site], table, workload).options[0]]


def fastest(found: list[list[Option]], loss: float, size: float = math.inf) -> float:
    """Seconds of the best of all assignments there are."""
    best = math.inf
    for picks in itertools.product(*found):
        if sum(o.loss for o in picks) <= loss and sum(o.nbytes for o in picks) <= size:
            best = min(best, sum(o.seconds for o in picks))
    return best


def check(made: Assignment, sites: list[Site], found: list[list[Option]]) -> None:
    """The sums are those of the choices."""
    picks = [
        next(o for o in offered if o.choice == made.choices[s.name]) for s, offered in zip(sites, found, strict=True)
    ]
    assert made.loss == pytest.approx(sum(o.loss for o in picks))
    assert made.seconds == pytest.approx(sum(o.seconds for o in picks))
    assert made.nbytes == sum(o.nbytes for o in picks)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_fastest_within_a_loss(seed: int, share: float) -> None:
    sites, found = instance(seed)
    least, most = (sum(pick(o.loss for o in offered) for offered in found) for pick in (min, max))
    loss = least + share * (most - least)
    made = Space(sites, found).fastest(loss)
    assert made is not None
    check(made, sites, found)
    assert made.loss <= loss
    # Losses are rounded up to bins: the best of a hair less is never missed.
    assert fastest(found, loss) * (1 - 1e-9) <= made.seconds <= fastest(found, loss * 0.998) * (1 + 1e-9)
    assert Space(sites, found).fastest(0.99 * least) is None


@pytest.mark.parametrize("seed", range(4))
def test_choices_that_exclude_each_other(seed: int) -> None:
    """One of the second site's choices is ruled out by one of the first's, against brute force."""
    sites, found = instance(seed, 4)
    turned = [dataclasses.replace(o, choice=dataclasses.replace(o.choice, rotated=True)) for o in found[2]]
    found[2] += [dataclasses.replace(o, loss=0.3 * o.loss) for o in turned]
    free = Space(sites, found).fastest(0.02)
    assert free is not None
    sites[2].kept = ("site-0", free.choices["site-0"].format)
    made = Space(sites, found).fastest(0.02)
    assert made is not None
    check(made, sites, found)
    assert not (made.choices["site-0"] == free.choices["site-0"] and made.choices["site-2"].rotated)
    least = math.inf
    for picks in itertools.product(*found):
        clash = picks[0].choice == free.choices["site-0"] and picks[2].choice.rotated
        if not clash and sum(o.loss for o in picks) <= 0.998 * 0.02:
            least = min(least, sum(o.seconds for o in picks))
    assert made.loss <= 0.02
    assert made.seconds <= least * (1 + 1e-9)


def test_what_a_rotation_beats_is_still_offered_where_it_may_be_ruled_out() -> None:
    form = Format.parse("w8a8")
    plain, turned = Choice(form), Choice(form, rotated=True)
    table = KernelTable({}, {(64, 64, "w8a8", m): 1e-6 for m in (1, 5, 128)}, {1: 1e-6})
    site = Site("o", ("o",), 0, 64, 64, {plain: 2.0, turned: 1.0})
    assert offered(site, table, "decode") == [turned]
    site.kept = "v", form
    assert offered(site, table, "decode") == [plain, turned]


def test_the_fastest_within_a_size_too() -> None:
    """A price on bytes finds the corners of the curve alone: near the best on the whole, never beyond a limit."""
    over = []
    for seed in range(12):
        sites, found = instance(seed)
        least, most = (sum(pick(o.loss for o in offered) for offered in found) for pick in (min, max))
        loss = least + 0.6 * (most - least)
        free = Space(sites, found).fastest(loss)
        assert free is not None
        small = sum(min(o.nbytes for o in offered) for offered in found)
        size = int(small + 0.6 * (free.nbytes - small))
        best, made = fastest(found, 0.998 * loss, size), Space(sites, found).fastest(loss, size)
        if math.isinf(best):
            continue
        assert made is not None
        check(made, sites, found)
        assert made.loss <= loss
        assert made.nbytes <= size
        over.append(made.seconds / best)
        assert Space(sites, found).fastest(loss, small - 1) is None
    assert len(over) > 6
    assert float(np.mean(over)) < 1.08
    assert max(over) < 1.3


def test_what_is_worse_in_all_ways_is_no_option() -> None:
    rng = np.random.default_rng(0)
    found = [Option(FORMS[0], *map(float, rng.integers(0, 4, 2)), int(rng.integers(0, 4))) for _ in range(40)]
    left = _undominated(found)
    assert 0 < len(left) < 40
    sides = {(o.loss, o.seconds, o.nbytes) for o in found}
    kept = {(o.loss, o.seconds, o.nbytes) for o in left}
    for a in sides:
        beaten = any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in sides)
        assert (a in kept) != beaten


def test_a_cache_that_is_faster_takes_its_part_of_the_budget() -> None:
    sites, found = instance(3)
    least = sum(min(o.loss for o in offered) for offered in found)
    caches = [*FLOAT_CACHE, Assignment({}, 0.3 * least, -0.5, 10, "int8")]
    assert (made := Space(sites, found, caches).fastest(1.2 * least)) is not None
    assert made.cache == "float"  # there is no room for it
    plain = Space(sites, found).fastest(1.5 * least)
    made = Space(sites, found, caches).fastest(1.8 * least)
    assert plain is not None
    assert made is not None
    assert made.cache == "int8"
    assert made.loss <= 1.8 * least
    assert made.seconds <= plain.seconds - 0.5 + 1e-9
    assert {point.cache for point in Space(sites, found, caches).pareto()} == {"float", "int8"}
    best, _ = search(Space(sites, found, caches), Goal(2.5 * least), lambda made: made.loss)
    assert best is not None
    assert best.assignment.cache == "int8"


def test_the_curve_pays_loss_for_time() -> None:
    sites, found = instance(3)
    curve = Space(sites, found).pareto()
    assert len(curve) > 5
    for a, b in itertools.pairwise(curve):
        assert a.seconds > b.seconds
        assert a.loss < b.loss
    assert curve[-1].seconds == pytest.approx(sum(min(o.seconds for o in offered) for offered in found))


def test_seconds_of_a_workload() -> None:
    form = Choice(Format.parse("int8"))
    table = KernelTable({}, {(64, 64, "int8", rows): 1e-6 * rows for rows in (1, 8, 128)})
    block, head = Site("x", ("x",), 0, 64, 64, {form: 0.5}), Site("lm_head", ("lm_head",), None, 64, 64, {form: 0.5})

    def micros(workload: str) -> list[int]:
        return [round(1e6 * offered[0].seconds) for offered in Space.of([block, head], table, workload).options]

    assert micros("chat") == [104 + 8 * 5 + 4 * 128, 104 + 8 * 5 + 4]  # a prompt's chunk asks the head for one row
    assert micros("prefill") == [128, 1]
    assert micros("batch") == [8, 8]
    assert micros("speculative") == [3 * 5 + 1] * 2
    untied = Site("lm_head", ("lm_head",), None, 64, 64, {form: 0.5}, copies=2)
    assert (
        Space.of([untied], table, "chat").options[0][0].nbytes
        == 2 * Space.of([head], table, "chat").options[0][0].nbytes
    )
    (offered,) = Space.of([block], table, "decode").options
    assert (offered[0].nbytes, offered[0].loss) == (64 * 64 + 4 * 64 * 2, 0.5)


# --- rounds


@pytest.mark.parametrize("ratio", [0.3, 1.5, 4.0])
def test_rounds_correct_the_estimates(ratio: float) -> None:
    sites, found = instance(1, 12)
    least, most = (sum(pick(o.loss for o in offered) for offered in found) for pick in (min, max))
    goal = Goal(ratio * (0.6 * least + 0.4 * most))
    asked: list[Assignment] = []

    def measure(made: Assignment) -> float:
        asked.append(made)
        return ratio * made.loss

    best, rounds = search(Space(sites, found), goal, measure)
    assert best is not None
    assert [r.assignment for r in rounds] == asked
    assert 1 <= len(rounds) <= ROUNDS
    assert 0.85 * goal.loss <= best.measured <= goal.loss
    assert best.assignment.seconds == min(r.assignment.seconds for r in rounds if r.measured <= goal.loss)


def test_a_build_that_lost_too_much_is_not_taken() -> None:
    """The fastest misses; the slower one before it held."""
    losses = iter([0.1, 0.5, 0.5])
    sites, found = instance(1, 12)
    best, rounds = search(Space(sites, found), Goal(0.2), lambda made: next(losses))
    assert len(rounds) > 1
    assert rounds[1].assignment.seconds < rounds[0].assignment.seconds
    assert best is rounds[0]


def test_a_first_build_is_not_expected_beyond_the_budget_without_need() -> None:
    """Nothing as gentle as it should be, but something within what is allowed."""
    sites, found = instance(1, 12)
    least = sum(min(o.loss for o in offered) for offered in found)
    goal = Goal(1.2 * least)
    _, rounds = search(Space(sites, found), goal, lambda made: made.loss)
    assert least <= rounds[0].assignment.loss <= 1.2 * least


def test_the_last_round_keeps_its_distance() -> None:
    """Builds that lose a little more each time than the last one let expect: the third must not miss by as little."""
    sites, found = instance(1, 12)
    drift = iter([2.5, 2.6, 2.75])
    best, rounds = search(Space(sites, found), Goal(0.2), lambda made: next(drift) * made.loss)
    assert [r.measured > 0.2 for r in rounds] == [True, True, False]
    assert best is rounds[-1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("miss", [2, 3, 8])
def test_after_a_miss_less_loss_is_expected(seed: int, miss: float) -> None:
    """Down to about the least that there is, and never more again."""
    sites, found = instance(seed, 12)
    least = sum(min(o.loss for o in offered) for offered in found)
    best, rounds = search(Space(sites, found), Goal(1.3 * least), lambda made: miss * made.loss)
    assert best is None
    assert len(rounds) > 1
    losses = [r.assignment.loss for r in rounds]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1.05 * least


def test_where_all_miss_there_is_none() -> None:
    sites, found = instance(1, 12)
    best, rounds = search(Space(sites, found), Goal(0.2), lambda made: 9.0)
    assert best is None
    losses = [r.assignment.loss for r in rounds]
    assert losses == sorted(set(losses), reverse=True)


def test_a_loss_below_all_estimates_is_tried_before_it_is_refused() -> None:
    sites, found = instance(1)
    least = sum(min(o.loss for o in offered) for offered in found)
    best, rounds = search(Space(sites, found), Goal(least / 2), lambda made: made.loss / 4)
    assert rounds[0].assignment.loss > least / 2
    assert best in rounds
    with pytest.raises(DsoptError, match="nats in 1 MB"):
        search(Space(sites, found), Goal(least / 2, size=1_000_000), lambda made: 0.0)


# --- goals


def test_goals() -> None:
    assert Goal.parse("0.01", None, "chat") == Goal(0.01)
    assert Goal.parse("1e-3", "105MB", "batch") == Goal(0.001, 105_000_000, "batch")
    percent = Goal.parse("2%", "1.5 GB", "prefill")
    assert percent.loss == pytest.approx(math.log(1.02))
    assert (percent.size, percent.quantity) == (1_500_000_000, "ln_ppl_ratio")


def test_a_loss_is_told_in_the_unit_of_the_budget() -> None:
    nats, percent = Goal(0.0125), Goal.parse("2%", None, "chat")
    assert (nats.budget, nats.said(0.02)) == ("0.0125 nats", "0.0200 nats")
    assert (percent.budget, percent.said(math.log(1.0346))) == ("2 %", "3.46 % of perplexity")
    assert percent.said(1e6).endswith("% of perplexity")  # a model that knows nothing any more


@pytest.mark.parametrize(
    ("loss", "size", "workload", "says"),
    [
        ("much", None, "chat", "--max-quality-loss"),
        ("-1", None, "chat", "--max-quality-loss"),
        ("0", None, "chat", "--max-quality-loss"),
        ("0%", None, "chat", "--max-quality-loss"),
        ("1e9", None, "chat", "--max-quality-loss"),
        ("0.1", "105", "chat", "--max-size"),
        ("0.1", "0MB", "chat", "--max-size"),
        ("0.1", "9" * 400 + "GB", "chat", "--max-size"),
        ("0.1", None, "games", "--for"),
    ],
)
def test_wrong_goals(loss: str, size: str | None, workload: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Goal.parse(loss, size, workload)
    assert "\n" not in str(caught.value)


def test_each_module_has_the_format_of_its_site() -> None:
    sites, _ = instance(0, 2)
    made = Assignment({"site-0": FORMS[0], "site-1": FORMS[3]}, 0, 0, 0)
    assert {name: str(form) for name, form in formats_of(sites, made).items()} == {
        "site-0": "int8",
        "site-0-twin": "int8",
        "site-1": "w8a8",
        "site-1-twin": "w8a8",
    }


def test_verification_takes_no_kernel_whose_rows_look_at_each_other() -> None:
    alone, mixing = Choice(Format.parse("int8")), Choice(Format.parse("w8a8"))
    times = {(64, 64, name, rows): seconds for name, seconds in (("int8", 2.0), ("w8a8", 1.0)) for rows in (1, 8, 128)}
    site = Site("x", ("x",), 0, 64, 64, {alone: 0.1, mixing: 0.1})
    chosen = {work: offered(site, KernelTable({}, times), work) for work in ("decode", "speculative")}
    assert chosen["decode"][0] == mixing
    assert chosen["speculative"] == [alone]
