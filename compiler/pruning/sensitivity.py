"""What an error in a sublayer's output costs: the Fisher information of the hidden states behind it.

For a small error e of the hidden states, KL(dense || changed) ~ E[(g.e)^2] / 2, where g is the gradient of the
log-likelihood of a token drawn from the model itself. Gradients are carried back a block at a time over stored hidden
states: memory is one block and the states between layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsopt.compiler.pruning.stream import Stream, Sublayer, batches

_SHRINK = 0.05  # part of the metric taken from its mean: it comes from few tokens and must not be blind anywhere


@dataclass(frozen=True)
class Sensitivity:
    """Of one sublayer.

    metric: float64 [hidden, hidden], E[r^2 g g'] over tokens, r the root mean square of the hidden state behind: what
        an error counts that is told in units of the token's size. Norms make gradients small where states are large.
    removal: E[(g.o)^2] / 2 in nats for the sublayer's whole output o; rough, the error is not small.
    """

    metric: Tensor
    removal: float


def measure_sensitivity(stream: Stream, x: Tensor, seed: int = 0) -> tuple[dict[Sublayer, Sensitivity], Tensor]:
    """Run embedded windows x [n, s, hidden] forth and back. Returns the last hidden states too."""
    sublayers, states = stream.sublayers, [x]
    for sublayer in sublayers:
        states.append(stream.advance(sublayer, states[-1]))
    gradient = _from_head(stream, states[-1], torch.Generator().manual_seed(seed))
    found = {}
    for sublayer, before, after in zip(reversed(sublayers), states[-2::-1], states[:0:-1], strict=True):
        found[sublayer] = _measure(before, after, gradient)
        gradient = _carry_back(stream, sublayer, before, gradient)
    return found, states[-1]


def _from_head(stream: Stream, x: Tensor, generator: torch.Generator) -> Tensor:
    """d log p(y) / dx for a y drawn at each position."""
    head, parts = stream.head(), []
    for rows in x.flatten(0, 1).split(128):
        rows = rows.detach().requires_grad_()
        logs = head(rows).log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        parts.append(torch.autograd.grad(logs.gather(-1, drawn).sum(), rows)[0])
    return torch.cat(parts).reshape(x.shape)


def _carry_back(stream: Stream, sublayer: Sublayer, x: Tensor, gradient: Tensor) -> Tensor:
    parts = []
    for part, out in zip(batches(x), batches(gradient), strict=True):
        part = part.detach().requires_grad_()
        added = stream.run(sublayer, part)[1]
        parts.append(out + torch.autograd.grad(added, part, out)[0])
    return torch.cat(parts)


def _measure(before: Tensor, after: Tensor, gradient: Tensor) -> Sensitivity:
    scaled = (gradient * token_sizes(after)).flatten(0, 1)
    metric = (scaled.T @ scaled).double() / len(scaled)
    width = len(metric)
    mean = metric.trace() / width * torch.eye(width, dtype=metric.dtype)
    removal = float(((after - before) * gradient).sum(-1).square().mean()) / 2
    return Sensitivity(metric.lerp(mean, _SHRINK), removal)


def token_sizes(x: Tensor) -> Tensor:
    """Root mean square of each hidden state, [..., 1]."""
    return x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
