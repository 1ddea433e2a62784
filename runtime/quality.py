"""Quality of a model against another: the quantities of llama.cpp's `llama-perplexity --kl-divergence`.

Text is cut into windows; of each only the second half is scored, so that every prediction has at least half
a window of context. Logits come a window at a time and are reduced at once, in float64, to five numbers a
token.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.session import PREFILL_CHUNK, Session

Floats = NDArray[np.float64]
Scorer = Callable[[NDArray[np.int64], int], NDArray[np.float32]]
"""Token ids [n], in an empty context, and a number r -> logits float32 [r, vocab] of the last r tokens."""

PERCENTILES = {
    "p999": 99.9, "p99": 99, "p95": 95, "p90": 90, "p75": 75, "median": 50,
    "p25": 25, "p10": 10, "p05": 5, "p01": 1, "p001": 0.1,
}  # fmt: skip
_BLOCK = 1 << 20  # logits reduced at a time: a float64 temporary of 8 MB


def cut_windows(ids: Sequence[int], size: int, limit: int | None = None) -> list[NDArray[np.int64]]:
    """The first `limit` windows of `size` ids, one after the other; a shorter rest is left out."""
    count = len(ids) // size if limit is None else min(limit, len(ids) // size)
    return list(np.asarray(ids[: count * size], np.int64).reshape(count, size))


def session_scorer(session: Session) -> Scorer:
    """An artifact's logits, in chunks as prefill runs them."""
    binding = session.bind(session.new_cache())

    def score(ids: NDArray[np.int64], rows: int) -> NDArray[np.float32]:
        binding.cache.trim(0)
        parts = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            wanted = min(len(chunk), start + len(chunk) - (len(ids) - rows))
            logits = binding.run(chunk, max(wanted, 1))
            if wanted > 0:
                parts.append(logits.copy())
        return np.concatenate(parts)

    return score


def compare_models(
    base: Scorer,
    new: Scorer,
    windows: Iterable[NDArray[np.int64]],
    tick: Callable[[], None] = lambda: None,
) -> "Comparison":
    """Run both over each window of n ids; score rows n // 2 - 1 to n - 2, which predict ids n // 2 to n - 1.

    `tick()` is called after each window. Raises DsoptError where the vocabularies differ or logits are not
    finite.
    """
    comparison = Comparison()
    for ids in windows:
        half = len(ids) // 2
        rows = len(ids) - half + 1
        comparison.add(base(ids, rows)[:-1], new(ids, rows)[:-1], ids[half:])
        tick()
    return comparison


@dataclass(frozen=True)
class TextModel:
    """A model asked about text: `encode` and `score` belong together."""

    encode: Callable[[str], Sequence[int]]
    score: Scorer


def compare_texts(
    base: TextModel,
    new: TextModel,
    pieces: Iterable[tuple[str, str]],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """How well two models, whatever their tokens, predict the second text of each piece after the first.

    Probabilities of whole texts are compared, since tokens cannot be: in bits a byte of UTF-8, and as `ppl_ratio` by
    token of the *base* model, which is what `compare_models` calls so where the tokens are the same.
    """
    rows = []
    for context, scored in pieces:
        one, other = (_text_loss(model, context, scored) for model in (base, new))
        rows.append((len(scored.encode()), *one, *other))
        tick()
    assert rows, "nothing was scored"
    nbytes, nll_base, tokens_base, nll_new, tokens_new = np.array(rows, np.float64).T
    total, bits = nbytes.sum(), np.log(2) * nbytes.sum()
    log_ratio = (nll_new - nll_base).sum() / tokens_base.sum()
    error = len(rows) ** 0.5 * (nll_new - nll_base).std(ddof=1) / tokens_base.sum() if len(rows) > 1 else 0.0
    return {
        "bytes": int(total),
        "tokens_base": int(tokens_base.sum()),
        "tokens_new": int(tokens_new.sum()),
        "bits_per_byte_base": float(nll_base.sum() / bits),
        "bits_per_byte_new": float(nll_new.sum() / bits),
        **_named("ln_ppl_ratio", log_ratio, error),
        **_named("ppl_ratio", np.exp(log_ratio), np.exp(log_ratio) * error),
    }


def _text_loss(model: TextModel, context: str, scored: str) -> tuple[float, int]:
    """(-ln p(scored | context), tokens of `scored`)."""
    before, ids = model.encode(context), np.asarray(model.encode(scored), np.int64)
    logits = model.score(np.concatenate([np.asarray(before, np.int64), ids]), len(ids) + 1)[:-1]
    step = max(1, _BLOCK // logits.shape[-1])
    loss = 0.0
    for start in range(0, len(ids), step):
        logs = log_softmax(logits[start : start + step], "one")
        loss -= float(logs[np.arange(len(logs)), ids[start : start + step]].sum())
    return loss, len(ids)


@dataclass
class Comparison:
    """What is kept of each scored token: 41 bytes. `add` blocks of logits, then take the `summary`."""

    _parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def add(
        self,
        base: NDArray[np.floating[Any]],
        new: NDArray[np.floating[Any]],
        targets: NDArray[np.int64],
        rest: tuple[Floats, Floats] | None = None,
    ) -> None:
        """Score rows of logits [n, vocab] of both models, each predicting its entry of `targets` [n].

        `rest`: where targets are but the beginnings of what is predicted, -ln p [n] of all that follows, in both.
        """
        if base.shape != new.shape:
            raise DsoptError(
                f"the vocabularies differ: {base.shape[-1]} tokens against {new.shape[-1]}; "
                "compare versions of one model"
            )
        step = max(1, _BLOCK // base.shape[-1])
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            scores = _score(base[rows], new[rows], targets[rows])
            if rest is not None:
                one, other = rest[0][rows], rest[1][rows]
                for name, more in (("nll_base", one), ("nll_new", other), ("kld", other - one)):
                    scores[name] = scores[name] + more
            for name, values in scores.items():
                self._parts.setdefault(name, []).append(values)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A number for each token scored so far.

        `kld` KL(base || new) in nats, `nll_base` and `nll_new` -ln p of the target, `dp` p_new - p_base of
        the target, `same_top` whether both find the same token most likely.
        """
        return np.concatenate(self._parts[name])

    @property
    def tokens(self) -> int:
        """Scored so far."""
        return sum(map(len, self._parts.get("kld", [])))

    def summary(self) -> dict[str, float]:
        """All quantities by name; `X_err` is the standard error of X, taking tokens as independent.

        `kld_*` in nats, `dp_*` (of the right token's probability) and `same_top_p` in percent.
        """
        assert self.tokens, "nothing was scored"
        kld, dp = self["kld"], 100 * self["dp"]
        return {
            "tokens": self.tokens,
            **_perplexities(self["nll_base"], self["nll_new"]),
            **_named("kld_mean", *_mean(kld)),
            **_spread("kld", kld),
            **_named("dp_mean", *_mean(dp)),
            **_named("dp_rms", *_root_mean_square(dp)),
            **_spread("dp", dp),
            **_named("same_top_p", *_percentage(self["same_top"])),
        }


def _score(base: NDArray[np.float32], new: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    log_base, log_new = log_softmax(base, "base"), log_softmax(new, "new")
    p = np.exp(log_base)
    with np.errstate(invalid="ignore"):  # -inf - -inf where neither gives the token a chance
        kld = np.multiply(p, log_base - log_new, where=p > 0, out=np.zeros_like(p)).sum(-1)
    at = (np.arange(len(targets)), targets)
    return {
        "kld": np.maximum(kld, 0),  # it cannot be negative, its rounding can: -1e-17
        "nll_base": -log_base[at],
        "nll_new": -log_new[at],
        "dp": np.exp(log_new[at]) - p[at],
        "same_top": base.argmax(-1) == new.argmax(-1),
    }


def log_softmax(logits: NDArray[np.floating[Any]], which: str) -> Floats:
    """Of rows [n, vocab]. Raises DsoptError, naming the model by `which`, where logits are not finite."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf, reported below
        shifted -= shifted.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1, keepdims=True))
    if not np.isfinite(total).all():
        raise DsoptError(f"the {which} model gives logits that are not finite")
    shifted -= total
    return shifted


def _perplexities(base: Floats, new: Floats) -> dict[str, float]:
    (mean_base, err_base), (mean_new, err_new), (log_ratio, log_err) = (
        _mean(base),
        _mean(new),
        _mean(new - base),
    )
    ppl_base, ppl_new, ratio = np.exp(mean_base), np.exp(mean_new), np.exp(log_ratio)
    correlated = {}
    if err_base and err_new:  # undefined for a constant
        correlated["ppl_correlation"] = 100 * float(np.corrcoef(base, new)[0, 1])
    return {
        **_named("ppl_base", ppl_base, ppl_base * err_base),
        **_named("ppl_new", ppl_new, ppl_new * err_new),
        **correlated,
        **_named("ln_ppl_ratio", log_ratio, log_err),
        **_named("ppl_ratio", ratio, ratio * log_err),
        # Linearised in both means, so that what the two share cancels token by token.
        **_named("ppl_diff", ppl_new - ppl_base, _mean(ppl_new * new - ppl_base * base)[1]),
    }


def _named(name: str, value: float, error: float) -> dict[str, float]:
    return {name: float(value), f"{name}_err": float(error)}


def _mean(values: Floats) -> tuple[float, float]:
    """Mean and its standard error, 0 for one value."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / n**0.5) if n > 1 else 0.0


def _root_mean_square(values: Floats) -> tuple[float, float]:
    square, error = _mean(values**2)
    root = square**0.5
    return root, error / (2 * root) if root else 0.0


def _percentage(flags: NDArray[np.bool_]) -> tuple[float, float]:
    """Share in percent and its binomial standard error."""
    p, n = float(flags.mean()), len(flags)
    return 100 * p, 100 * (p * (1 - p) / max(n - 1, 1)) ** 0.5


def _spread(name: str, values: Floats) -> dict[str, float]:
    points = {"max": 100.0, **PERCENTILES, "min": 0.0}
    found = np.percentile(values, list(points.values()))
    return {f"{name}_{point}": float(value) for point, value in zip(points, found, strict=True)}
