"""Speed, measured as llama-bench does: random token ids through the model, no tokenizer and no sampling.

Each repetition starts from a cache trimmed to the depth asked for; filling it, a warm-up run and the cache's
allocation are outside the clock.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.decoder import advance, prefill
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.session import Binding, Session


@dataclass(frozen=True)
class Workload:
    """One row: `prompt` tokens in chunks, then `generate` single ones, all behind `depth` cached ones."""

    prompt: int = 0
    generate: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt, self.generate, self.depth) < 0:
            raise UsageError(f"{self.name}: a number of tokens cannot be negative")
        if not self.tokens:
            raise UsageError("nothing to measure: give -p or -n more than 0 tokens")

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return self.prompt + self.generate

    @property
    def name(self) -> str:
        """As in llama-bench: pp512, tg128, pp512+tg128, `tg128 @ d4096`."""
        parts = [f"pp{self.prompt}"] * bool(self.prompt) + [f"tg{self.generate}"] * bool(self.generate)
        return "+".join(parts) + f" @ d{self.depth}" * bool(self.depth)


@dataclass(frozen=True)
class Repetition:
    """Nanoseconds of one run: the whole, its prompt (0 without one), and each generated token."""

    total_ns: int
    prompt_ns: int
    steps_ns: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """The repetitions of one workload. `started` is when the first began."""

    workload: Workload
    repetitions: tuple[Repetition, ...]
    started: datetime

    @property
    def samples_ns(self) -> list[int]:
        return [repetition.total_ns for repetition in self.repetitions]

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second of each repetition."""
        return [1e9 * self.workload.tokens / ns for ns in self.samples_ns]

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds to the logits after the prompt, averaged; None without a prompt."""
        if not self.workload.prompt:
            return None
        return statistics.fmean(repetition.prompt_ns for repetition in self.repetitions) / 1e6

    def itl_ms(self, percentile: float) -> float | None:
        """Milliseconds a generated token takes, at a percentile over all repetitions; None without any."""
        steps = [ns for repetition in self.repetitions for ns in repetition.steps_ns]
        return float(np.percentile(steps, percentile)) / 1e6 if steps else None


def mean_and_deviation(samples: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (n - 1 in the denominator; 0 for one sample)."""
    return statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0


def check_context(workloads: Sequence[Workload], context: int) -> None:
    """Raises DsoptError where a workload needs more positions than the model has."""
    for workload in workloads:
        if (needed := workload.depth + workload.tokens) > context:
            raise DsoptError(f"{workload.name}: {needed} positions are needed; this model has {context}")


class Bench:
    """A session, a cache and random ids: measures one workload after the other.

    Workloads of rising depth share the cached tokens.
    """

    def __init__(self, session: Session, seed: int = 0) -> None:
        self._session, self._binding = session, session.bind(session.new_cache())
        self._random = np.random.default_rng(seed)

    def measure(
        self,
        workload: Workload,
        repetitions: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Measurement:
        """Run `workload` and tell `progress` of each repetition done, outside the clock.

        Raises UsageError on fewer than one repetition, DsoptError where the workload does not fit.
        """
        if repetitions < 1:
            raise UsageError(f"-r is {repetitions}; 1 or more repetitions")
        check_context([workload], self._session.context)
        progress(0, repetitions)
        _fill(self._binding, self._draw(workload.depth + workload.tokens), workload)
        started, runs = datetime.now(UTC), []
        for done in range(1, repetitions + 1):
            runs.append(_run(self._binding, self._draw(workload.tokens), workload))
            progress(done, repetitions)
        return Measurement(workload, tuple(runs), started)

    def _draw(self, count: int) -> NDArray[np.int64]:
        return self._random.integers(self._session.vocab_size, size=count)


def _fill(binding: Binding, ids: NDArray[np.int64], workload: Workload) -> None:
    """Allocate, bring the cache to the depth, and warm up: the full prompt, one token."""
    cache = binding.cache
    cache.reserve(workload.depth + workload.tokens)
    cache.trim(min(cache.length, workload.depth))
    if missing := workload.depth - cache.length:
        prefill(binding, ids[:missing].tolist())
    warm_up = Workload(workload.prompt, min(workload.generate, 1), workload.depth)
    _run(binding, ids[workload.depth :], warm_up)


def _run(binding: Binding, ids: NDArray[np.int64], workload: Workload) -> Repetition:
    binding.cache.trim(workload.depth)
    prompt, clock = ids[: workload.prompt].tolist(), time.perf_counter_ns
    candidates = min(binding.most_candidates, 1)  # on a device, as greedy generation has it
    start = clock()
    if prompt:
        prefill(binding, prompt, candidates=candidates)
    stamps = [clock() if prompt else start]
    for index in range(workload.prompt, workload.tokens):
        advance(binding, ids[index : index + 1], candidates)
        stamps.append(clock())
    return Repetition(stamps[-1] - start, stamps[0] - start, tuple(b - a for a, b in itertools.pairwise(stamps)))
