"""The statistics against formulas written out for small distributions, and which positions are scored."""

from pathlib import Path

import numpy as np
import pytest

from dsopt.runtime import quality
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.quality import Comparison, compare_models, cut_windows, session_scorer
from dsopt.runtime.session import Session

LN2 = np.log(2)


def logits(*rows: list[float]) -> np.ndarray:
    """Probabilities as float32 logits, each row moved by another constant."""
    with np.errstate(divide="ignore"):
        return (np.log(np.array(rows)) + np.arange(1, len(rows) + 1)[:, None]).astype(np.float32)


def compare(base: np.ndarray, new: np.ndarray, targets: list[int]) -> Comparison:
    comparison = Comparison()
    comparison.add(base, new, np.array(targets))
    return comparison


def test_two_rows_by_hand() -> None:
    base, new = logits([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]), logits([0.25, 0.5, 0.25], [0.125, 0.75, 0.125])
    result = compare(base, new, [0, 1])
    # 0.5 ln 2 - 0.25 ln 2, and 0.5 ln 2 + 0.5 ln (2 / 3)
    kld = [0.25 * LN2, 0.5 * LN2 + 0.5 * np.log(2 / 3)]
    np.testing.assert_allclose(result["kld"], kld, rtol=1e-6)
    np.testing.assert_allclose(result["dp"], [-0.25, 0.25], rtol=1e-6)
    assert result["same_top"].tolist() == [False, True]
    summary = result.summary()
    expected = {
        "tokens": 2,
        "ppl_base": 2.0,
        "ppl_base_err": 0.0,
        "ppl_new": (4 * 4 / 3) ** 0.5,
        "ln_ppl_ratio": 0.5 * np.log(4 / 3),
        "ppl_ratio": (4 / 3) ** 0.5,
        "kld_mean": sum(kld) / 2,
        "kld_mean_err": abs(kld[0] - kld[1]) / 2,  # standard deviation |a - b| / sqrt 2, over sqrt 2
        "kld_median": sum(kld) / 2,
        "kld_max": max(kld),
        "kld_min": min(kld),
        "kld_p90": 0.9 * max(kld) + 0.1 * min(kld),
        "dp_mean": 0.0,
        "dp_mean_err": 25.0,
        "dp_rms": 25.0,
        "dp_rms_err": 0.0,
        "same_top_p": 50.0,
        "same_top_p_err": 50.0,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_error_of_a_ratio_is_that_of_the_paired_differences() -> None:
    new = np.array([[0.5, 0.5], [0.8, 0.2], [0.1, 0.9], [0.6, 0.4]])
    base = np.array([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.6, 0.4]])
    summary = compare(logits(*base), logits(*new), [0, 0, 1, 1]).summary()
    a, b = -np.log([0.6, 0.7, 0.8, 0.4]), -np.log([0.5, 0.8, 0.9, 0.4])
    covariance = np.cov(a, b) / 4  # of the two means
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert summary["ln_ppl_ratio_err"] == pytest.approx(variance**0.5, rel=1e-5)
    slopes = np.array([-np.exp(a.mean()), np.exp(b.mean())])
    assert summary["ppl_diff_err"] == pytest.approx((slopes @ covariance @ slopes) ** 0.5, rel=1e-5)
    assert summary["ppl_correlation"] == pytest.approx(100 * np.corrcoef(a, b)[0, 1], rel=1e-5)


def test_the_same_logits_lose_exactly_nothing() -> None:
    rows = np.random.default_rng(0).normal(0, 8, (40, 99)).astype(np.float32)
    summary = compare(rows, rows.copy(), [3] * 40).summary()
    still = {name: value for name, value in summary.items() if name.startswith(("kld_", "dp_", "ln_ppl", "ppl_diff"))}
    assert set(still.values()) == {0.0}
    assert (summary["ppl_ratio"], summary["ppl_correlation"]) == (1.0, pytest.approx(100))
    assert (summary["same_top_p"], summary["same_top_p_err"]) == (100.0, 0.0)


def test_certainty_against_ignorance_is_the_logarithm_of_the_vocabulary() -> None:
    sure = np.full((2, 64), -1000, np.float32)
    sure[:, 5] = 1000
    result = compare(sure, np.zeros((2, 64), np.float32), [5, 5])
    assert result["kld"].tolist() == pytest.approx([np.log(64)] * 2, rel=1e-12)
    assert result["nll_base"].tolist() == [0.0, 0.0]
    assert compare(np.zeros((1, 64), np.float32), sure[:1], [5])["kld"][0] == pytest.approx(2000 * 63 / 64 - np.log(64))


def test_a_token_that_both_exclude_does_not_count() -> None:
    result = compare(logits([0.5, 0.5, 0.0]), logits([0.25, 0.75, 0.0]), [0])
    assert result["kld"][0] == pytest.approx(0.5 * LN2 + 0.5 * np.log(2 / 3), rel=1e-6)


def test_a_tiny_loss_is_not_lost_in_rounding() -> None:
    base = np.random.default_rng(1).normal(0, 3, (4, 50_000)).astype(np.float32)
    new = base + np.float32(1e-5) * np.sign(np.random.default_rng(2).normal(size=base.shape)).astype(np.float32)
    p = np.exp(base.astype(np.longdouble))
    p /= p.sum(-1, keepdims=True)
    moved = new.astype(np.longdouble) - base
    variance = (p * moved**2).sum(-1) - (p * moved).sum(-1) ** 2  # KL is half of it, to third order
    np.testing.assert_allclose(compare(base, new, [0] * 4)["kld"], (variance / 2).astype(float), rtol=1e-3)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    base, new = rng.normal(size=(2, 30, 17)).astype(np.float32)
    targets = rng.integers(17, size=30)
    whole = compare(base, new, targets.tolist()).summary()
    monkeypatch.setattr(quality, "_BLOCK", 17 * 4)
    parts = Comparison()
    for rows in (slice(0, 11), slice(11, 30)):
        parts.add(base[rows], new[rows], targets[rows])
    assert parts.tokens == 30
    assert parts.summary() == pytest.approx(whole, rel=1e-12)


def test_what_cannot_be_compared_is_said() -> None:
    zeros = np.zeros((1, 4), np.float32)
    with pytest.raises(DsoptError, match="the vocabularies differ: 4 tokens against 5"):
        compare(zeros, np.zeros((1, 5), np.float32), [0])
    for bad in (np.nan, np.inf):
        with pytest.raises(DsoptError, match="the new model gives logits that are not finite"):
            compare(zeros, np.full((1, 4), bad, np.float32), [0])


def test_windows_follow_each_other() -> None:
    assert [w.tolist() for w in cut_windows(range(10), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [w.tolist() for w in cut_windows(range(10), 4, 1)] == [[0, 1, 2, 3]]
    assert cut_windows(range(3), 4) == []


@pytest.mark.parametrize("size", [8, 9])
def test_the_second_half_is_scored_from_the_row_before_it(size: int) -> None:
    ids = np.random.default_rng(4).permutation(16)[:size]

    def oracle(window: np.ndarray, rows: int) -> np.ndarray:
        """Certain of the next token of every row; the last row knows nothing."""
        found = np.zeros((len(window), 16), np.float32)
        found[np.arange(len(window) - 1), window[1:]] = 100
        return found[-rows:]

    windows_told: list[None] = []
    result = compare_models(
        oracle,
        lambda window, rows: np.zeros((rows, 16), np.float32),
        [ids, ids],
        lambda: windows_told.append(None),
    )
    assert result.tokens == 2 * (size - size // 2)
    assert result["nll_base"].max() < 1e-9
    np.testing.assert_allclose(result["nll_new"], np.log(16))
    assert len(windows_told) == 2


def test_a_window_longer_than_a_chunk_is_scored_whole(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(open_artifact(tiny_artifact))
    ids = np.random.default_rng(5).integers(session.vocab_size, size=50)
    whole = session.bind(session.new_cache()).run(ids, 50).copy()
    monkeypatch.setattr(quality, "PREFILL_CHUNK", 7)
    score = session_scorer(session)
    for rows in (1, 7, 26, 50):
        np.testing.assert_allclose(score(ids, rows), whole[-rows:], atol=2e-5)
