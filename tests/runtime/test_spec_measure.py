"""What bench --spec counts where texts part."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy import Forced

from dsopt.runtime import load
from dsopt.runtime.decoder import prefill
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.model import Model
from dsopt.runtime.spec_measure import OVERALL, Task, compare
from dsopt.runtime.speculate import Speculation

WORDS = ["a b c a b c", "x y x y x y", "the cat the cat", "naive"]


def tasks(model: Model) -> list[Task]:
    model.end = frozenset()
    return [Task("c", tuple(model.encode(word))) for word in WORDS]


def test_margins_are_of_the_tokens_where_answers_part(compile_tiny: Callable[..., Path]) -> None:
    """Rows of w8a8 share a scale: guesses that are wrong change the logits of the others."""
    model = load(compile_tiny("w8a8"))
    category, overall = compare(model, tasks(model), Speculation(NgramDrafter(), Forced(1)), None, 100)
    assert (category.category, overall.category) == ("c", OVERALL)
    parted = [
        (task, plain.tokens, other.tokens)
        for task, plain, other in zip(tasks(model), category.plain, category.speculative, strict=True)
        if plain.tokens != other.tokens
    ]
    assert parted
    assert category.identical == pytest.approx(1 - len(parted) / len(WORDS))
    assert len(category.margins) == len(parted)
    assert overall.margins == category.margins
    for (task, plain, other), margin in zip(parted, category.margins, strict=True):
        index = next(i for i in range(100) if plain[i] != other[i])
        logits = prefill(model.session.bind(model.session.new_cache()), [*task.prompt, *plain[:index]])
        assert margin == pytest.approx(abs(logits[plain[index]] - logits[other[index]]))
        assert margin < np.ptp(logits) / 4  # a near tie


def test_the_same_answers_have_no_margins(tiny_artifact: Path) -> None:
    model = load(tiny_artifact)
    *_, overall = compare(model, tasks(model), Speculation(NgramDrafter(), Forced(1)), None, 40)
    assert (overall.identical, overall.margins) == (1, [])
