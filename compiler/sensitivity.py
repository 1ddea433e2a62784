"""What an error in one linear layer's output costs at the model's end: KL divergence by the Fisher information.

For a small change d of the outputs y of a layer, KL(p || p') ~ 1/2 d^T F d, where F = E[g g^T] over tokens drawn
from the model's *own* predictions, g = d log p(drawn) / d y. So one backward sweep, a block in memory at a time,
prices every node, and a trial of a node costs one matrix product: 1/2 mean over tokens of (g . d)^2. Errors of
different tokens and of different nodes are taken to be independent, their costs add up.

The first token of a window is apart. All others attend to it (arXiv:2309.17453), so an error in its keys and values
is felt by each of them: on SmolLM2 half of what q, k and v in `w7a8` cost. Windows give few samples of it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsopt.compiler.stream import BlockStream, observed

_WORST = 0.01  # share of tokens
_SLIGHT = 0.05  # first tokens of SmolLM2 at q, k, v: 0.03 to 8.6 by layer, elsewhere under 0.04

Trial = Callable[[int, dict[str, "Observed"]], None]
"""A layer and its linears by module name, in the order of computation."""
Progress = Callable[[int, int], None]


class Observed:
    """One linear layer on the sweep's tokens, which are so many `windows` of equal length, one after the other: inputs
    x [T, K], weight w [N, K], outputs y and gradients g [T, N]."""

    def __init__(self, x: Tensor, w: Tensor, y: Tensor, g: Tensor, windows: int = 1) -> None:
        self.x, self.w, self.y, self.g, self.windows = x, w, y, g, windows


def divergence(seen: Sequence[Observed], outputs: Sequence[Tensor]) -> float:
    """KL divergence in nats a token, if linear layers that read one input gave `outputs` [T, N] instead of their y.

    What rounds the input errs in all of them together, so what their errors do is summed before it is squared. First
    tokens are much alike: each window's error is tried with each window's gradient, which makes more samples of them.
    Of the others one among the worst counts as the best of these: a quadratic form has no bound, the divergence has.
    """
    windows = seen[0].windows
    errors = [(out - one.y).unflatten(0, (windows, -1)) for one, out in zip(seen, outputs, strict=True)]
    gradients = [one.g.unflatten(0, (windows, -1)) for one in seen]
    felt = torch.stack([(g * d).sum(2) for g, d in zip(gradients, errors, strict=True)]).sum(0)
    first = torch.stack([g[:, 0] @ d[:, 0].T for g, d in zip(gradients, errors, strict=True)]).sum(0)
    squares = felt[:, 1:].square().flatten()
    if len(squares):
        squares = squares.clamp_max(squares.quantile(1 - _WORST))
    return 0.5 * float(squares.sum() + windows * first.square().mean()) / felt.numel()


def sink_weight(seen: Sequence[Observed]) -> float:
    """What E[x x^T] over first tokens is worth beside that over all, for layers that read one input: how much more an
    error of theirs is felt than another's, divided by the tokens of a window.

    At most as much, for few windows tell; 0 where it is slight, as behind an MLP: inputs there are so large in first
    tokens that GPTQ would look at nothing else, and they are not what errors are felt by.
    """
    felt = torch.stack([one.g.square().sum(1) for one in seen]).sum(0).unflatten(0, (seen[0].windows, -1))
    if felt.shape[1] == 1:
        return 0.0
    more = float(felt[:, 0].mean() / felt[:, 1:].mean().clamp_min(torch.finfo(felt.dtype).tiny)) - 1
    weight = more / felt.shape[1]
    return min(weight, 1.0) if math.isfinite(weight) and weight >= _SLIGHT else 0.0


def sweep_back(
    stream: BlockStream,
    hidden: Callable[[int], Tensor],
    trial: Trial,
    *,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Call `trial` for each layer from the last to the first, with what its linear layers saw and are worth.

    `hidden` gives the input of a block by its layer, and of the final norm: float32 [windows, tokens, width].
    Returns the gradients at the embeddings, of the same shape.
    """
    gradient = _head_gradient(stream, hidden(stream.depth), seed)
    for layer in reversed(range(stream.depth)):
        progress(stream.depth - 1 - layer, stream.depth)
        x = hidden(layer).detach().requires_grad_()
        block = stream.block(layer)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(module: str, x: Tensor, y: Tensor, seen: dict[str, tuple[Tensor, Tensor]] = seen) -> None:
            y.retain_grad()
            seen[module] = (x.detach(), y)

        with observed(block, f"model.layers.{layer}.", keep):
            block(x, *stream.state(layer, *x.shape[:2]))[0].backward(gradient)
        assert x.grad is not None
        gradient = x.grad
        weights = {f"model.layers.{layer}.{name}": module.weight for name, module in _linears(block)}
        trial(layer, {m: _observed(x, weights[m], y) for m, (x, y) in seen.items()})
    progress(stream.depth, stream.depth)
    return gradient


def _observed(x: Tensor, weight: Tensor, y: Tensor) -> Observed:
    assert y.grad is not None
    return Observed(x.flatten(0, -2), weight, y.detach().flatten(0, -2), y.grad.flatten(0, -2), len(y))


def _linears(block: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, module) for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]


def _head_gradient(stream: BlockStream, hidden: Tensor, seed: int) -> Tensor:
    """Of the sum of log p(t) over tokens t drawn from the predictions, with respect to the last block's output."""
    head, generator = stream.head(), torch.Generator().manual_seed(seed)
    gradients = []
    for window in hidden:  # a window's logits at a time
        x = window.clone().requires_grad_()
        log_p = head(x).log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    return torch.stack(gradients)
