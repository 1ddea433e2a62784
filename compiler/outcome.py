"""What a search found, in words: for a plan, for a manifest."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dsopt.compiler.goal import Goal
from dsopt.compiler.knapsack import Assignment, Option, price_option
from dsopt.compiler.recipe import HEAD, Format
from dsopt.compiler.search import Round, first_choice
from dsopt.compiler.sites import Site
from dsopt.compiler.study import Study


def preview(found: Study, goal: Goal) -> dict[str, Any]:
    """What a search would build first, by its estimates, choice by choice, None where none is expected to fit; and the
    other points of the curve."""
    space, taken = found.space(goal), found.taken(goal)
    made = first_choice(space, found.left(goal))
    first = made and _point(made, taken) | {"choices": {name: str(choice) for name, choice in made.choices.items()}}
    return {
        "goal": dataclasses.asdict(goal),
        **({"pruning": {**found.pruned.facts(), "loss": taken}} if found.pruned else {}),
        "first": first,
        "pareto": [_point(point, taken) for point in space.pareto()],
    }


def describe_nodes(
    nodes: tuple[Mapping[str, Any], ...], sites: list[Site], made: Assignment
) -> Iterator[Mapping[str, Any]]:
    """Each node with what was chosen for its site and what that is expected to cost."""
    sites_by_module = {module: site for site in sites for module in site.modules}
    for node in nodes:
        site = sites_by_module.get(HEAD if node["role"] == "head" else node["name"])
        if site is None or node["role"] == "embed":
            yield node
            continue
        choice = made.choices[site.name]
        yield {
            **node,
            "smoothing": choice.alpha,
            "rotated": choice.rotated,
            "site": site.name,
            "loss": site.prices[choice],
        }


def describe_search(found: Study, goal: Goal, best: Round, rounds: list[Round]) -> dict[str, Any]:
    curve, taken = found.space(goal).pareto(), found.taken(goal)
    return {
        "goal": dataclasses.asdict(goal),
        "pruned": taken,
        "rounds": [_point(r.assignment, taken) | {"measured": r.measured + taken, "chosen": r is best} for r in rounds],
        "pareto": [_point(made, taken) for made in curve],
        "uniform": {
            str(replace(kind, block=32)): _point(made, taken)
            for kind in dict.fromkeys(_kind(choice.format) for site in found.sites for choice in site.prices)
            if (made := _uniform(found, goal, kind)) is not None
        },
    }


def _point(made: Assignment, taken: float) -> dict[str, Any]:
    """`taken` by pruning, before any format was chosen."""
    return {
        "loss": made.loss + taken,
        "seconds": made.seconds,
        "bytes": made.nbytes,
        "formats": count_formats(made),
        "cache": made.cache,
    }


def _uniform(found: Study, goal: Goal, form: Format) -> Assignment | None:
    """The fixed recipe: one kind of format everywhere, in the fastest blocks, unsmoothed; the head's is 8 bits where it
    has not that kind."""
    picked: list[Option] = []
    for site in found.sites:
        plain = [price_option(site, c, found.table, goal.workload) for c in site.prices if c.alpha is None]
        same = [option for option in plain if _kind(option.choice.format) == _kind(form)]
        if not same and site.layer is None:
            same = [option for option in plain if option.choice.format.bits == 8]
        if not same:
            return None
        picked.append(min(same, key=lambda option: option.seconds))
    return Assignment(
        {site.name: option.choice for site, option in zip(found.sites, picked, strict=True)},
        sum(option.loss for option in picked),
        sum(option.seconds for option in picked),
        sum(option.nbytes for option in picked),
    )


def _kind(form: Format) -> Format:
    """The format but for the size of its blocks."""
    return replace(form, block=0)


def count_formats(made: Assignment) -> dict[str, int]:
    forms = [str(choice.format) for choice in made.choices.values()]
    return {form: forms.count(form) for form in dict.fromkeys(forms)}
