"""The token loop's contract, on a tiny float32 model: what is yielded, and what is left in the cache."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsopt.runtime import decoder, load
from dsopt.runtime.decoder import Step, decode, prefill
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.kv import KvCache
from dsopt.runtime.sampling import Sampler, Sampling
from dsopt.runtime.session import Binding, Session

PROMPT = [42, 7, 99, 180, 3]


@pytest.fixture(scope="module")
def session(tiny_artifact: Path) -> Session:
    return load(tiny_artifact).session


def greedy() -> Sampler:
    return Sampler(Sampling())


def run(binding: Binding, prompt: Sequence[int], limit: int, **options: Any) -> list[int]:
    return [step.token for step in decode(binding, prompt, choose=greedy(), limit=limit, **options)]


def fresh(session: Session) -> Binding:
    return session.bind(session.new_cache())


def test_steps_carry_tokens_and_log_probabilities_only_when_asked(session: Session) -> None:
    plain = list(decode(fresh(session), PROMPT, choose=greedy(), limit=4))
    assert all(step == Step(step.token) for step in plain)

    rich = list(decode(fresh(session), PROMPT, choose=greedy(), limit=4, top=3))
    assert [step.token for step in rich] == [step.token for step in plain]
    for step in rich:
        assert len(step.top) == 3
        assert step.top[0] == (step.token, step.logprob)  # greedy takes the most probable one


def test_it_ends_at_the_limit_and_after_an_end_token(session: Session) -> None:
    tokens = run(fresh(session), PROMPT, 12)
    assert len(tokens) == 12
    end = tokens[5]
    assert run(fresh(session), PROMPT, 12, end=frozenset([end])) == tokens[: tokens.index(end) + 1]


def test_no_limit_left_still_fills_the_cache(session: Session) -> None:
    binding = fresh(session)
    assert run(binding, PROMPT, 0) == []
    assert binding.cache.length == len(PROMPT)


def test_choose_sees_the_whole_history(session: Session) -> None:
    seen: list[list[int]] = []

    def choose(logits: np.ndarray, history: Sequence[int]) -> int:
        assert logits.shape == (session.vocab_size,)
        seen.append(list(history))
        return len(seen)

    list(decode(fresh(session), PROMPT, choose=choose, limit=3))
    assert seen == [PROMPT, [*PROMPT, 1], [*PROMPT, 1, 2]]


def test_a_caller_who_stops_can_go_on_later(session: Session) -> None:
    tokens = run(fresh(session), PROMPT, 20)
    binding = fresh(session)
    steps = decode(binding, PROMPT, choose=greedy(), limit=20)
    first = [step.token for step in islice(steps, 8)]
    del steps
    assert binding.cache.length == len(PROMPT) + 7  # the eighth was yielded, not yet fed
    assert first + run(binding, PROMPT + first, 12) == tokens


def test_an_interrupted_run_leaves_a_valid_cache(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = run(fresh(session), PROMPT, 20)
    binding = fresh(session)
    calls = 0

    class Interrupted:
        """The session, interrupted in its sixth run after the buffers have been written."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def run_with_iobinding(self, io: Any) -> None:
            nonlocal calls
            calls += 1
            self.real.run_with_iobinding(io)
            if calls == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(binding, "_session", Interrupted(binding._session))
    got: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(step.token for step in decode(binding, PROMPT, choose=greedy(), limit=20))
    assert got == tokens[:5]
    assert got + run(binding, PROMPT + got, 15) == tokens


def test_reallocation_changes_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = run(fresh(session), PROMPT, 100)
    monkeypatch.setattr("dsopt.runtime.kv._FIRST", 4)
    binding = fresh(session)
    assert run(binding, PROMPT, 100) == tokens
    assert binding.cache.capacity == 128
    assert binding.cache.generation == 6  # 4, 8, 16, 32, 64, 128


def test_rewinding_equals_never_having_gone_there(session: Session) -> None:
    other = [*PROMPT[:3], 200, 201]
    expected = run(fresh(session), other, 15)
    binding = fresh(session)
    run(binding, PROMPT, 30)
    binding.cache.trim(3)
    assert run(binding, other, 15) == expected


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_is_one_shot_prefill(session: Session, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    prompt = np.random.default_rng(1).integers(0, 256, 32).tolist()
    whole = prefill(fresh(session), prompt).copy()
    tokens = run(fresh(session), prompt, 20)
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", chunk)
    np.testing.assert_allclose(prefill(fresh(session), prompt), whole, atol=2e-5)
    assert run(fresh(session), prompt, 20) == tokens


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(session: Session) -> None:
    binding = session.bind(KvCache(session.layers, 8))
    with pytest.raises(DsoptError, match="9 positions are needed, 8 fit"):
        prefill(binding, list(range(9)))
    assert binding.cache.length == 0


def test_the_head_sees_nothing_of_a_chunk_that_is_not_the_last(session: Session) -> None:
    asked, blank = fresh(session), fresh(session)
    assert asked.run(np.arange(5), rows=1).shape == (1, session.vocab_size)
    assert blank.run(np.arange(5), rows=0).shape == (0, session.vocab_size)
    np.testing.assert_array_equal(blank.run(np.array([7])), asked.run(np.array([7])))
