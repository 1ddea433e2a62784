"""When a drafter that must read begins, by a clock that only runs and drafts move: what it may cost and must bring."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from slow_reader import MEASURED, RUNS, STEP, VOCAB, Slow, Timed, answer, scheduler, slower, target, text
from toy import TAPS

from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.chain import ChainDrafter
from dsopt.runtime.drafters.experience import Experience
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.scheduler import BEGINNING, Reader, Scheduler
from dsopt.runtime.session import PREFILL_CHUNK
from dsopt.runtime.speculate import Speculation, speculate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dsopt.runtime.speculate.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 64, 200, 700, 2000])
@pytest.mark.parametrize("prompt", [2, 32, 150, 1000, 8000])
def test_a_drafter_that_is_never_right_costs_three_percent_at_most(
    clock: SimpleNamespace, prompt: int, limit: int
) -> None:
    times, _ = answer(clock, Slow(clock, text(prompt), 0.0), scheduler(), prompt, limit)
    assert slower(times) <= 1.03


@pytest.mark.parametrize("right", [0.1, 0.4, 0.6, 0.9])
def test_luck_and_its_end_cost_no_more(clock: SimpleNamespace, right: float) -> None:
    """Also one that is right for a while only."""
    drafter = Slow(clock, text(150), right)
    times, _ = answer(clock, drafter, scheduler(), 150, 2000)
    assert slower(times) <= 1.03

    class Changing(Slow):
        def draft(self, anchor: int, limit: int) -> Draft:
            self.right = right if self.seen < 600 else 0.0
            return super().draft(anchor, limit)

    times, _ = answer(clock, Changing(clock, text(150), right), scheduler(), 150, 2000)
    assert slower(times) <= 1.03


def test_reading_that_is_dearer_than_measured_costs_one_piece_more(clock: SimpleNamespace) -> None:
    for prompt in (32, 300, 1200):
        drafter = Slow(clock, text(prompt), 0.0, slower=3)
        times, tally = answer(clock, drafter, scheduler(), prompt, 2000)
        assert tally.read_tokens > 0
        assert all(time <= 1.03 * STEP * count + drafter.largest for count, time in enumerate(times, 1))


def test_a_good_drafter_of_a_long_answer_loses_little_by_beginning_late(clock: SimpleNamespace) -> None:
    for prompt in (40, 300):
        at_once = Experience(won=1e6, started=1000, gained=500)
        first, tally = answer(clock, Slow(clock, text(prompt), 0.85), scheduler(at_once), prompt, 2000)
        assert tally.start_tokens <= 1 + prompt // 128
        assert first[-1] < 0.7 * STEP * 2000
        late, tally = answer(clock, Slow(clock, text(prompt), 0.85), scheduler(), prompt, 2000)
        assert 30 < tally.start_tokens < 200
        assert late[-1] < 1.05 * first[-1]


def test_what_is_left_of_an_answer_must_be_able_to_pay(clock: SimpleNamespace) -> None:
    """The account bears the reading of the latest 32 tokens at some time, whatever the limit; for the last few tokens
    nothing is read."""
    start = answer(clock, Slow(clock, text(300), 0.9), scheduler(), 300, 500)[1].start_tokens
    for more in (1, 3, 20):
        _, tally = answer(clock, Slow(clock, text(300), 0.9), scheduler(), 300, start + more)
        assert (tally.starts, tally.read_tokens) == ((1, 32) if more == 20 else (0, 0))


def test_experience_begins_at_once_where_it_promises_enough(clock: SimpleNamespace) -> None:
    experience = Experience()
    for limit, begins in ((64, None), (1500, 50), (64, 0), (5, None), (64, 0)):
        times, tally = answer(clock, Slow(clock, text(40), 0.85), scheduler(experience), 40, limit)
        assert (begins is not None) == tally.starts
        if begins is not None:
            assert tally.start_tokens > begins if begins else tally.start_tokens == 1
            assert times[-1] < 0.85 * STEP * limit
    assert experience.won > 100


def test_padded_runs_change_no_decision_to_begin(clock: SimpleNamespace) -> None:
    """Exact mode: what an answer may have is more than what a run may."""
    widths = (2, 4)
    padded_step = RUNS[1]
    for experience, started in ((Experience(won=100, started=1000, gained=200), 1), (Experience(), 0)):
        schedule = Scheduler(target(), widths, Reader(MEASURED, experience))
        times, tally = answer(clock, Slow(clock, text(150), 0.85), schedule, 150, 60, widths=widths)
        assert tally.starts == started
    never = Scheduler(target(), widths, Reader(MEASURED, Experience()))
    times, tally = answer(clock, Slow(clock, text(150), 0.0), never, 150, 1000, widths=widths)
    assert tally.starts == 1
    assert slower(times) <= 1.03 * padded_step / STEP


def test_experience_with_a_bad_drafter_begins_later_still(clock: SimpleNamespace) -> None:
    experience, begun = Experience(), []
    for _ in range(2):
        times, tally = answer(clock, Slow(clock, text(40), 0.05), scheduler(experience), 40, 2000)
        assert slower(times) <= 1.03
        begun.append(tally.start_tokens)
    assert experience.won == 0
    assert begun[1] > 2 * begun[0] > 50


def test_what_is_staked_was_won_before(clock: SimpleNamespace) -> None:
    """A drafter that was good once, and never again: all answers together."""
    experience = Experience()
    first, _ = answer(clock, Slow(clock, text(40), 0.85), scheduler(experience), 40, 900)
    spent, plain, worst = first[-1], 899 * STEP, 0.0
    for _ in range(60):
        times, _ = answer(clock, Slow(clock, text(40), 0.0), scheduler(experience), 40, 64)
        spent, plain, worst = spent + times[-1], plain + 63 * STEP, max(worst, slower(times))
        assert spent <= 1.03 * plain
    assert worst > 1.03  # one by one they may lose what was won
    assert slower(times) <= 1.03  # and then no more


def test_answers_that_tend_to_be_short_promise_little() -> None:
    experience = Experience(started=1000, gained=500)
    assert experience.promise(10) == 5
    assert experience.promise(1000) == 500
    experience.note(30, ended=True, started=0, gained=0, won=0)
    experience.note(10, ended=True, started=0, gained=0, won=0)
    assert experience.promise(1000) == pytest.approx(0.5 * 20, rel=0.01)
    assert experience.promise(5) == pytest.approx(2.2, rel=0.01)  # half of 20 (1 - exp(-5/20))
    assert not experience.disappoints
    assert Experience(started=400, gained=200).promise(1000) == 0  # one answer says little of the next


def test_one_that_copies_goes_on_while_the_other_has_not_begun(clock: SimpleNamespace) -> None:
    class Copying(NgramDrafter):
        """Sure now and then, at no cost."""

        right = True

        def draft(self, anchor: int, limit: int) -> Draft:
            super().draft(anchor, limit)
            position = len(self._text.tokens)
            coming = text(1000)[position:][: min(limit, 3)] if position % 5 == 0 else []
            return Draft(tuple((token + (not self.right)) % VOCAB for token in coming), (0.95,) * len(coming))

    chain = ChainDrafter([Copying(), Slow(clock, text(1000), 0.0)])
    times, tally = answer(clock, chain, scheduler(beside=True), 1000, 60)
    assert tally.starts == 0
    assert tally.accepted > 20
    chain = ChainDrafter([Copying(), Slow(clock, text(1000), 0.9)])
    times, tally = answer(clock, chain, scheduler(beside=True), 1000, 1000)
    assert tally.starts == 1
    assert tally.accepted > 650
    chain = ChainDrafter([Copying(), Slow(clock, text(1000), 0.0)])
    Copying.right = False
    times, tally = answer(clock, chain, scheduler(beside=True), 1000, 2000)
    assert tally.starts == 1
    assert all(time <= 1.03 * STEP * count + STEP for count, time in enumerate(times, 1))


@pytest.mark.parametrize("right", [0.0, 0.85])
@pytest.mark.parametrize("cached", [1, 280, 299])
def test_what_comes_behind_a_cached_prompt_is_read_within_the_account(
    clock: SimpleNamespace, cached: int, right: float
) -> None:
    drafter = Slow(clock, text(300), right, TAPS)
    times, tally = answer(clock, drafter, scheduler(), 300, 1000, cached=cached)
    assert (tally.reread_tokens, tally.starts) == (0, 1)
    assert drafter.left_out >= cached
    assert slower(times) <= 1.03
    if right:
        assert times[-1] < 0.9 * STEP * 1000

    class Unsure(NgramDrafter):
        def draft(self, anchor: int, limit: int) -> Draft:
            assert self._text.tokens[:300] == text(300)[:300]  # it needs no hidden states
            return super().draft(anchor, 0)

    drafter = Slow(clock, text(300), right, TAPS)
    _, tally = answer(clock, ChainDrafter([Unsure(), drafter]), scheduler(beside=True), 300, 1000, cached=cached)
    assert (tally.reread_tokens, tally.starts) == (0, 1)
    assert drafter.left_out >= cached


def test_experience_begins_at_once_behind_a_cached_prompt(clock: SimpleNamespace) -> None:
    """With what is new, where computing the rest again would cost more than is promised."""
    drafter = Slow(clock, text(600), 0.85, TAPS)
    _, tally = answer(clock, drafter, scheduler(Experience(won=1e6, started=1000, gained=200)), 600, 100, cached=580)
    assert (tally.reread_tokens, tally.starts, tally.start_tokens) == (0, 1, 1)
    assert (drafter.left_out, tally.read_tokens) == (580, 20)


def test_a_cached_prompt_is_computed_again_for_taps_only_where_that_pays(clock: SimpleNamespace) -> None:
    rich = Experience(won=1e6, started=1000, gained=500)
    _, tally = answer(clock, Slow(clock, text(300), 0.85, TAPS), scheduler(rich), 300, 1000, cached=280)
    assert (tally.reread_tokens, tally.starts) == (280, 1)
    _, tally = answer(clock, Slow(clock, text(300), 0.85, TAPS), scheduler(rich), 300, 60, cached=280)
    assert tally.reread_tokens == 0

    for cached, again in ((7000, 0), (7488, 0), (7489, 1), (7999, 511)):  # the drafter would read the latest 512
        drafter = Slow(clock, text(8000), 0.85, TAPS)
        _, tally = answer(clock, drafter, scheduler(rich), 8000, 2000, cached=cached)
        assert (tally.reread_tokens, tally.starts) == (again, 1)
        assert drafter.left_out == 8000 - 512


def test_exact_mode_computes_nothing_again(clock: SimpleNamespace) -> None:
    """What is cached may have other bits than what would be computed now."""
    rich = Reader(MEASURED, Experience(won=1e6, started=1000, gained=500))
    drafter = Slow(clock, text(300), 0.85, TAPS)
    schedule = Scheduler(target(), (2, 4), rich)
    _, tally = answer(clock, drafter, schedule, 300, 1000, cached=280, widths=(2, 4))
    assert (tally.reread_tokens, tally.starts, tally.start_tokens) == (0, 1, 1)
    assert drafter.left_out == 280


@pytest.mark.parametrize("prompt", [32, 1000, 8000])
def test_no_more_hidden_states_wait_than_reading_begins_with(clock: SimpleNamespace, prompt: int) -> None:
    """And the schedule decides as if all of them waited."""
    for right in (0.0, 0.85):
        made = []
        for taps in ((), TAPS):
            clock.now = 0.0  # sums round alike
            drafter = Slow(clock, text(prompt), right, taps)
            times, tally = answer(clock, drafter, scheduler(), prompt, 2000)
            made.append((times, tally, drafter.left_out))
        assert made[0] == made[1]
        assert tally.starts == 1
        assert drafter.most_unread <= BEGINNING + PREFILL_CHUNK


@pytest.mark.parametrize("context", [200, 500])
def test_a_drafter_that_cannot_draft_has_not_started_and_is_not_told_of_anything(
    clock: SimpleNamespace, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    class Watched(Timed):
        @property
        def hidden(self) -> np.ndarray | None:
            shown.append(self.cache.length)
            return self.rows

        @hidden.setter
        def hidden(self, rows: np.ndarray | None) -> None:
            self.rows = rows

    monkeypatch.setattr("slow_reader.Timed", Watched)
    experience, drafter = Experience(), Slow(clock, text(300), 0.85, TAPS)
    drafter.context = context
    _, tally = answer(clock, drafter, scheduler(experience), 300, 1000)
    if context == 200:
        assert (tally.starts, experience.started, len(shown)) == (0, 0, 3)  # the prompt's chunks
    else:
        assert 300 < max(shown) < 520
        assert 0 < experience.started < context - 300
        assert drafter.seen < 520


def test_interrupting_between_pieces_leaves_what_can_be_gone_on_from(clock: SimpleNamespace) -> None:
    rich = scheduler(Experience(won=1e6, started=1000, gained=500))
    drafter, binding = Slow(clock, text(1000), 0.85), Timed(clock)
    choose = Sampler(Sampling(repeat_penalty=1.3))
    speculation = Speculation(drafter, rich)
    steps = speculate(binding, text(1000)[:1000], speculation, sampler=choose, limit=900)
    head = [next(steps).token for _ in range(4)]
    steps.close()  # type: ignore[attr-defined]
    assert drafter.read_up_to == 1000 - 512 + 3 * 128
    rest = speculate(binding, text(1000)[:1004], speculation, sampler=choose, limit=896)
    assert head + [step.token for step in rest] == text(1000)[1000:1900]


def test_experience_is_kept_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "e" / "x.json"
    Experience(path=path).note(64, ended=False, started=20, gained=5, won=3)
    assert path.read_text() == '{"won": 3.0, "started": 20.0, "gained": 5.0, "answered": 64.0, "ended": 0.0}'
