"""The fastest choice for each site whose losses, summed, stay within a budget: a knapsack, solved exactly.

Losses are estimates and add up only nearly, so what was chosen is built and measured, the estimates are scaled by what
they missed, and the choice is made again; the best that held the budget wins. Sizes come in by a price on bytes.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.recipe import Format
from dsopt.compiler.sites import Choice, Site
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.session import PREFILL_CHUNK

# How often a layer runs with how many rows, for one use: a prompt of 512 tokens and an answer of 128, of which drafts
# that were verified give a fifth; a token; a prompt; eight sequences at once; rounds that verify four drafted tokens.
WORKLOADS = {
    "chat": {1: 104, 5: 8, 128: 4},
    "decode": {1: 1},
    "prefill": {128: 1},
    "batch": {8: 1},
    "speculative": {5: 3, 1: 1},
}
_PROMPT = 512  # rows of a device's run over a prompt, which is not cut into chunks
ROUNDS = 3
_OPTIMISM = 2.3  # what builds lose beside their estimates, before one was measured: 2.1 to 2.8 on SmolLM2
_BINS = 4000  # of the budget; a loss is rounded up to the next
_ENDLESS = 100.0  # nats; a perplexity that is larger yet has no use as a number
_HALVINGS = 7  # of the range in which the least loss lies
_STEPS = 45  # by a quarter: to ten thousand times the budget
_PRICINGS = 24  # bisections of the price on bytes


@dataclass(frozen=True)
class Goal:
    """What is wanted. `loss` in nats a token, `size` in bytes or None, `workload` a name of WORKLOADS.

    `quantity` is what the loss is measured by: `kld_mean`, or `ln_ppl_ratio`, which on text that the model wrote itself
    has the same expectation.
    """

    loss: float
    size: int | None = None
    workload: str = "chat"
    quantity: str = "kld_mean"

    @classmethod
    def parse(cls, loss: str, size: str | None, workload: str) -> "Goal":
        """`0.01` nats of KL divergence or `2%` of perplexity; `105MB`, `1.2GB`. Raises UsageError."""
        match = re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?)\s*(%?)", loss)
        if match is None:
            raise UsageError(f"--max-quality-loss is {loss!r}; nats, as 0.01, or per cent of perplexity, as 2%")
        value = float(match[1])
        if match[2]:
            return cls(math.log1p(value / 100), _bytes(size), workload, "ln_ppl_ratio")
        return cls(value, _bytes(size), workload)

    def __post_init__(self) -> None:
        if not 0 < self.loss < 100:
            raise UsageError(
                f"--max-quality-loss is {self.loss:g}; nats above 0, such as 0.01, or per cent, such as 2%"
            )
        if self.workload not in WORKLOADS:
            raise UsageError(f"--for is {self.workload!r}; it must be one of {', '.join(WORKLOADS)}")

    def said(self, loss: float) -> str:
        """A loss in nats, in the unit that the budget was given in: `0.0131 nats`, `1.32 % of perplexity`."""
        if self.quantity == "ln_ppl_ratio":
            return f"{100 * math.expm1(min(loss, _ENDLESS)):.3g} % of perplexity"
        return f"{loss:.4f} nats"

    @property
    def budget(self) -> str:
        """What is allowed, as short as it was said: `0.01 nats`, `2 %`."""
        if self.quantity == "ln_ppl_ratio":
            return f"{100 * math.expm1(self.loss):.4g} %"
        return f"{self.loss:.4g} nats"


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d*\.?\d+)\s*(kB|MB|GB)", size)
    if match is None or not 0 < float(match[1]) < 1e9:
        raise UsageError(f"--max-size is {size!r}; a number with kB, MB or GB, as 105MB")
    return int(float(match[1]) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[match[2]])


@dataclass(frozen=True)
class Assignment:
    """A choice for each of some sites, by the site's name, and the type of the cache; expected loss in nats, seconds of
    the workload in linear layers (less what a cache in int8 saves elsewhere), bytes."""

    choices: dict[str, Choice]
    loss: float
    seconds: float
    nbytes: int
    cache: str = "float"  # or int8

    def __add__(self, other: "Assignment") -> "Assignment":
        return Assignment(
            {**self.choices, **other.choices},
            self.loss + other.loss,
            self.seconds + other.seconds,
            self.nbytes + other.nbytes,
            other.cache if self.cache == "float" else self.cache,
        )

    def is_as(self, other: "Assignment") -> bool:
        """Whether the same would be built."""
        return (self.choices, self.cache) == (other.choices, other.cache)


@dataclass(frozen=True)
class Option:
    choice: Choice
    loss: float
    seconds: float
    nbytes: int


_Priced = TypeVar("_Priced", Option, Assignment)


def rows_of(workload: str, target: str = "cpu") -> dict[int, int]:
    """How often a layer runs with how many rows, on this target."""
    work = WORKLOADS[workload]
    if target == "cpu":
        return work
    return {_PROMPT if m == PREFILL_CHUNK else m: -(-n * m // _PROMPT) if m == PREFILL_CHUNK else n
            for m, n in work.items()}  # fmt: skip


def options(sites: Sequence[Site], table: KernelTable, workload: str) -> list[list[Option]]:
    """What can be chosen at each site, without what is worse than another in loss, time and size alike.

    For speculation a row's result may not depend on the rows beside it, which may be rejected: no kernel with one
    activation scale for all of them.
    """
    offered = [[c for c in site.prices if workload != "speculative" or c.format.kernel != "w8a8"] for site in sites]
    for site, choices in zip(sites, offered, strict=True):
        if not choices:
            raise DsoptError(
                f"--for {workload}: rows of {site.k} ({site.name}) are no whole blocks of 32; --quant int8 does without"
            )
    priced = [
        [price_option(site, choice, table, workload) for choice in choices]
        for site, choices in zip(sites, offered, strict=True)
    ]
    # Where rotating is ruled out by another choice, what it is better than must be there to be taken instead.
    return [
        _undominated([option for option in found if not option.choice.rotated])
        + _undominated([option for option in found if option.choice.rotated])
        if site.kept
        else _undominated(found)
        for site, found in zip(sites, priced, strict=True)
    ]


def price_option(site: Site, choice: Choice, table: KernelTable, workload: str) -> Option:
    """What a choice costs: its loss, the seconds of all runs of the workload, its bytes."""
    head, seconds = site.layer is None, 0.0
    for rows, count in rows_of(workload, table.target).items():
        # The head computes one row of a prompt, and all of a step that verifies.
        seconds += count * table.time(site.n, site.k, choice.format, 1 if head and rows >= 128 else rows)
    return Option(choice, site.prices[choice], seconds, site.nbytes(choice.format, table.float_bytes))


def _undominated(found: list[_Priced]) -> list[_Priced]:
    sides = np.array([(one.loss, one.seconds, one.nbytes) for one in found]).reshape(-1, 3)
    mine, others = sides[:, None], sides[None]
    is_worse = np.any(np.all(mine >= others, 2) & np.any(mine > others, 2), 1).tolist()
    return [one for one, worse in zip(found, is_worse, strict=True) if not worse]


def _joined(sites: Sequence[Site], found: Sequence[Sequence[Option]]) -> list[list[Assignment]]:
    """The options of each site, or of two together where the choice of one rules out some of the other's."""
    made = {
        site.name: [Assignment({site.name: o.choice}, o.loss, o.seconds, o.nbytes) for o in offered]
        for site, offered in zip(sites, found, strict=True)
    }
    for site in sites:
        if site.kept is not None:
            maker, form = site.kept
            own = made.pop(site.name)
            made[maker] = _undominated(
                [
                    values + context
                    for values in made[maker]
                    for context in own
                    if values.choices[maker].format != form or not context.choices[site.name].rotated
                ]
            )
    return list(made.values())


FLOAT_CACHE = (Assignment({}, 0.0, 0.0, 0),)
Caches = Sequence[Assignment]
"""What the cache can be, as assignments without sites."""


def solve(
    sites: Sequence[Site],
    found: Sequence[Sequence[Option]],
    loss: float,
    size: int | None = None,
    caches: Caches = FLOAT_CACHE,
) -> Assignment | None:
    """The fastest assignment of at most `loss` and `size`; None where there is none."""
    joined = [*_joined(sites, found), caches]
    best = _assign(joined, loss, 0.0)
    if size is None or best is None or best.nbytes <= size:
        return best
    smallest = _assign(joined, loss, 1e6)
    if smallest is None or smallest.nbytes > size:
        return None
    low, high, best = 0.0, 1e6, smallest
    for step in range(_PRICINGS):  # seconds a byte; geometric, once a price is known to be too high
        price = 1e-9 if step == 0 else math.sqrt(low * high) if low else high / 30
        tried = _assign(joined, loss, price)
        if tried is not None and tried.nbytes <= size:
            high, best = price, min(best, tried, key=lambda a: a.seconds)
        else:
            low = price
    return best


def _assign(found: Sequence[Sequence[Assignment]], loss: float, price: float) -> Assignment | None:
    """By dynamic programming over the budget in bins: the least seconds + price x bytes for each loss so far."""
    least = np.zeros(_BINS + 1)
    picks: list[NDArray[np.int64]] = []
    for offered in found:
        costs = np.full((len(offered), _BINS + 1), np.inf)
        for row, option in zip(costs, offered, strict=True):
            bins = _bins(option, loss)
            if bins <= _BINS:
                row[bins:] = least[: _BINS + 1 - bins] + option.seconds + price * option.nbytes
        pick = costs.argmin(0)
        least = costs[pick, np.arange(_BINS + 1)]
        picks.append(pick)
    if not np.isfinite(least[_BINS]):
        return None
    chosen, left = list[Assignment](), _BINS
    for offered, pick in zip(reversed(found), reversed(picks), strict=True):
        chosen.append(offered[pick[left]])
        left -= _bins(chosen[-1], loss)
    chosen.reverse()
    return sum(chosen[1:], chosen[0])


def _bins(option: Assignment, loss: float) -> int:
    return int(np.ceil(min(option.loss / loss, 2) * _BINS - 1e-9))


def pareto(
    sites: Sequence[Site], found: Sequence[Sequence[Option]], points: int = 24, caches: Caches = FLOAT_CACHE
) -> list[Assignment]:
    """The fastest assignment for budgets from the least loss that there is to where more loss buys nothing."""
    least = sum(min(option.loss for option in offered) for offered in found)
    fastest = sum(min(offered, key=lambda option: option.seconds).loss for offered in found)
    fastest += min(caches, key=lambda cache: cache.seconds).loss
    curve: list[Assignment] = []
    for budget in np.geomspace(max(1.02 * least, 1e-6), max(1.05 * fastest, 1.1 * least, 2e-6), points):
        made = solve(sites, found, float(budget), caches=caches)
        if made is not None and (not curve or made.seconds < curve[-1].seconds):
            curve.append(made)
    return curve


@dataclass(frozen=True)
class Round:
    """One build: what was expected of it, and its measured loss in nats a token."""

    assignment: Assignment
    measured: float


def search(
    sites: Sequence[Site],
    found: Sequence[Sequence[Option]],
    goal: Goal,
    measure: Callable[[Assignment], float],
    caches: Caches = FLOAT_CACHE,
) -> tuple[Round | None, list[Round]]:
    """Build and `measure` at most ROUNDS assignments; the fastest within the goal, or None, and all rounds.

    Raises DsoptError when no assignment is expected to fit.
    """
    rounds: list[Round] = []
    for _ in range(ROUNDS):
        budget = _budget(rounds, goal.loss)
        made = solve(sites, found, budget, goal.size, caches)
        if made is None:  # estimates may be too high: let the measurement decide
            if rounds:
                made = _gentler(sites, found, goal, budget, rounds, caches)
            else:
                made = _gentlest(sites, found, goal, caches)
        if made is None or any(made.is_as(before.assignment) for before in rounds):
            break
        rounds.append(Round(made, measure(made)))
        if 0.85 * goal.loss <= rounds[-1].measured <= goal.loss:
            break
    fitting = [r for r in rounds if r.measured <= goal.loss]
    return min(fitting, key=lambda r: r.assignment.seconds, default=None), rounds


def first_choice(
    sites: Sequence[Site], found: Sequence[Sequence[Option]], goal: Goal, caches: Caches = FLOAT_CACHE
) -> Assignment | None:
    """What `search` builds first where something is expected to fit."""
    return solve(sites, found, _budget([], goal.loss), goal.size, caches)


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


def _gentler(
    sites: Sequence[Site],
    found: Sequence[Sequence[Option]],
    goal: Goal,
    budget: float,
    rounds: Sequence[Round],
    caches: Caches,
) -> Assignment | None:
    """Of nearly the least expected loss that there is, more than `budget`; None where that is not less than missed."""
    missed = [r.assignment.loss for r in rounds if r.measured > goal.loss]
    if not missed:
        return None
    low, high = budget, min(missed) * (1 - 1e-6)
    best = solve(sites, found, high, goal.size, caches)
    for _ in range(_HALVINGS if best else 0):
        middle = math.sqrt(low * high)
        made = solve(sites, found, middle, goal.size, caches)
        if made is None:
            low = middle
        else:
            best, high = made, middle
    return best


def _gentlest(sites: Sequence[Site], found: Sequence[Sequence[Option]], goal: Goal, caches: Caches) -> Assignment:
    """Of little more expected loss than the least that there is, which is more than a first build should have."""
    budget = goal.loss / _OPTIMISM
    for _ in range(_STEPS):
        budget *= 1.25
        made = solve(sites, found, budget, goal.size, caches)
        if made is not None:
            return made
    limit = f" in {goal.size / 1e6:.0f} MB" if goal.size else ""
    raise DsoptError(f"no choice of kernels loses as little as {goal.budget}{limit}; allow more")


def formats_of(sites: Sequence[Site], assignment: Assignment) -> dict[str, Format]:
    """The format of each module."""
    return {module: assignment.choices[site.name].format for site in sites for module in site.modules}
