"""DeepSpec's drafters, which read hidden states of the model: DSpark and DFlash (arXiv:2607.05147) and Eagle3.

What was processed waits until it is read, for a draft or because the schedule says so: a pause costs nothing but
memory, 51 kB a token at a width of 2560 and five taps. A schedule keeps no more waiting than it would begin with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.artifact import WEIGHTS
from dsopt.runtime.drafters import Draft, Drafter
from dsopt.runtime.drafters.confidence import Confidence, likeliest
from dsopt.runtime.drafters.graph import CachedGraph, Graph
from dsopt.runtime.drafters.manifest import DraftManifest, mode_of, open_draft
from dsopt.runtime.drafters.waiting import Waiting
from dsopt.runtime.sampling import Sampling
from dsopt.runtime.session import Session

Floats = NDArray[np.float32]
_PIECE = 256  # rows that are read at once


def open_deepspec(directory: Path, session: Session, sampling: Sampling) -> Drafter:
    """The drafter in `directory` of the artifact that `session` runs; `sampling` is the model's own.

    Raises DsoptError when it is damaged or was compiled with another model.
    """
    from dsopt.runtime.drafters.eagle3 import Eagle3Drafter

    weights = str(session.artifact.manifest.files[WEIGHTS]["sha256"])
    manifest = open_draft(directory, weights)
    make = Eagle3Drafter if manifest.kind == "eagle3" else BlockDrafter
    return make(directory, manifest, sampling)


class Chance:
    """How drafted tokens are chosen: the likeliest, or drawn at the model's temperature from the candidates."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.temperature, self.mode, self._vocab = sampling.temperature, mode_of(sampling), vocab_size
        # A stream of its own: the model's random numbers must not depend on the drafter.
        self._random = np.random.default_rng(None if sampling.seed is None else (sampling.seed, 1))

    def noise(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """To be added to logits before the largest is taken (the Gumbel trick): T * Gumbel draws at temperature T."""
        return self.temperature * self._random.gumbel(size=shape)

    def distributions(self, candidates: NDArray[np.int64], logits: Floats) -> NDArray[np.float64] | None:
        """Of rows [n, k] of logits, what their tokens were drawn from, [n, vocab]; None where nothing is drawn."""
        if not self.temperature:
            return None
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max(-1, keepdims=True))
        dense = np.zeros((len(logits), self._vocab))
        np.put_along_axis(dense, candidates, weights / weights.sum(-1, keepdims=True), -1)
        return dense


class BlockDrafter:
    """DSpark and DFlash: a draft is one run over the anchor and masks, each row of which gives a token."""

    def __init__(self, directory: Path, manifest: DraftManifest, sampling: Sampling) -> None:
        self.taps, self.manifest = manifest.taps, manifest
        steps, candidates = manifest.steps, manifest.candidates
        self.positions = steps
        outputs: dict[str, NDArray[Any]] = {
            "tokens": np.empty(steps, np.int64),
            "candidates": np.empty((steps, candidates), np.int64),
            "logits": np.empty((steps, candidates), np.float32),
            **({"confidence": np.empty(steps, np.float32)} if manifest.confidence else {}),
        }
        self._context = Graph(directory, "context.onnx", manifest)
        self.graph = Graph(directory, "block.onnx", manifest)
        self._block = CachedGraph(self.graph, manifest, outputs)
        self._cache = self._block.cache
        self._ids = np.full((1, steps), manifest.mask_token, np.int64)
        self._noise = np.zeros((steps, candidates))
        self._chance = Chance(sampling, manifest.model["vocab_size"])
        self._temperatures = np.array(manifest.temperatures.get(self._chance.mode, [1.0] * steps))
        self._confidence = None if manifest.confidence else Confidence(self._temperatures.tolist())
        self._drafted = 0
        self._waiting = Waiting()
        self.begin()

    @property
    def room(self) -> int:
        """Positions that it can hold, those of a draft included."""
        return self._cache.limit

    def begin(self) -> None:
        self._cache.trim(0)
        self._waiting.clear()
        self._full, self._drafted = False, 0
        if self._confidence is not None:
            self._confidence.begin()

    @property
    def confidence(self) -> NDArray[np.floating]:
        if self._confidence is not None:
            return np.array(self._confidence.logits)
        head: NDArray[np.floating] = self._block.outputs["confidence"][: self._drafted].copy()
        return head

    def accept(self, tokens: Sequence[int], hidden: Floats | None) -> None:
        if self._confidence is not None:
            self._confidence.accept(tokens)
        if hidden is None:
            self._waiting.clear()
            return
        assert len(hidden) == len(tokens)
        self._waiting.add(np.array(hidden).reshape(len(hidden), -1))

    @property
    def unread(self) -> int:
        return 0 if self.silent else len(self._waiting)

    @property
    def silent(self) -> bool:
        return self._full or self._cache.length + len(self._waiting) + self._ids.shape[1] > self._cache.limit

    def read(self, count: int) -> None:
        self.ingest(count)

    def leave_out(self, count: int) -> None:
        """What is read later takes the positions behind what was read: only distances count."""
        self._waiting.drop(count)

    def draft(self, anchor: int, limit: int) -> Draft:
        self.ingest()
        steps = self._ids.shape[1]
        if limit < 1 or self._full or self._cache.length + steps > self._cache.limit:
            return Draft()
        if self._confidence is not None:
            self._confidence.start(anchor)
        self._ids[0, 0] = anchor
        if self._chance.temperature:
            self._noise[:] = self._chance.noise(self._noise.shape)
        self._block.run({"input_ids": self._ids, "noise": self._noise}, steps)
        return self._made(min(limit, steps))

    def ingest(self, most: int | None = None) -> None:
        """Keys and values of what waits, of `most` rows of it if given. Once the drafter's context is full, nothing is
        read or drafted any more."""
        count, start = len(self._waiting), self._cache.length
        self._full = self._full or start + count > self._cache.limit
        if self._full:
            self._waiting.clear()
        if not self._waiting:
            return
        now = self._waiting.take(count if most is None else min(count, most))
        self._cache.reserve(start + len(now))
        for first in range(0, len(now), _PIECE):
            self._append(now[first : first + _PIECE])

    def _append(self, rows: Floats) -> None:
        start, stop = self._cache.length, self._cache.length + len(rows)
        made = self._context.run({"hidden": rows[None], "start": np.array([start], np.int64)})
        for name, part in zip(self._cache.buffers, made, strict=True):
            self._cache.buffers[name][:, :, start:stop] = part
        self._cache.length = stop

    def _made(self, count: int) -> Draft:
        made = {name: array[:count] for name, array in self._block.outputs.items()}
        tokens, self._drafted = tuple(map(int, made["tokens"])), count
        distributions = self._chance.distributions(made["candidates"], made["logits"])
        return Draft(tokens, tuple(self._survival(tokens, made["logits"])), distributions)

    def _survival(self, tokens: Sequence[int], logits: Floats) -> list[float]:
        if self._confidence is not None:
            sure = likeliest(logits, self._chance.temperature)
            return [self._confidence.add(token, float(p)) for token, p in zip(tokens, sure, strict=True)]
        calibrated = 1 / (1 + np.exp(-self.confidence / self._temperatures[: len(tokens)]))
        return [float(share) for share in calibrated]
