"""Text that a model writes itself: what to calibrate on when the user has none (LLM-QAT, arXiv:2305.17888).

Each window starts with a token drawn at random and goes on by sampling, so that together they cover what the model
knows in the proportions in which it says it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.reference import Reference

Windows = Sequence[NDArray[np.int64]] | NDArray[np.int64]
"""Token ids, all windows of one length."""
Calibrate = Callable[[Checkpoint], Windows]

_BATCH = 64  # sequences written at a time: the weights are read once for all of them


def write_windows(
    reference: Reference,
    count: int,
    size: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[NDArray[np.int64]]:
    """`count` windows of `size` token ids; the same for the same model and seed. `progress` is told of tokens."""
    generator = torch.Generator().manual_seed(seed)
    windows: list[NDArray[np.int64]] = []
    while len(windows) < count:
        batch = min(_BATCH, count - len(windows))
        done = len(windows) * size
        rows = _write(reference, batch, size, generator, lambda n: progress(done + n, count * size))  # noqa: B023
        windows += list(rows)
    return windows


def _write(
    reference: Reference, batch: int, size: int, generator: torch.Generator, tick: Callable[[int], None]
) -> NDArray[np.int64]:
    model = reference.model
    ids = torch.randint(model.config.vocab_size, (batch, 1), generator=generator)
    written, past = [ids], None
    with torch.inference_mode():
        for position in range(1, size):
            logits, past = model(ids, past)
            ids = _draw(logits[:, -1], generator)
            written.append(ids)
            tick(batch * position)
    return torch.cat(written, 1).numpy()


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Tokens [b, 1] drawn from logits [b, vocab] by inverting the cumulated distribution: a number a row to draw, where
    torch.multinomial draws one a token of the vocabulary, which took a fifth of the writing."""
    cumulated = logits.softmax(-1).cumsum(-1)
    drawn = torch.rand((len(logits), 1), generator=generator) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, drawn, right=True).clamp_max(logits.shape[-1] - 1)
