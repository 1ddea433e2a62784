"""What a build lost, against the float32 model as it was before anything was taken from it, on text held out.

Where the vocabulary was cut, the two models are asked about the same text token for token, by the whole model's tokens:
of those that are gone the smaller model says the pieces, one after the other. With p the whole model and q the smaller,
a token t whose pieces are f, r1, r2, ... is worth

    KL(p's first pieces || q)  +  ln p(t | f) - ln q(r1, r2, ... | f)

p's first pieces being its probabilities summed over the tokens that begin with the same piece. On text that the whole
model wrote the mean of that is the divergence of the two models as writers of text: an exact sum where one token is
predicted, a mean over the text where more are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dsopt.compiler.pruning.spelling import Spelling, joined
from dsopt.compiler.stream import BlockStream
from dsopt.runtime.quality import Comparison, log_softmax

Progress = Callable[[int, int], None]
Logits = np.ndarray


@dataclass(frozen=True)
class Judge:
    """windows int64 [n, tokens], hidden float32 [n, tokens, width] of the whole model behind its last block, and its
    final norm and head. `spelling` where another model has fewer tokens."""

    windows: np.ndarray
    hidden: Tensor
    head: nn.Module
    spelling: Spelling | None = None

    @classmethod
    def of(
        cls,
        stream: BlockStream,
        windows: np.ndarray,
        spelling: Spelling | None,
        progress: Progress = lambda done, total: None,
    ) -> "Judge":
        """Runs the whole model over the windows."""
        return cls(windows, stream.run(windows, progress), stream.head(), spelling)

    def texts(self) -> np.ndarray:
        """The windows in the other model's tokens, as many of them."""
        return self.spelling.windows(self.windows) if self.spelling else self.windows

    def compare(self, found: Iterable[Logits], progress: Progress = lambda done, total: None) -> dict[str, float]:
        """The quantities of `dsopt compare`, by the whole model's tokens; `found` are the other model's logits
        [tokens, vocab] for each of `texts()`."""
        comparison = Comparison()
        for number, (ids, states, logits) in enumerate(zip(self.windows, self.hidden, found, strict=True), 1):
            first = len(ids) // 4  # with some context before them
            with torch.inference_mode():
                base = self.head(states[first:]).numpy()
            if self.spelling is None:
                comparison.add(base[:-1], logits[first:-1], ids[first + 1 :])
            else:
                _add(comparison, self.spelling, ids, base, logits)
            progress(number, len(self.windows))
        return comparison.summary()


def _add(comparison: Comparison, spelling: Spelling, ids: np.ndarray, base: Logits, logits: Logits) -> None:
    """base [n, old] predicts the tokens behind the last n of `ids`; logits [pieces, new] those behind each piece."""
    pieces, ends = spelling.spell(ids)
    start = len(ids) - len(base)
    count = int((ends <= len(logits)).sum()) - start - 1  # tokens whose pieces are all in the text
    if count < 1:
        return
    told = np.arange(start + 1, start + 1 + count)
    log_p = log_softmax(base[:count], "base")
    first = joined(log_p, spelling.first, logits.shape[1])
    rows = ends[told - 1] - 1  # that predict first pieces: where the token before ends
    targets = pieces[rows + 1]
    rest_p = log_p[np.arange(count), ids[told]] - first[np.arange(count), targets]
    rest_q = np.array([_rest(logits, pieces, row + 1, end) for row, end in zip(rows, ends[told], strict=True)])
    comparison.add(first, logits[rows], targets, (-rest_p, -rest_q))


def _rest(logits: Logits, pieces: np.ndarray, start: int, end: int) -> float:
    """ln of the probability of the pieces behind the one at `start`, up to `end`."""
    if start + 1 >= end:
        return 0.0
    log_q = log_softmax(logits[start : end - 1], "new")
    return float(log_q[np.arange(end - start - 1), pieces[start + 1 : end]].sum())
