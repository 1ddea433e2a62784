"""Sequential Temperature Scaling (arXiv:2607.05147, section 3.2.1): a drafter's confidence made honest, token by token.

The logit z_k is of the probability that token k is accepted if those before it are. What a schedule needs is the
product up to k. Each position gets a temperature T_k, from left to right, that makes the product up to it, with the
temperatures found before, agree best with how often all tokens up to k were accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Logits = Sequence[NDArray[np.floating]]
LEAST = 30  # rounds that say something about a position
_GRID = np.geomspace(0.2, 5, 81)  # 1 in the middle
_BINS = 20


@dataclass(frozen=True)
class Position:
    """What was fitted for a position of the draft and what it is good for: errors of the probability that all tokens
    up to it are accepted, on rounds that the temperatures judged were not fitted on."""

    position: int
    rounds: int  # that verified a token there
    accepted: float | None  # the share of them that accepted all up to there; of what no round reached nothing is known
    temperature: float
    ece_before: float | None
    ece_after: float | None
    brier_before: float | None
    brier_after: float | None


def calibrate(confidence: Logits, accepted: Sequence[int], folds: Sequence[int], steps: int) -> list[Position]:
    """Fit on all rounds. `folds`: 0 or 1 for each round; each half is judged by the temperatures of the other half.

    Where those are no better than none, by the Brier score of all positions, the fit is 1: the calibration error of few
    rounds is mostly noise, and to fit it is to fit that.
    """
    logits, survived = _table(confidence, accepted, steps)
    half = np.asarray(folds)
    other = np.ones(logits.shape)
    for fold in (0, 1):
        fit = [index for index, of in enumerate(half) if of != fold]
        found = fit_temperatures([confidence[i] for i in fit], [accepted[i] for i in fit], steps, least=LEAST // 2)
        other[half == fold] = found
    before, after = _reached(logits, np.ones(steps)), _reached(logits, other)
    errors = [_errors(before, survived, step) + _errors(after, survived, step) for step in range(steps)]
    fitted = fit_temperatures(confidence, accepted, steps, least=LEAST)
    if sum(after or 0 for *_, after in errors) >= sum(before or 0 for _, before, *_ in errors):  # Brier scores
        fitted = [1.0] * steps
    return [
        Position(step, int(n), float(survived[seen, step].mean()) if n else None, fitted[step], e0, e1, b0, b1)
        for step, (e0, b0, e1, b1) in enumerate(errors)
        for seen in [~np.isnan(logits[:, step])]
        for n in [seen.sum()]
    ]


def fit_temperatures(confidence: Logits, accepted: Sequence[int], steps: int, least: int = 1) -> list[float]:
    """A temperature for each of `steps` positions of a draft.

    confidence: of each round, the logits of the tokens that were verified [n <= steps].
    accepted: how many of them were.
    Positions that fewer than `least` rounds reached keep 1. Fit greedy decoding and drawing apart: they accept
    differently.
    """
    logits, survived = _table(confidence, accepted, steps)
    reached, temperatures = np.ones(len(logits)), []
    for step in range(steps):
        known = ~np.isnan(logits[:, step])
        enough = known.sum() >= max(least, 1)
        best = _fit(logits[known, step], reached[known], survived[known, step]) if enough else 1.0
        reached = reached * _sigmoid(logits[:, step] / best)
        temperatures.append(best)
    return temperatures


def _table(confidence: Logits, accepted: Sequence[int], steps: int) -> tuple[Doubles, NDArray[np.bool_]]:
    """By round and position: the logits, nan where nothing was verified; whether all up to there were accepted."""
    logits = np.full((len(confidence), steps), np.nan)
    for row, values in zip(logits, confidence, strict=True):
        row[: len(values)] = values[:steps]
    return logits, np.asarray(accepted)[:, None] > np.arange(steps)


def _reached(logits: Doubles, temperatures: Doubles) -> Doubles:
    return np.cumprod(_sigmoid(logits / temperatures), 1, dtype=np.float64)


def _errors(reached: Doubles, survived: NDArray[np.bool_], step: int) -> tuple[float | None, float | None]:
    """Expected calibration error and Brier score of a position."""
    known = ~np.isnan(reached[:, step])
    if not known.any():
        return None, None
    probabilities, happened = reached[known, step], survived[known, step]
    return calibration_error(probabilities, happened), float(((probabilities - happened) ** 2).mean())


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
