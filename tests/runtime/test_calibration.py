"""Sequential Temperature Scaling on rounds whose true law is known."""

import numpy as np
import pytest

from dsopt.runtime.calibration import LEAST, calibrate, calibration_error, fit_temperatures

TRUE = np.array([2.5, 1.8, 1.0, 0.6])


def rounds(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a head that is over-confident by TRUE, and how many tokens were accepted."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(1.0, 1.2, (count, 4))
    right = rng.random((count, 4)) < 1 / (1 + np.exp(-honest))
    return honest * TRUE, np.where(right.all(1), 4, right.argmin(1))


def errors(logits: np.ndarray, accepted: np.ndarray, temperatures: np.ndarray) -> list[float]:
    reached = np.cumprod(1 / (1 + np.exp(-logits / temperatures)), 1)
    return [calibration_error(reached[:, k], accepted > k) for k in range(4)]


def test_known_temperatures_are_found() -> None:
    logits, accepted = rounds(40000)
    found = fit_temperatures(list(logits), accepted.tolist(), 4)
    np.testing.assert_allclose(found, TRUE, rtol=0.25)


def test_the_cumulative_error_falls_on_other_rounds() -> None:
    found = fit_temperatures(*(part.tolist() for part in rounds(20000)), 4)
    other = rounds(20000, seed=1)
    before, after = errors(*other, np.ones(4)), errors(*other, np.array(found))
    assert all(new < old for new, old in zip(after[:2], before[:2], strict=True))
    assert max(after) < 0.02 < before[0]


def test_what_was_not_verified_does_not_count() -> None:
    logits, accepted = rounds(5000)
    short = [row[:2] for row in logits]
    found = fit_temperatures(short, np.minimum(accepted, 2).tolist(), 4)
    assert found[:2] == fit_temperatures(list(logits), accepted.tolist(), 4)[:2]
    assert found[2:] == [1.0, 1.0]


def test_calibration_error_by_hand() -> None:
    assert calibration_error(np.array([0.9, 0.9, 0.1]), np.array([True, False, False])) == pytest.approx(
        (0.8 + 0.1) / 3
    )


def test_each_half_is_judged_by_the_other() -> None:
    logits, accepted = rounds(8000)
    found = calibrate(list(logits), accepted.tolist(), [i % 2 for i in range(8000)], 4)
    assert [p.temperature for p in found] == fit_temperatures(list(logits), accepted.tolist(), 4)
    assert [p.rounds for p in found] == [8000] * 4
    assert found[0].accepted == pytest.approx((accepted > 0).mean())
    assert all(p.ece_after < p.ece_before and p.brier_after < p.brier_before for p in found[:2])


def test_a_fit_that_does_not_help_the_other_half_is_none() -> None:
    """One half is over-confident, the other under-confident."""
    folds = np.arange(400) % 2
    logits = np.full((400, 1), 1.4)
    accepted = np.random.default_rng(0).random(400) < np.where(folds, 0.55, 0.99)
    found = calibrate(list(logits), accepted.astype(int).tolist(), folds.tolist(), 1)
    assert found[0].ece_after > found[0].ece_before
    assert found[0].temperature == 1


def test_few_rounds_at_a_position_say_nothing() -> None:
    logits, accepted = rounds(200)
    seen = [row[: 3 if index < LEAST - 1 else 2] for index, row in enumerate(logits)]
    found = calibrate(seen, np.minimum(accepted, [len(row) for row in seen]).tolist(), [i % 2 for i in range(200)], 4)
    assert [p.rounds for p in found] == [200, 200, LEAST - 1, 0]
    assert [p.temperature != 1 for p in found] == [True, True, False, False]
    assert (found[3].accepted, found[3].ece_before, found[3].brier_after) == (None, None, None)
