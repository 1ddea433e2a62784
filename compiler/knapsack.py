"""The fastest choice for each site whose losses, summed, stay within a budget: a knapsack, solved exactly.

Sizes come in by a price on bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dsopt.compiler.goal import rows_of
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.recipe import Format
from dsopt.compiler.sites import Choice, Site
from dsopt.runtime.errors import DsoptError

_BINS = 4000  # of the budget; a loss is rounded up to the next
_PRICINGS = 24  # bisections of the price on bytes


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


FLOAT_CACHE = (Assignment({}, 0.0, 0.0, 0),)


@dataclass(frozen=True)
class Space:
    """What can be chosen: for each of `sites` one of its `options`, and one of `caches`, assignments without sites."""

    sites: Sequence[Site]
    options: Sequence[Sequence[Option]]
    caches: Sequence[Assignment] = FLOAT_CACHE

    @classmethod
    def of(
        cls, sites: Sequence[Site], table: KernelTable, workload: str, caches: Sequence[Assignment] = FLOAT_CACHE
    ) -> "Space":
        """By the times of `table`. Raises DsoptError where a site has no kernel that suits the workload."""
        return cls(sites, _options(sites, table, workload), caches)

    def fastest(self, loss: float, size: int | None = None) -> Assignment | None:
        """The fastest assignment of at most `loss` and `size`; None where there is none."""
        best = _assign(self._parts, loss, 0.0)
        if size is None or best is None or best.nbytes <= size:
            return best
        smallest = _assign(self._parts, loss, 1e6)
        if smallest is None or smallest.nbytes > size:
            return None
        low, high, best = 0.0, 1e6, smallest
        for step in range(_PRICINGS):  # seconds a byte; geometric, once a price is known to be too high
            price = 1e-9 if step == 0 else math.sqrt(low * high) if low else high / 30
            tried = _assign(self._parts, loss, price)
            if tried is not None and tried.nbytes <= size:
                high, best = price, min(best, tried, key=lambda a: a.seconds)
            else:
                low = price
        return best

    def pareto(self, points: int = 24) -> list[Assignment]:
        """The fastest assignment for budgets from the least loss that there is to where more loss buys nothing."""
        least = sum(min(option.loss for option in offered) for offered in self.options)
        fastest = sum(min(offered, key=lambda option: option.seconds).loss for offered in self.options)
        fastest += min(self.caches, key=lambda cache: cache.seconds).loss
        curve: list[Assignment] = []
        for budget in np.geomspace(max(1.02 * least, 1e-6), max(1.05 * fastest, 1.1 * least, 2e-6), points):
            made = self.fastest(float(budget))
            if made is not None and (not curve or made.seconds < curve[-1].seconds):
                curve.append(made)
        return curve

    @cached_property
    def _parts(self) -> list[Sequence[Assignment]]:
        return [*_joined(self.sites, self.options), self.caches]


def _options(sites: Sequence[Site], table: KernelTable, workload: str) -> list[list[Option]]:
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


def formats_of(sites: Sequence[Site], assignment: Assignment) -> dict[str, Format]:
    """The format of each module."""
    return {module: assignment.choices[site.name].format for site in sites for module in site.modules}
