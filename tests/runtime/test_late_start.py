"""A drafter that begins late, on real graphs: the bits of exact mode, and a drafter that knows where it stands."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy import curve

from dsopt.runtime import session as sessions
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.costs import MOST
from dsopt.runtime.curve import verify_curve
from dsopt.runtime.drafters import Draft, Drafter
from dsopt.runtime.drafters.chain import ChainDrafter
from dsopt.runtime.drafters.choice import open_drafter
from dsopt.runtime.drafters.curve import DraftCurve
from dsopt.runtime.drafters.eagle3 import Eagle3Drafter
from dsopt.runtime.drafters.experience import Experience
from dsopt.runtime.drafters.model import ModelDrafter
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.exact import exact_widths
from dsopt.runtime.model import Model
from dsopt.runtime.sampling import Sampling
from dsopt.runtime.scheduler import Reader, Scheduler
from dsopt.runtime.speculate import Speculation

PROMPT = np.random.default_rng(4).integers(0, 320, 60).tolist()
LIMIT = 190
RUNS = [1 + 0.02 * width for width in range(MOST + 1)]
MEASURED = DraftCurve((1, 4), (0.1, 0.4), (16, 128), (0.5, 2.0))


class Clocked:
    """A real drafter that takes what was measured, with some of the answer put into each draft but every third: it is
    untrained, and never right."""

    def __init__(self, drafter: Any, text: Sequence[int], clock: SimpleNamespace) -> None:
        self.drafter, self.text, self.clock, self.taps = drafter, text, clock, drafter.taps
        self.begin()

    def begin(self) -> None:
        self.drafter.begin()
        self.seen = self.left_out = self.drafts = 0

    def accept(self, tokens: Sequence[int], hidden: np.ndarray | None) -> None:
        assert list(tokens) == self.text[self.seen : self.seen + len(tokens)]
        self.seen += len(tokens)
        if self.taps and hidden is None:
            self.left_out = self.seen
        self.drafter.accept(tokens, hidden)

    @property
    def unread(self) -> int:
        return int(self.drafter.unread)

    @property
    def silent(self) -> bool:
        return bool(self.drafter.silent)

    def read(self, count: int) -> None:
        self.clock.now += MEASURED.reading(count)
        self.drafter.read(count)

    def leave_out(self, count: int) -> None:
        last = int(isinstance(self.drafter, Eagle3Drafter))  # waits for the token behind it, not counted as unread
        self.left_out = self.seen - self.drafter.unread - last + count
        self.drafter.leave_out(count)

    def draft(self, anchor: int, limit: int) -> Draft:
        assert anchor == self.text[self.seen]
        self.clock.now += 0.1 * limit
        made, self.drafts = self.drafter.draft(anchor, limit), self.drafts + 1
        if not self.drafts % 3:
            return Draft(made.tokens[:limit], made.survival[:limit])
        known = self.text[self.seen + 1 :][: 1 + self.drafts % 3]
        return Draft((*known, *made.tokens[len(known) :])[:limit])


def opened(kind: str, compile_pair: Callable[..., Any]) -> tuple[Model, Any]:
    pair = compile_pair("vanilla" if kind == "model" else kind)
    model = Model(open_artifact(pair.artifact), threads=1)
    model.end = frozenset()
    if kind == "model":
        return model, ModelDrafter(model, model.session.vocab_size, Sampling())
    return model, open_drafter(str(next(pair.artifact.glob("draft-*"))), model, Sampling())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Only runs of the target and the drafter move it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dsopt.runtime.speculate.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def timed(model: Model, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = model.session.bind

    def bound(*arguments: Any) -> sessions.Binding:
        binding = bind(*arguments)
        run = binding.run

        def advancing(ids: np.ndarray, *rest: Any) -> np.ndarray:
            clock.now += curve(*RUNS).seconds(len(ids), 0)
            return run(ids, *rest)

        binding.run = advancing  # type: ignore[assignment]
        return binding

    monkeypatch.setattr(model.session, "bind", bound)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", ["vanilla", "eagle3", "model"])
def test_in_exact_mode_a_late_start_changes_no_bit(
    kind: str,
    beside: bool,
    compile_pair: Callable[..., Any],
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, drafter = opened(kind, compile_pair)
    widths = exact_widths(verify_curve(model.session))
    assert widths[0] > 1
    alone = Speculation(None, Scheduler(curve(*RUNS), widths), widths)
    plain = [piece.step for piece in model.stream(PROMPT, limit=LIMIT, top=3, speculation=alone)]
    text = [*PROMPT, *(step.token for step in plain)]
    greedy = [piece.step.token for piece in model.stream(PROMPT, limit=LIMIT)]
    assert text == [*PROMPT, *greedy]  # float32: no near tie decides

    timed(model, clock, monkeypatch)
    helped = Clocked(drafter, text, clock)
    whole: Drafter = ChainDrafter([NgramDrafter(), helped]) if beside else helped
    schedule = Scheduler(curve(*RUNS), widths, Reader(MEASURED, Experience(), beside))
    speculation = Speculation(whole, schedule, widths)
    stream = model.stream(PROMPT, limit=LIMIT, top=3, speculation=speculation)
    steps = [piece.step for piece in stream]
    assert [(s.token, s.logprob, s.top) for s in steps] == [(s.token, s.logprob, s.top) for s in plain]
    tally = stream.result.speculation.tally  # type: ignore[union-attr]
    assert tally.starts == 1
    assert tally.start_tokens > 30
    assert 32 <= tally.read_tokens < len(PROMPT)
    assert tally.accepted > 10
    assert helped.left_out > 0
    assert_as_fresh(model, kind, helped, compile_pair)


def assert_as_fresh(model: Model, kind: str, helped: Clocked, compile_pair: Callable[..., Any]) -> None:
    """It drafts what one does that was given nothing else than what this one read."""
    fresh, start = opened(kind, compile_pair)[1], helped.left_out
    tokens, anchor = helped.text[start : helped.seen], helped.text[helped.seen]
    if kind == "model":
        tokens = [*helped.text[:4], *tokens]  # attention leans on them
        helped.drafter.worth = fresh.worth = 0.0
        fresh.accept(tokens, None)
    else:
        binding = model.session.bind(model.session.new_cache(), helped.taps)
        binding.run(np.array(helped.text[: helped.seen]))
        assert binding.hidden is not None
        fresh.accept(tokens, binding.hidden[start:])
    assert fresh.draft(anchor, 4).tokens == helped.drafter.draft(anchor, 4).tokens
    np.testing.assert_allclose(fresh.confidence, helped.drafter.confidence, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["vanilla", "eagle3"])
def test_in_exact_mode_a_cached_prefix_keeps_its_bits(
    kind: str, compile_pair: Callable[..., Any], clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much the drafter promises, nothing is computed again; it begins at once with what is new."""
    model, drafter = opened(kind, compile_pair)
    widths = exact_widths(verify_curve(model.session))
    alone = Speculation(None, Scheduler(curve(*RUNS), widths), widths)
    timed(model, clock, monkeypatch)

    def turn(speculation: Speculation, drafter: Clocked | None = None) -> tuple[list[Any], Any]:
        state = model.new_state()
        first = [p.step.token for p in model.stream(PROMPT, limit=40, state=state, speculation=alone)]
        second = [*PROMPT, *first, *reversed(PROMPT)]
        if drafter is not None:
            drafter.text = [*second, *drafter.text]
        stream = model.stream(second, limit=60, top=2, state=state, speculation=speculation)
        steps = [(piece.step.token, piece.step.logprob, piece.step.top) for piece in stream]
        return steps, stream.result

    plain, told = turn(alone)
    assert told.cached_tokens == len(PROMPT) + 39
    helped = Clocked(drafter, [token for token, _, _ in plain], clock)
    rich = Reader(MEASURED, Experience(won=1e6, started=1000, gained=1e6))
    steps, told = turn(Speculation(helped, Scheduler(curve(*RUNS), widths, rich), widths), helped)
    assert steps == plain
    tally = told.speculation.tally
    assert (tally.reread_tokens, tally.starts, tally.start_tokens) == (0, 1, 1)
    assert told.cached_tokens == helped.left_out == len(PROMPT) + 39
    assert tally.accepted > 10
    assert_as_fresh(model, kind, helped, compile_pair)
