"""Eagle3 (arXiv:2503.01840): one layer that drafts token by token, from hidden states of the model and then its own."""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.drafters import Draft
from dsopt.runtime.drafters.confidence import Confidence, likeliest
from dsopt.runtime.drafters.deepspec import Chance
from dsopt.runtime.drafters.graph import CachedGraph, Graph
from dsopt.runtime.drafters.manifest import DraftManifest
from dsopt.runtime.drafters.waiting import Waiting
from dsopt.runtime.sampling import Sampling

Floats = NDArray[np.float32]
_PIECE = 256  # rows that are read at once


class Eagle3Drafter:
    """Row i of its cache joins the model's hidden state at i with token i + 1.

    The last processed row is read anew with each draft: the token behind it, the anchor, is not processed yet.
    """

    def __init__(self, directory: Path, manifest: DraftManifest, sampling: Sampling) -> None:
        self.taps, self._steps = manifest.taps, manifest.steps
        self.positions = manifest.steps
        self._candidates, self._logits = (np.empty((1, manifest.candidates), kind) for kind in (np.int64, np.float32))
        self._last = np.empty((1, 1, manifest.model["hidden_size"]), np.float32)
        outputs = {"last": self._last, "candidates": self._candidates, "logits": self._logits}
        self._context = Graph(directory, "context.onnx", manifest)
        self._step = CachedGraph(Graph(directory, "step.onnx", manifest), manifest, outputs)
        self._cache = self._step.cache
        self._chance = Chance(sampling, manifest.model["vocab_size"])
        self._confidence = Confidence(manifest.temperatures.get(self._chance.mode, ()))
        self.begin()

    @property
    def confidence(self) -> NDArray[np.float64]:
        return np.array(self._confidence.logits)

    def begin(self) -> None:
        self._cache.trim(0)
        self._tokens: deque[int] = deque()  # of the rows that wait
        self._fused = np.empty((0, self._last.shape[-1]), np.float32)  # what the layer reads, of the first of them
        self._waiting = Waiting()  # hidden states, of the others
        self._confidence.begin()

    def accept(self, tokens: Sequence[int], hidden: Floats | None) -> None:
        self._confidence.accept(tokens)
        if hidden is None:
            self.leave_out(len(self._tokens))
            return
        assert len(hidden) == len(tokens)
        self._tokens += tokens
        self._waiting.add(np.array(hidden).reshape(len(hidden), -1))

    @property
    def unread(self) -> int:
        """The last row waits for the token behind it."""
        return 0 if self.silent else max(len(self._tokens) - 1, 0)

    @property
    def silent(self) -> bool:
        return not self._fits(1)

    def read(self, count: int) -> None:
        self._read(list(islice(self._tokens, 1, min(count, self.unread) + 1)))

    def leave_out(self, count: int) -> None:
        """What is read later takes the positions behind what was read: only distances count."""
        fused = min(count, len(self._fused))
        self._fused = self._fused[fused:]
        self._waiting.drop(count - fused)
        self._forget_tokens(count)

    def draft(self, anchor: int, limit: int) -> Draft:
        steps = min(limit, self._steps)
        if steps < 1 or not self._tokens or not self._fits(steps):
            return Draft()
        self._confidence.start(anchor)
        self._read([*islice(self._tokens, 1, None), anchor], kept=1)
        processed = self._cache.length - 1
        tokens, survival, candidates, logits = [], [], [], []
        for step in range(steps):
            token = self._choose()
            tokens.append(token)
            survival.append(self._confidence.add(token, float(likeliest(self._logits, self._chance.temperature)[0])))
            candidates.append(self._candidates.copy())
            logits.append(self._logits.copy())
            if step < steps - 1:
                self._run(self._last[0].copy(), [token])
        self._cache.trim(processed)
        drawn_from = self._chance.distributions(np.concatenate(candidates), np.concatenate(logits))
        return Draft(tuple(tokens), tuple(survival), drawn_from)

    def _fits(self, more: int) -> bool:
        return self._cache.length + len(self._tokens) + more <= self._cache.limit

    def _read(self, following: Sequence[int], kept: int = 0) -> None:
        """Take the first of the waiting rows into the cache, as many as tokens behind them are given. The last `kept`
        of them go on waiting."""
        self._fuse(len(following))
        for first in range(0, len(following), _PIECE):
            ids = following[first : first + _PIECE]
            self._run(self._fused[first : first + len(ids)], ids)
        done = len(following) - kept
        self._fused = self._fused[done:]
        self._forget_tokens(done)

    def _forget_tokens(self, count: int) -> None:
        for _ in range(count):
            self._tokens.popleft()

    def _fuse(self, count: int) -> None:
        """Make of hidden states what the layer reads, for the first `count` rows that wait."""
        missing = count - len(self._fused)
        if missing > 0:
            fused = self._context.run({"hidden": self._waiting.take(missing)[None]})[0][0]
            self._fused = np.concatenate([self._fused, fused])

    def _run(self, context: Floats, following: Sequence[int]) -> None:
        self._step.run({"context": context[None], "input_ids": np.array([following], np.int64)}, len(following))
        self._cache.length += len(following)

    def _choose(self) -> int:
        logits = self._logits[0].astype(np.float64)
        if self._chance.temperature:
            logits += self._chance.noise(logits.shape)
        return int(self._candidates[0, logits.argmax()])
