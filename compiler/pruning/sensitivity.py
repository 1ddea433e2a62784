"""What an error in a sublayer's output costs: the Fisher information of the hidden states behind it.

For a small error e of the hidden states, KL(dense || changed) ~ E[(g.e)^2] / 2, where g is the gradient of the
log-likelihood of a token drawn from the model itself. The sweep is that of `compiler/sensitivity.py`: memory is one
block and the states between layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsopt.compiler.pruning.stream import Stream, Sublayer
from dsopt.compiler.sensitivity import Observed, sweep_back

_MASSIVE = 8  # times the median size: a massive activation
_SHRINK = 0.05  # part of the metric taken from its mean: it comes from few tokens and must not be blind anywhere


@dataclass(frozen=True)
class Sensitivity:
    """Of one sublayer: KL of a small error e in its output is about E[w e' M e] / 2 nats, w a token's weight.

    metric: M, float64 [hidden, hidden], the mean direction of gradients, g g' over |g|^2. Trace 1.
    first, massive, other: E[r^2 |g|^2] over the tokens of a kind, r the root mean square of the hidden state behind.
        The first token of a text and those with massive activations serve all others as attention sinks: a relative
        error there can cost a thousand times as much as elsewhere (the sinks of arXiv:2309.17453, 2402.17762).
    removal: E[(g.o)^2] / 2 in nats for the sublayer's whole output o; rough, that error is not small.
    """

    metric: Tensor
    first: float
    massive: float
    other: float
    removal: float

    def weigh(self, x: Tensor) -> Tensor:
        """The weights [n, s, 1] of tokens by the hidden states x [n, s, hidden] behind the sublayer."""
        first, massive = _kinds(x)
        costs = torch.where(massive, self.massive, self.other)
        costs[first] = self.first
        return costs[..., None] / token_sizes(x).square()


def _kinds(x: Tensor) -> tuple[Tensor, Tensor]:
    """Masks [n, s]: the first token of each window, tokens much larger than most."""
    first = torch.zeros(x.shape[:2], dtype=torch.bool)
    first[:, 0] = True
    sizes = token_sizes(x)[..., 0]
    return first, (sizes > _MASSIVE * sizes.median()) & ~first


def measure_sensitivity(stream: Stream, x: Tensor, seed: int = 0) -> tuple[dict[Sublayer, Sensitivity], Tensor]:
    """Run embedded windows x [n, s, hidden] forth and back. Returns the last hidden states too."""
    inputs = [x]
    for layer in range(stream.blocks.depth):
        inputs.append(stream.advance(Sublayer(layer, True), stream.advance(Sublayer(layer, False), inputs[-1])))
    found = {}

    def measure(layer: int, seen: dict[str, Observed]) -> None:
        before = inputs[layer]
        for sublayer in (Sublayer(layer, False), Sublayer(layer, True)):
            last = seen[sublayer.weight.removesuffix(".weight")]  # its outputs are what the sublayer adds
            after = before + last.y.reshape(x.shape)
            found[sublayer] = _measure(before, after, last.g.reshape(x.shape))
            before = after

    sweep_back(stream.blocks, inputs.__getitem__, measure, seed=seed)
    return found, inputs[-1]


def _measure(before: Tensor, after: Tensor, gradient: Tensor) -> Sensitivity:
    flat = gradient.flatten(0, 1)
    metric = (flat.T @ flat).double()
    metric /= metric.trace()
    width = len(metric)
    costs = (gradient * token_sizes(after)).square().sum(-1).double()
    first, massive = _kinds(after)
    other = float(costs[~first & ~massive].mean())
    return Sensitivity(
        metric.lerp(torch.eye(width, dtype=metric.dtype) / width, _SHRINK),
        first=float(costs[first].mean()),
        massive=float(costs[massive].mean()) if massive.any() else other,
        other=other,
        removal=float(((after - before) * gradient).sum(-1).square().mean()) / 2,
    )


def token_sizes(x: Tensor) -> Tensor:
    """Root mean square of each hidden state, [..., 1]."""
    return x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
