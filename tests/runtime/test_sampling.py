"""Sampling: empirical frequencies against the known distribution, and the properties users rely on."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.sampling import Sampler, Sampling, logprob, logprobs

PROBABILITIES = np.array([0.02, 0.30, 0.08, 0.40, 0.15, 0.05])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + np.float32(3)
# 0.999 quantiles of chi-square by degrees of freedom.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 5: 20.52}


def normalised(weights: list[float]) -> np.ndarray:
    return np.array(weights) / sum(weights)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Sampling(temperature=1.0), [0.02, 0.30, 0.08, 0.40, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.0004, 0.09, 0.0064, 0.16, 0.0225, 0.0025]),
        (Sampling(temperature=1.0, top_k=3), [0, 0.30, 0, 0.40, 0.15, 0]),
        (Sampling(temperature=1.0, top_p=0.69), [0, 0.30, 0, 0.40, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.71), [0, 0.30, 0, 0.40, 0.15, 0]),
        # 0.3 and 0.4 of 0.85 are 0.82: after top-k the two are enough for 0.8, before it they are not.
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), [0, 0.30, 0, 0.40, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.19), [0, 0.30, 0.08, 0.40, 0.15, 0]),
        # After a temperature of 2 the ratios are square roots: 0.05 / 0.40 becomes 0.35.
        (Sampling(temperature=2.0, min_p=0.34), [0, 0.548, 0.283, 0.632, 0.387, 0.224]),
    ],
)
def test_frequencies_match_the_distribution(options: Sampling, expected: list[float]) -> None:
    wanted = normalised(expected)
    sampler = Sampler(replace(options, seed=11))
    draws = 4000
    counts = np.bincount([sampler(LOGITS, []) for _ in range(draws)], minlength=6)
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - draws * wanted)[possible] ** 2 / (draws * wanted[possible])).sum()
    assert statistic < CHI_SQUARE.get(possible.sum() - 1, 18.47)  # 18.47: 4 degrees
    tokens, probabilities = sampler.distribution(LOGITS, [])
    np.testing.assert_allclose(np.bincount(tokens, probabilities, minlength=6), wanted, atol=5e-4)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = np.array([2.0, -1.0, 0.5, 0.0], np.float32)
    sampler = Sampler(Sampling(temperature=1.0, repeat_penalty=2.0, repeat_last_n=4))
    tokens, probabilities = sampler.distribution(logits, [2, 0, 0, 1, 1])  # the 2 is too long ago
    penalised = np.exp([1.0, -2.0, 0.5, 0.0])
    np.testing.assert_allclose(probabilities[np.argsort(tokens)], penalised / penalised.sum(), rtol=1e-6)


@pytest.mark.parametrize(("last", "token"), [(0, 0), (1, 0), (2, 1), (-1, 1)])
def test_repeat_last_n_bounds_what_is_penalised(last: int, token: int) -> None:
    logits = np.array([2.0, 1.5, 0.0], np.float32)
    assert Sampler(Sampling(repeat_penalty=2.0, repeat_last_n=last))(logits, [0, 2]) == token


def test_logits_are_left_as_they_are() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    before = logits.copy()
    everything = Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, repeat_penalty=1.3, seed=1)
    Sampler(everything)(logits, [1, 2, 3])
    Sampler(Sampling(repeat_penalty=1.3))(logits, [1, 2, 3])
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-300}])
def test_the_narrowest_setting_is_greedy(options: dict[str, float]) -> None:
    random = np.random.default_rng(3)
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0} | options))
    for _ in range(20):
        logits = random.normal(size=3000).astype(np.float32)
        assert sampler(logits, []) == Sampler(Sampling())(logits, []) == logits.argmax()


def test_ties_go_to_the_first_token() -> None:
    logits = np.array([0, 5, 5, 1, 5], np.float32)
    assert Sampler(Sampling())(logits, []) == 1
    assert {Sampler(Sampling(temperature=1, top_k=1, seed=s))(logits, []) for s in range(9)} == {1}
    assert {Sampler(Sampling(temperature=1, top_k=2, seed=s))(logits, []) for s in range(30)} == {1, 2}
    assert [token for token, _ in logprobs(logits, 4)] == [1, 2, 4, 3]


def test_nucleus_of_a_large_flat_vocabulary() -> None:
    logits = np.linspace(0, 1, 20000, dtype=np.float32)[np.random.default_rng(5).permutation(20000)]
    tokens, _ = Sampler(Sampling(temperature=1.0, top_p=0.9)).distribution(logits, [])
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    mass = probabilities[tokens].sum()
    assert mass >= 0.9 > mass - probabilities[tokens].min()
    assert probabilities[tokens].min() >= np.delete(probabilities, tokens).max()


def test_a_seed_repeats_and_a_state_continues() -> None:
    options = Sampling(temperature=1.0, seed=42)
    first, second = Sampler(options), Sampler(options)
    assert [first(LOGITS, []) for _ in range(50)] == [second(LOGITS, []) for _ in range(50)]
    other = Sampler(Sampling(temperature=1.0, seed=7))
    other.restore(json.loads(json.dumps(first.state())))
    assert other.seed == 42
    assert [other(LOGITS, []) for _ in range(50)] == [first(LOGITS, []) for _ in range(50)]


def test_without_a_seed_one_is_drawn_and_told() -> None:
    sampler = Sampler(Sampling(temperature=1.0))
    again = Sampler(Sampling(temperature=1.0, seed=sampler.seed))
    assert [sampler(LOGITS, []) for _ in range(20)] == [again(LOGITS, []) for _ in range(20)]
    assert len({Sampler(Sampling()).seed for _ in range(4)}) > 1


def test_a_damaged_state_is_refused() -> None:
    with pytest.raises(DsoptError, match="damaged"):
        Sampler(Sampling()).restore({"seed": 1, "generator": {"bit_generator": "MT19937"}})


def test_forbidden_tokens_never_come() -> None:
    logits = np.full(8, -np.inf, np.float32)
    logits[[3, 5]] = 0.0
    for options in ({}, {"top_k": 6}, {"top_p": 0.999}, {"min_p": 0.1}):
        sampler = Sampler(Sampling(temperature=1.0, seed=0, **options))
        assert {sampler(logits, []) for _ in range(50)} == {3, 5}
    assert logprobs(logits, 3)[2] == (0, -math.inf)


@pytest.mark.parametrize("broken", [[1.0, np.nan, 2.0], [np.inf, 0, 0], [-np.inf, -np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(broken: list[float], temperature: float) -> None:
    logits = np.array(broken, np.float32)
    with pytest.raises(DsoptError, match="broken"):
        Sampler(Sampling(temperature=temperature))(logits, [])
    with pytest.raises(DsoptError, match="broken"):
        logprobs(logits, 1)


def test_logprobs_are_of_the_raw_distribution() -> None:
    top = logprobs(LOGITS, 3)
    assert [token for token, _ in top] == [3, 1, 4]
    np.testing.assert_allclose([value for _, value in top], np.log([0.40, 0.30, 0.15]), atol=1e-6)
    assert logprob(LOGITS, 0) == pytest.approx(math.log(0.02), abs=1e-6)
    assert len(logprobs(LOGITS, 99)) == 6
    assert logprobs(LOGITS, 0) == []


def test_logprobs_sum_in_float64() -> None:
    logits = np.zeros(1 << 18, np.float32)
    logits[0] = 10
    exact = 10 - math.log(math.exp(10) + (1 << 18) - 1)
    assert logprob(logits, 0) == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("temperature", -0.1, "--temp"),
        ("temperature", math.nan, "--temp"),
        ("temperature", math.inf, "--temp"),
        ("top_k", -1, "--top-k"),
        ("top_p", 0.0, "--top-p"),
        ("top_p", 1.5, "--top-p"),
        ("min_p", -0.5, "--min-p"),
        ("min_p", math.nan, "--min-p"),
        ("repeat_penalty", 0.0, "--repeat-penalty"),
        ("repeat_last_n", -2, "--repeat-last-n"),
        ("seed", -1, "--seed"),
    ],
)
def test_wrong_options_are_named(option: str, value: float, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} is {value}; it must be "):
        Sampling(**{option: value})
