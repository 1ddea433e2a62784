"""Exact mode: the same bits with any drafter and none, whatever the runs' widths, the cache and the threads."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import Forced, curve

from dsopt.runtime import load
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.curve import VerifyCurve, measure_curve
from dsopt.runtime.drafters.choice import open_speculation
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.exact import check_exact, exact_cost, exact_widths
from dsopt.runtime.model import Model
from dsopt.runtime.speculate import Speculation

PROMPTS = ["A", "naïve", "a b c a b c a b", "the cat the cat the"]
RECIPES = ["none", "int8", "int4-zp"]


@pytest.fixture(scope="module", params=RECIPES)
def exact(request: pytest.FixtureRequest, compile_tiny: Callable[..., Path]) -> tuple[Model, tuple[int, ...]]:
    """A model and the widths of its runs, measured in a hurry."""
    model = load(compile_tiny(request.param))
    model.end = frozenset()
    return model, exact_widths(measure_curve(model.session, budget=0.1))


def bits(model: Model, prompt: str, speculation: Speculation, limit: int = 80) -> list[object]:
    """Tokens and the log-probabilities of the five best, floats as they are."""
    stream = model.stream(model.encode(prompt), limit=limit, top=5, speculation=speculation)
    return [(piece.step.token, piece.step.top) for piece in stream]


def test_exact_mode_is_the_same_bit_for_bit(exact: tuple[Model, tuple[int, ...]]) -> None:
    model, widths = exact
    for prompt in PROMPTS:
        expected = bits(model, prompt, Speculation(None, Forced(), widths))
        for seed in range(3):
            assert bits(model, prompt, Speculation(NgramDrafter(), Forced(seed), widths)) == expected


def test_every_width_that_agrees_gives_the_same_bits(exact: tuple[Model, tuple[int, ...]]) -> None:
    """Each as the only one, as if the curve had been measured on another day."""
    model, widths = exact
    assert len(widths) > 2
    texts = [bits(model, "a b c a b", Speculation(None, Forced(), (width,)), 40) for width in widths]
    assert all(text == texts[0] for text in texts)


def test_growth_of_the_cache_and_the_end_of_the_context_change_no_bit(
    exact: tuple[Model, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the context ends within a run, tokens before are computed again."""
    model, widths = exact
    expected = bits(model, "A", Speculation(None, Forced(), widths), 300)
    assert len(expected) == model.session.context - 1
    monkeypatch.setattr("dsopt.runtime.kv._FIRST", 8)
    for seed in range(2):
        assert bits(model, "A", Speculation(NgramDrafter(), Forced(seed, 15), widths), 300) == expected


ANSWER = """
import json, sys
from pathlib import Path
from dsopt.runtime import load
from dsopt.runtime.curve import VerifyCurve, measure_curve
from dsopt.runtime.scheduler import Scheduler
from dsopt.runtime.speculate import Speculation
model = load(Path(sys.argv[1]), threads=int(sys.argv[2]))
curve = VerifyCurve((1, 2), 0, (1.0, 1.0), 1, (1.0, 1.0), (2,))
stream = model.stream(model.encode("a b"), limit=30, top=5, speculation=Speculation(None, Scheduler(curve), (4,)))
print(json.dumps([(piece.step.token, piece.step.top) for piece in stream]))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_the_number_of_threads_changes_no_bit(compile_tiny: Callable[..., Path]) -> None:
    """Layers wide enough to be shared out among threads; a process has one pool."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
    artifact = compile_tiny("int8", **shape)
    command = [sys.executable, "-c", ANSWER, str(artifact)]
    running = [subprocess.Popen([*command, threads], stdout=subprocess.PIPE) for threads in ("1", "2")]
    first, second = (json.loads(process.communicate()[0]) for process in running)
    assert len(first) == 30
    assert first == second


@pytest.mark.parametrize("form", ["w8a8", "w8a8-token-rot", "w7a8", "w7a8-rot"])
def test_exactness_needs_rows_that_do_not_mix(form: str, compile_tiny: Callable[..., Path]) -> None:
    mixed = open_artifact(compile_tiny(form))
    with pytest.raises(DsoptError, match=r"--exact: .* has \d+ w8a8 or w7a8 layers"):
        check_exact(mixed)
    assert open_speculation(load(mixed.directory), "ngram").widths == ()


def test_an_embedding_does_not_mix_rows(compile_tiny: Callable[..., Path]) -> None:
    check_exact(open_artifact(compile_tiny("int8,embed=w8a8-rot")))
    with pytest.raises(DsoptError, match=r"has 1 w8a8 or w7a8 layers"):
        check_exact(open_artifact(compile_tiny("int8,head=w8a8-rot")))


def test_widths_that_agree_are_taken_else_the_best_single_one() -> None:
    seconds = (1.0, 1.03, 1.2, 1.4, 5.0, 9.0, 9.5, 9.9)
    agreed = VerifyCurve(tuple(range(1, 9)), 0, seconds, 1, seconds, (2, 3, 8))
    assert exact_widths(agreed) == (2, 3, 8)
    assert exact_cost(agreed, (2, 3, 8)) == pytest.approx(0.03)
    alone = VerifyCurve(tuple(range(1, 9)), 0, seconds, 1, seconds, (8,))
    assert exact_widths(alone) == (4,)
    assert exact_widths(curve(1.0, 1.5)) == (2,)


def test_exactness_is_the_default_where_it_costs_little(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_artifact)
    for second, wanted in ((1.04, (2, 3)), (1.2, ())):
        seconds = (1.0, second, 1.5)
        known = VerifyCurve((1, 2, 3), 0, seconds, 1, seconds, (2, 3))
        monkeypatch.setattr("dsopt.runtime.drafters.choice.verify_curve", lambda *_, known=known, **__: known)
        assert open_speculation(model, "ngram").widths == wanted
        assert open_speculation(model, "ngram", exact=True).widths == (2, 3)
        assert open_speculation(model, "ngram", exact=False).widths == ()
        assert open_speculation(model, "none") is None
