"""Rates of `bench --spec`: answers to one prompt are set side by side as far as all of them go."""

import pytest

from dsopt.runtime.model import Result
from dsopt.runtime.spec_measure import Answer, decode_rate, latency


def answer(stamps: list[float], counted: int) -> Answer:
    result = Result("length", None, False, 4, 0, len(stamps), 0.5, stamps[-1], 0)
    return Answer(tuple(range(len(stamps))), result, tuple(stamps), counted)


def test_tokens_beyond_the_shorter_answer_do_not_count() -> None:
    short, long = [0.0, 0.1, 0.2], [0.0, 0.1, 0.2, 1.2, 9.2]  # ever slower behind what both have
    assert decode_rate([answer(long, 3)]) == decode_rate([answer(short, 3)]) == pytest.approx(10)
    assert latency([answer(long, 3)]) == latency([answer(short, 3)]) == pytest.approx(0.7 / 3)
    assert decode_rate([answer(long, 5)]) == pytest.approx(4 / 9.2)


def test_a_long_answer_weighs_more() -> None:
    assert decode_rate([answer([0.0, 1.0], 2), answer([0.0, 0.1, 0.2, 0.3], 4)]) == pytest.approx(4 / 1.3)
    assert decode_rate([answer([0.0], 1)]) == 0
