"""Repair without training: last weights refitted in order, each on what the pruned model before it really gives.

Two streams run side by side, dense and pruned. The last linear layer of a sublayer that loses features, or behind which
sublayers were removed, is fitted by least squares to the dense stream's hidden states before the next one that stays,
so that it takes over what is gone (as ReplaceMe, arXiv:2505.02819, merges a linear map into down_proj; here the whole
matrix is free). Layers that lose nothing are left alone: fitted to correct the errors before them they gained 0.1 % on
held-out text, on a model of 135 million weights. Tokens count by what an error there costs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsopt.compiler.pruning.obs import eliminate, eliminate_units, known_damp, refit
from dsopt.compiler.pruning.sensitivity import Sensitivity
from dsopt.compiler.pruning.stream import Stream, Sublayer
from dsopt.compiler.pruning.widths import group_sizes

_PULLS = (0.001, 0.01, 0.1, 1.0, 10.0)  # how strongly a fit is held back, of the median feature's energy
HELD_OUT = 8  # every eighth window only judges: nothing is fitted to it, here or in layers before


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
    """What a weighted least-squares fit needs: sums over the tokens fitted to, and the held-out tokens themselves.

    gram = E[w h h'] [F, F] and cross = E[w r h'] [D, F], float64; held_h [n, F] and held_r [n, D] times sqrt(w).
    """

    def __init__(self, features: int, hidden: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.cross = torch.zeros(hidden, features, dtype=torch.float64)
        self.tokens, self._held = 0, [(torch.empty(0, features), torch.empty(0, hidden))]

    def add(self, features: Tensor, residual: Tensor, weights: Tensor, held_out: bool) -> None:
        """features [b, s, F], the residual [b, s, D] that they should explain, `weights` [b, s, 1] of the tokens."""
        h, r = ((x * weights.sqrt()).flatten(0, 1) for x in (features, residual))
        if held_out:
            self._held.append((h, r))
            return
        before, self.tokens = self.tokens, self.tokens + len(h)
        self.gram.mul_(before / self.tokens).add_((h.T @ h).double() / self.tokens)
        self.cross.mul_(before / self.tokens).add_((r.T @ h).double() / self.tokens)

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        h, r = map(torch.cat, zip(*self._held, strict=True))
        return h, r


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
        if sublayer not in losses and end == start + 1:
            same = states.pruned is states.dense
            states.pruned = target if same else stream.advance(sublayer, states.pruned)
        else:
            fit, states.pruned = _fit(stream, sublayer, states, target, losses.get(sublayer), felt[sublayer])
            yield sublayer, fit
        states.dense = target


def _fit(
    stream: Stream,
    sublayer: Sublayer,
    states: Streams,
    target: Tensor,
    loss: Loss | None,
    felt: Sensitivity,
) -> tuple[Fit, Tensor]:
    weight, weights = stream.weight(sublayer), felt.weigh(target)
    statistics = Statistics(weight.shape[1], weight.shape[0])
    features: list[Tensor] = []
    for number, (x, wanted, weighed) in enumerate(zip(*map(_windows, (states.pruned, target, weights)), strict=True)):
        h, out = stream.run(sublayer, x)
        statistics.add(h, wanted - x - out, weighed, number % HELD_OUT == HELD_OUT - 1)
        features.append(h)
    gone, cost = _choose(statistics, weight, felt.metric, loss)
    fitted, kept = solve(statistics, weight, felt.metric, gone)
    new = [h[..., kept] @ fitted.T for h in features]
    return Fit(kept if len(gone) else None, fitted, cost), states.pruned + torch.cat(new)


def _windows(x: Tensor) -> Iterator[Tensor]:
    return iter(x.split(1))


def _choose(statistics: Statistics, weight: Tensor, metric: Tensor, loss: Loss | None) -> tuple[Tensor, float]:
    """(features to remove, what that costs in nats)."""
    if loss is None or not loss.count:
        return torch.empty(0, dtype=torch.int64), 0.0
    gram, damp = statistics.gram, known_damp(weight.shape[1], statistics.tokens)
    if loss.unit > 1:
        gone, cost = eliminate_units(gram, weight, metric, loss.unit, loss.count // loss.unit, damp)
        return gone, cost / 2
    parts, costs, found = [], 0.0, 0
    for channels, cost in eliminate(gram, weight, metric, group_sizes(len(gram)), damp):
        if found >= loss.count:
            break
        parts.append(channels)
        costs += cost / 2
        found += len(channels)
    return torch.cat(parts).sort().values, costs


def solve(statistics: Statistics, weight: Tensor, metric: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """(weight float32 [D, kept], kept): without the features `gone`, refitted to the residual.

    Two fits, each held back as much as held-out tokens say, or not made: what goes by what is left, which is well
    determined, then the residual, which is noisy. A fit that follows its own text too closely would let the streams
    agree there and nowhere else, and mislead every layer behind.
    """
    stay = torch.ones(weight.shape[1], dtype=torch.bool)
    stay[gone] = False
    kept = stay.nonzero().flatten()
    gram = statistics.gram[kept][:, kept]
    h, residual = statistics.held
    root = torch.linalg.cholesky(metric).float()
    new = weight[:, kept].clone()
    for cross, wanted in (
        (weight[:, gone].double() @ statistics.gram[gone][:, kept], h[:, gone] @ weight[:, gone].T),
        (statistics.cross[:, kept], residual),
    ):
        if cross.count_nonzero():
            new += _best_fit(gram, cross, h[:, kept], wanted, root)
    return new, kept


def _best_fit(gram: Tensor, cross: Tensor, h: Tensor, wanted: Tensor, root: Tensor) -> Tensor:
    """The fit [D, kept] of `wanted` [n, D] by h [n, kept] that errs least on these; root is that of the metric."""
    fits = [torch.zeros(cross.shape), *(refit(gram, cross, pull).float() for pull in _PULLS)]
    if not len(h):  # too little text to judge by
        return fits[-1]
    return min(fits, key=lambda fit: float(((wanted - h @ fit.T) @ root).square().sum()))
