"""Sequential Temperature Scaling (arXiv:2607.05147, section 3.2.1): a confidence head made honest, token by token.

The head's logit z_k is of the probability that token k is accepted if those before it are. What a schedule needs is the
product up to k. Each position gets a temperature T_k, from left to right, that makes the product up to it, with the
temperatures found before, agree best with how often all tokens up to k were accepted.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
_GRID = np.geomspace(0.2, 5, 81)  # 1 in the middle
_BINS = 20


def fit_temperatures(confidence: Sequence[NDArray[np.floating]], accepted: Sequence[int], steps: int) -> list[float]:
    """A temperature for each of `steps` positions of a draft.

    confidence: of each round, the head's logits of the tokens that were verified [n <= steps].
    accepted: how many of them were.
    Positions that no round reached keep 1. Fit greedy decoding and drawing apart: they accept differently.
    """
    logits = np.full((len(confidence), steps), np.nan)
    for row, values in zip(logits, confidence, strict=True):
        row[: len(values)] = values
    survived = np.asarray(accepted)[:, None] > np.arange(steps)
    reached, temperatures = np.ones(len(logits)), []
    for step in range(steps):
        known = ~np.isnan(logits[:, step])
        best = _fit(logits[known, step], reached[known], survived[known, step]) if known.any() else 1.0
        reached = reached * _sigmoid(logits[:, step] / best)
        temperatures.append(best)
    return temperatures


def _fit(logits: Doubles, reached: Doubles, survived: NDArray[np.bool_]) -> float:
    errors = [calibration_error(reached * _sigmoid(logits / t), survived) for t in _GRID]
    # Of equals the one nearest to 1, which changes least.
    order = sorted(range(len(_GRID)), key=lambda i: (errors[i], abs(np.log(_GRID[i]))))
    return float(_GRID[order[0]])


def calibration_error(probabilities: Doubles, happened: NDArray[np.bool_]) -> float:
    """Expected calibration error (arXiv:1706.04599): |mean probability - share that happened| over 20 equal bins,
    weighted by how many are in each."""
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, probabilities - happened, _BINS)
    return float(np.abs(gaps).sum() / max(len(probabilities), 1))


def _sigmoid(x: Doubles) -> Doubles:
    return 0.5 * (1 + np.tanh(0.5 * x))
