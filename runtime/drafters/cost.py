"""Where the time of a block drafter's round goes, apart from verification."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters.deepspec import BlockDrafter
from dsopt.runtime.drafters.graph import CachedGraph


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Medians in seconds."""

    ingest: float  # keys and values of the rows that a round accepted
    block: float  # the layers, the head and the candidates
    chain: float  # Markov and confidence head: what a draft takes longer than its block


def draft_cost(drafter: BlockDrafter, depth: int, rows: int, repeats: int = 9) -> DraftCost:
    """A draft behind `depth` positions, after a round that accepted `rows`. The drafter forgets its sequence."""
    shape, steps = drafter.manifest.model, drafter.manifest.steps
    size = (depth + rows * (repeats + 1), len(drafter.taps), shape["hidden_size"])
    hidden: NDArray[np.float32] = np.random.default_rng(0).normal(size=size).astype(np.float32)
    candidates = np.empty((steps, drafter.manifest.candidates), np.int64)
    without_chain = CachedGraph(drafter.graph, drafter.manifest, {"candidates": candidates})
    inputs = {"input_ids": np.zeros((1, steps), np.int64), "noise": np.zeros(candidates.shape)}
    drafter.begin()
    drafter.accept([0] * depth, hidden[:depth])
    times: dict[str, list[float]] = {"ingest": [], "block": [], "draft": []}
    for start in range(depth, len(hidden), rows):
        drafter.ingest()
        drafter.accept([0] * rows, hidden[start : start + rows])
        without_chain.cache.reserve(start + rows + steps)
        without_chain.cache.length = start + rows
        times["ingest"].append(_seconds(drafter.ingest))
        times["block"].append(_seconds(lambda: without_chain.run(inputs, steps)))
        times["draft"].append(_seconds(lambda: drafter.draft(0, steps)))
    drafter.begin()
    chain = [draft - block for draft, block in zip(times["draft"], times["block"], strict=True)]
    # The first ones bind and allocate. A chain of microseconds may drown in the noise of its block.
    return DraftCost(median(times["ingest"][1:]), median(times["block"][1:]), max(median(chain[1:]), 0.0))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
