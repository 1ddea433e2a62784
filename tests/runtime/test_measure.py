"""What is on the clock and what is not, on a model that takes a millisecond a token."""

from pathlib import Path

import numpy as np
import pytest

from dsopt.runtime import measure as module
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.kv import KvCache, LayerShape
from dsopt.runtime.measure import Bench, Measurement, Workload, mean_and_deviation
from dsopt.runtime.session import PREFILL_CHUNK, Session


class SlowSession:
    """A session, its binding and the clock: n tokens take n ms; a run is noted as (cached, n, rows)."""

    vocab_size, most_candidates = 50, 0

    def __init__(self, context: int = 4096) -> None:
        self.context, self.now, self.runs = context, 0, []

    def new_cache(self) -> KvCache:
        return KvCache([LayerShape(0, 1, 1)], self.context)

    def bind(self, cache: KvCache) -> "SlowSession":
        self.cache = cache
        return self

    def run(self, ids: np.ndarray, rows: int = 1, keep: int | None = None) -> np.ndarray:
        assert min(ids) >= 0
        assert max(ids) < self.vocab_size
        self.runs.append((self.cache.length, len(ids), rows))
        self.cache.reserve(self.cache.length + len(ids))
        self.cache.length += len(ids)
        self.now += len(ids) * 1_000_000
        return np.zeros((rows, self.vocab_size), np.float32)


def measure(session: SlowSession | Session, workloads: list[Workload], repetitions: int) -> list[Measurement]:
    bench = Bench(session)  # type: ignore[arg-type]
    return [bench.measure(workload, repetitions) for workload in workloads]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowSession:
    session = SlowSession()
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: session.now)
    return session


@pytest.mark.parametrize(
    ("workload", "name"),
    [
        (Workload(512), "pp512"),
        (Workload(0, 128), "tg128"),
        (Workload(512, 128), "pp512+tg128"),
        (Workload(0, 128, 4096), "tg128 @ d4096"),
    ],
)
def test_names_are_those_of_llama_bench(workload: Workload, name: str) -> None:
    assert workload.name == name


def test_impossible_work_is_refused(slow: SlowSession) -> None:
    with pytest.raises(UsageError, match="negative"):
        Workload(-1, 2)
    with pytest.raises(UsageError, match="nothing to measure"):
        Workload(depth=8)
    with pytest.raises(UsageError, match="repetitions"):
        measure(slow, [Workload(1)], 0)
    with pytest.raises(DsoptError, match=r"tg97 @ d4000: 4097 positions are needed; this model has 4096"):
        measure(slow, [Workload(0, 97, 4000)], 1)
    assert slow.runs == []


def test_a_prompt_runs_in_chunks_after_a_warm_up(slow: SlowSession) -> None:
    (result,) = measure(slow, [Workload(PREFILL_CHUNK + 8)], 2)
    assert slow.runs == [(0, PREFILL_CHUNK, 0), (PREFILL_CHUNK, 8, 1)] * 3  # the head sees the last row only
    assert result.samples_ns == [(PREFILL_CHUNK + 8) * 1_000_000] * 2
    assert result.samples_ts == pytest.approx([1000, 1000])
    assert result.ttft_ms == PREFILL_CHUNK + 8
    assert result.itl_ms(50) is None


def test_generation_restarts_at_its_depth_which_is_filled_off_the_clock(slow: SlowSession) -> None:
    (result,) = measure(slow, [Workload(0, 2, 600)], 2)
    fill = [(start, PREFILL_CHUNK, 0) for start in range(0, 512, PREFILL_CHUNK)] + [(512, 88, 1)]
    warm_up, once = [(600, 1, 1)], [(600, 1, 1), (601, 1, 1)]
    assert slow.runs == fill + warm_up + once + once
    assert result.samples_ns == [2_000_000] * 2
    assert result.ttft_ms is None
    assert result.itl_ms(95) == 1.0


def test_a_pair_counts_both_parts(slow: SlowSession) -> None:
    (result,) = measure(slow, [Workload(30, 3)], 1)
    assert result.samples_ns == [33_000_000]
    assert result.repetitions[0].prompt_ns == 30_000_000
    assert result.repetitions[0].steps_ns == (1_000_000,) * 3


def test_a_deeper_workload_keeps_what_is_cached(slow: SlowSession) -> None:
    measure(slow, [Workload(0, 1, 10), Workload(0, 1, 40)], 1)
    assert slow.runs == [(0, 10, 1), (10, 1, 1), (10, 1, 1), (11, 29, 1), (40, 1, 1), (40, 1, 1)]


def test_each_repetition_is_told(slow: SlowSession) -> None:
    told: list[tuple[int, int, int]] = []
    Bench(slow).measure(Workload(4), 2, lambda *progress: told.append((*progress, slow.now)))  # type: ignore[arg-type]
    assert told == [(0, 2, 0), (1, 2, 8_000_000), (2, 2, 12_000_000)]


def test_the_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation([2.0, 4.0, 9.0]) == (5.0, pytest.approx(13**0.5))
    assert mean_and_deviation([7.0]) == (7.0, 0.0)


def test_a_real_session_is_measured(tiny_artifact: Path) -> None:
    session = Session(open_artifact(tiny_artifact))
    pair, deep = measure(session, [Workload(8, 4), Workload(0, 3, 20)], 2)
    assert len(pair.samples_ns) == len(deep.samples_ns) == 2
    assert all(0 < run.prompt_ns < run.total_ns for run in pair.repetitions)
    assert all(sum(run.steps_ns) == run.total_ns for run in deep.repetitions)
