"""What an error in one linear layer's output costs at the model's end: KL divergence by the Fisher information.

For a small change d of the outputs y of a layer, KL(p || p') ~ 1/2 d^T F d, where F = E[g g^T] over tokens drawn
from the model's *own* predictions, g = d log p(drawn) / d y. So one backward sweep, a block in memory at a time,
prices every node, and a trial of a node costs one matrix product: 1/2 mean over tokens of (g . d)^2. Errors of
different nodes are taken to be independent, their costs add up.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsopt.compiler.stream import BlockStream, observed

_WORST = 0.01  # share of tokens

Trial = Callable[[int, dict[str, "Observed"]], None]
"""A layer and its linears by module name, in the order of computation."""
Progress = Callable[[int, int], None]


class Observed:
    """One linear layer on the sweep's tokens: inputs x [T, K], weight w [N, K], outputs y and gradients g [T, N]."""

    def __init__(self, x: Tensor, w: Tensor, y: Tensor, g: Tensor) -> None:
        self.x, self.w, self.y, self.g = x, w, y, g

    def cost(self, outputs: Tensor) -> float:
        """KL divergence in nats a token, if the layer gave `outputs` [T, N] instead of y.

        A quadratic form has no bound, the divergence has: a token among the worst counts as the best of them. Without
        that, the few tokens on which all others look decide everything, and one draw decides about them.
        """
        squares = (self.g * (outputs - self.y)).sum(1).square()
        return 0.5 * float(squares.clamp_max(squares.quantile(1 - _WORST)).mean())


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
    return Observed(x.flatten(0, -2), weight, y.detach().flatten(0, -2), y.grad.flatten(0, -2))


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
