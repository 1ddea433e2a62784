"""Optimal Brain Surgeon for whole input channels of a linear layer (ZipLM, arXiv:2302.04089). Pure arithmetic.

A layer W [D, F] reads h with G = E[h h'] [F, F]. Without the channels S, and the others refitted by least squares, the
mean output error grows by tr(W_S' M W_S ([G^-1]_SS)^-1), M [D, D] saying what an error of the output costs. Taking S
out of G^-1 is a rank-|S| update, so channels go group by group, each chosen given those that went before.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DAMP = 1e-2  # of the median channel's energy, added to each: channels that the text never used have none
_TRIED = 4  # times the size of a group


def eliminate(gram: Tensor, weight: Tensor, metric: Tensor, sizes: Iterator[int]) -> Iterator[tuple[Tensor, float]]:
    """Yield (channels, cost) of groups of the given sizes, the cheapest first; costs are in M's unit times G's.

    gram float64 [F, F], weight [D, F], metric float64 [D, D].
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    felt = torch.linalg.cholesky(metric).T @ weight.double()  # columns whose squared norm is w' M w
    left = torch.arange(gram.shape[0])
    for size in sizes:
        chosen = _cheapest(inverse, felt, size)
        block, across = inverse[chosen][:, chosen], inverse[chosen]
        solved = torch.linalg.solve(block, torch.cat([felt[:, chosen].T, across], 1))
        cost = float((felt[:, chosen].T * solved[:, : felt.shape[0]]).sum())
        yield left[chosen], cost
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[chosen] = False
        correction = solved[:, felt.shape[0] :][:, stay]
        felt = felt[:, stay] - felt[:, chosen] @ correction
        inverse = inverse[stay][:, stay] - across[:, stay].T @ correction
        left = left[stay]


def _cheapest(inverse: Tensor, felt: Tensor, size: int) -> Tensor:
    """The places, ascending, of `size` channels that go together.

    One by one among those that score best alone: of two that say the same both score well, but only one may go.
    """
    alone = felt.square().sum(0) / inverse.diagonal()
    tried = alone.argsort()[: _TRIED * size]
    inner, products = inverse[tried][:, tried].clone(), felt[:, tried].T @ felt[:, tried]
    chosen: list[int] = []
    for _ in range(size):
        scores = products.diagonal() / inner.diagonal()
        scores[chosen] = torch.inf
        least = int(scores.argmin())
        chosen.append(least)
        moved = inner[least] / inner[least, least]  # how much of the channel each other one takes over
        row = products[least].clone()
        products += row[least] * torch.outer(moved, moved) - torch.outer(row, moved) - torch.outer(moved, row)
        inner -= torch.outer(inner[least].clone(), moved)
    return tried[chosen].sort().values


def damped(gram: Tensor, damp: float = DAMP) -> Tensor:
    """G + a small multiple of the identity. Of the median: a few features are thousands of times as large as others."""
    middle = gram.diagonal().median().clamp_min(1e-9 * gram.diagonal().max() + 1e-30)
    return gram + damp * middle * torch.eye(len(gram), dtype=gram.dtype)


def refit(gram: Tensor, cross: Tensor, damp: float) -> Tensor:
    """The [D, F] that maps h to a residual best in the least-squares sense, pulled to 0 by `damp`.

    gram = E[h h'] [F, F], cross = E[r h'] [D, F].
    """
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped(gram, damp))).T


def eliminate_units(gram: Tensor, weight: Tensor, metric: Tensor, unit: int, count: int) -> tuple[Tensor, float]:
    """The channels of `count` units of `unit` neighbouring channels each (the heads of a group), and their cost."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    felt = torch.linalg.cholesky(metric).T @ weight.double()
    left, gone, total = list(range(len(gram) // unit)), [], 0.0
    for _ in range(count):
        chosen = min(left, key=lambda u: _unit_cost(inverse, felt, slice(u * unit, (u + 1) * unit)))
        part = slice(chosen * unit, (chosen + 1) * unit)
        total += _unit_cost(inverse, felt, part)
        across = inverse[part].clone()
        correction = torch.linalg.solve(across[:, part], across)
        felt = felt - felt[:, part] @ correction
        inverse = inverse - across.T @ correction
        left.remove(chosen)
        gone += list(range(part.start, part.stop))
    return torch.tensor(sorted(gone), dtype=torch.int64), total


def _unit_cost(inverse: Tensor, felt: Tensor, part: slice) -> float:
    return float((felt[:, part].T * torch.linalg.solve(inverse[part, part], felt[:, part].T)).sum())
