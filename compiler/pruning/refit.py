"""Repair without training: last weights refitted in order, each on what the pruned model before it really gives.

Two streams run side by side, dense and pruned. The last linear layer of each sublayer that stays is fitted by least
squares to the dense stream's hidden states before the next one that stays, so that it takes over what removed channels
and removed sublayers behind it added (as ReplaceMe, arXiv:2505.02819, merges a linear map into down_proj; here the
whole matrix is free) and corrects what went wrong before. Tokens count by their error in units of their size, which is
what norms let through.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsopt.compiler.pruning.obs import DAMP, eliminate, eliminate_units, refit
from dsopt.compiler.pruning.sensitivity import Sensitivity, token_sizes
from dsopt.compiler.pruning.stream import Stream, Sublayer
from dsopt.compiler.pruning.widths import group_sizes

_PULLS = (1e-2, 1e-1, 1.0, 10.0)  # how strongly a refit is held back; what predicts held-out text best is taken
HELD_OUT = 8  # every eighth window judges and is not fitted to


@dataclass(frozen=True)
class Fit:
    """kept: features kept, ascending, None for all. weight float32 [hidden, kept]. cost: of what went, in nats."""

    kept: Tensor | None
    weight: Tensor
    cost: float


@dataclass(frozen=True)
class Loss:
    """How many features a sublayer loses, in units of `unit` neighbours where that is not 1."""

    count: int
    unit: int = 1


class Statistics:
    """Sums over tokens of the weighted products that a least-squares fit needs, of fitted and held-out windows."""

    def __init__(self, features: int, hidden: int) -> None:
        self.gram = torch.zeros(2, features, features, dtype=torch.float64)
        self.cross = torch.zeros(2, hidden, features, dtype=torch.float64)
        self.tokens = 0

    def add(self, features: Tensor, residual: Tensor, sizes: Tensor, held_out: bool) -> None:
        """features [b, s, F], the residual [b, s, D] that they should explain, `sizes` [b, s, 1] of hidden states."""
        h, r = ((x / sizes).flatten(0, 1) for x in (features, residual))
        self.gram[int(held_out)] += h.T @ h
        self.cross[int(held_out)] += r.T @ h
        self.tokens += len(h)

    def mean_gram(self) -> Tensor:
        return self.gram.sum(0) / self.tokens


@dataclass
class Streams:
    """The hidden states [n, s, hidden] of the dense and the pruned model, as far as they have come."""

    dense: Tensor
    pruned: Tensor


def refit_sublayers(
    stream: Stream,
    states: Streams,
    removed: frozenset[Sublayer],
    losses: Mapping[Sublayer, Loss],
    felt: Mapping[Sublayer, Sensitivity],
) -> Iterator[tuple[Sublayer, Fit]]:
    """Yield the fit of each sublayer that changes, and carry `states` from the embedding to the end."""
    order = stream.sublayers
    stays = [sublayer for sublayer in order if sublayer not in removed]
    for sublayer in order[: order.index(stays[0])]:
        states.dense = stream.advance(sublayer, states.dense)
    for sublayer, following in zip(stays, [*stays[1:], None], strict=True):
        start = order.index(sublayer)
        end = order.index(following) if following else len(order)
        target = states.dense
        for step in order[start:end]:
            target = stream.advance(step, target)
        if states.pruned is states.dense and sublayer not in losses and end == start + 1:
            states.pruned = target
        else:
            fit, states.pruned = _fit(stream, sublayer, states, target, losses.get(sublayer), felt[sublayer].metric)
            yield sublayer, fit
        states.dense = target


def _fit(
    stream: Stream,
    sublayer: Sublayer,
    states: Streams,
    target: Tensor,
    loss: Loss | None,
    metric: Tensor,
) -> tuple[Fit, Tensor]:
    weight, sizes = stream.weight(sublayer), token_sizes(target)
    statistics = Statistics(weight.shape[1], weight.shape[0])
    features: list[Tensor] = []
    for number, (x, wanted, size) in enumerate(zip(*map(_windows, (states.pruned, target, sizes)), strict=True)):
        h, out = stream.run(sublayer, x)
        statistics.add(h, wanted - x - out, size, number % HELD_OUT == HELD_OUT - 1)
        features.append(h)
    gone, cost = _choose(statistics.mean_gram(), weight, metric, loss)
    fitted, kept = solve(statistics, weight, metric, gone)
    new = [h[..., kept] @ fitted.T for h in features]
    return Fit(kept if len(gone) else None, fitted, cost), states.pruned + torch.cat(new)


def _windows(x: Tensor) -> Iterator[Tensor]:
    return iter(x.split(1))


def _choose(gram: Tensor, weight: Tensor, metric: Tensor, loss: Loss | None) -> tuple[Tensor, float]:
    """(features to remove, what that costs in nats)."""
    if loss is None or not loss.count:
        return torch.empty(0, dtype=torch.int64), 0.0
    if loss.unit > 1:
        gone, cost = eliminate_units(gram, weight, metric, loss.unit, loss.count // loss.unit)
        return gone, cost / 2
    parts, costs, found = [], 0.0, 0
    for channels, cost in eliminate(gram, weight, metric, group_sizes(len(gram))):
        if found >= loss.count:
            break
        parts.append(channels)
        costs += cost / 2
        found += len(channels)
    return torch.cat(parts).sort().values, costs


def solve(statistics: Statistics, weight: Tensor, metric: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """(weight float32 [D, kept], kept): without the features `gone`, refitted to the residual.

    The part of what goes that the others explain is known well, from the features alone, and taken over in full; the
    residual is noisier, and its part is held back as much as held-out windows say.
    """
    stay = torch.ones(weight.shape[1], dtype=torch.bool)
    stay[gone] = False
    kept = stay.nonzero().flatten()
    gram, dense = statistics.gram.sum(0), weight.double()
    lost = dense[:, gone] @ gram[gone][:, kept]
    base = dense[:, kept] + (refit(gram[kept][:, kept], lost, DAMP) if len(gone) else 0)
    # The residual towards the target that `base` leaves: r + W h - base h.
    crosses = [
        cross[:, kept] + (dense @ part[:, kept] - base @ part[kept][:, kept] if len(gone) else 0)
        for cross, part in zip(statistics.cross, statistics.gram, strict=True)
    ]
    grams = [part[kept][:, kept] for part in statistics.gram]
    pull = min((None, *_PULLS), key=lambda pull: _held_out_error(grams, crosses, metric, pull))
    if pull is not None:
        base = base + refit(sum(grams), sum(crosses), pull)
    return base.float(), kept


def _held_out_error(grams: list[Tensor], crosses: list[Tensor], metric: Tensor, pull: float | None) -> float:
    """By how much a refit with this pull changes the held-out error; None is no refit, which changes nothing."""
    if pull is None:
        return 0.0
    change = refit(grams[0], crosses[0], pull)
    return float(((metric @ change) * (change @ grams[1] - 2 * crosses[1])).sum())
