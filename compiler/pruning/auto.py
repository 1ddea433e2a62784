"""`--prune auto:1.15`: what to remove so that a step of one token is so much faster, at the least loss.

Two things are for sale, each by its exchange rate: rows of the head, if a text says which tokens are needed, and single
attention or feed-forward blocks. Blocks go one by one, the cheapest for its time first, and what is still missing is
taken from the head; of all these mixtures the one with the least loss wins. Times are of this machine's kernel table;
losses are measured for blocks, before the repair, and counted for tokens. Feed-forward channels are not for sale: on a
long-trained model the repair keeps less than the estimates promise.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsopt.compiler.chains import Body
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.profile import measure
from dsopt.compiler.pruning.depth import choose_removals
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.pruning.sensitivity import measure_sensitivity
from dsopt.compiler.pruning.stream import Stream, Sublayer
from dsopt.compiler.pruning.vocabulary import MULTIPLE, Ranking, Vocabulary, rank_tokens
from dsopt.compiler.recipe import HEAD, Recipe
from dsopt.compiler.self_text import Windows
from dsopt.runtime.errors import DsoptError

Report = Callable[[str], None]
_PIECES = 6.0  # nats that each piece costs which a token has more; measured on SmolLM2-135M, see the README
_ATTENTION = 2 / 3  # attention's part of a block's time outside its linear layers
_SCORED = 1024  # tokens on which blocks are judged


@dataclass(frozen=True)
class Times:
    """Seconds of a step of one token: of an attention block, a feed-forward block, and a row of the head."""

    attention: float
    mlp: float
    row: float

    def of(self, sublayer: Sublayer) -> float:
        return self.mlp if sublayer.mlp else self.attention

    def step(self, config: Any) -> float:
        """Of the whole model."""
        return float(config.num_hidden_layers * (self.attention + self.mlp) + config.vocab_size * self.row)


def measure_times(config: Any, recipe: Recipe, target: str) -> Times:
    """From the kernel table of this machine, which is measured where it is not known."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    body = Body(hidden, inner, heads, groups, head)
    attention = [("q", (heads + 2 * groups) * head, hidden), ("o", hidden, heads * head)]
    mlp = [("gate", 2 * inner, hidden), ("down", hidden, inner)]  # what reads the same input is one call
    linears = [*attention, *mlp, ("head", config.vocab_size, hidden)]
    forms = {role: recipe.format(role, HEAD if role == "head" else "") for role, _, _ in linears}
    shapes = [(n, k) for _, n, k in linears]
    table = measure(shapes, (1,), forms.values(), target, dtype=recipe.dtype, body=body)
    return _times(table, forms, attention, mlp, linears[-1])


def _times(
    table: KernelTable, forms: Any, attention: Sequence[Any], mlp: Sequence[Any], head: tuple[str, int, int]
) -> Times:
    def linear(role: str, n: int, k: int) -> float:
        return table.time(n, k, forms[role], 1)

    return Times(
        sum(linear(*layer) for layer in attention) + _ATTENTION * table.other(1),
        sum(linear(*layer) for layer in mlp) + (1 - _ATTENTION) * table.other(1),
        linear(*head) / head[1],
    )


@dataclass(frozen=True)
class Choice:
    """removed: blocks that go. vocabulary: what stays of the tokens, None for all. steps: as in `Cuts`."""

    removed: frozenset[Sublayer]
    vocabulary: Vocabulary | None
    steps: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Mixture:
    gone: tuple[Sublayer, ...] = ()
    lost: tuple[float, ...] = ()  # nats, with each of them gone too
    tokens: int | None = None
    loss: float = math.inf  # in all


def choose(
    checkpoint: Checkpoint,
    pruning: Pruning,
    times: Times,
    windows: Windows,
    report: Report = lambda line: None,
) -> Choice:
    """Raises DsoptError where no mixture is as fast as asked."""
    stream = Stream(checkpoint)
    ranking = None
    if pruning.vocab:
        report("choosing tokens")
        ranking = rank_tokens(checkpoint.files["tokenizer.json"], pruning.read_corpus())
    report("choosing blocks to remove")
    best = _cheapest(stream, pruning, times, stream.embed(windows), ranking)
    if best.loss == math.inf:
        raise DsoptError(
            f"--prune {pruning.text}: nothing that can go makes a step {pruning.auto:g} x as fast; ask for less"
            f"{'' if ranking else ', or name a text of its use with vocab=FILE'}"
        )
    return _described(best, ranking, times, stream.config, report)


def _cheapest(stream: Stream, pruning: Pruning, times: Times, x: Any, ranking: Ranking | None) -> _Mixture:
    config = stream.config
    wanted = times.step(config) * (1 - 1 / pruning.auto)
    x = x[: max(1, _SCORED // x.shape[1])]
    best = now = _with_tokens(_Mixture(), wanted, times, config, ranking)
    felt, dense = measure_sensitivity(stream, x)
    estimates = {sublayer: found.removal for sublayer, found in felt.items()}
    freed, most = 0.0, 2 * config.num_hidden_layers - 2  # a layer's worth must stay
    while freed < wanted and len(now.gone) < most:
        before = now.lost[-1] if now.lost else 0.0
        chosen, lost = choose_removals(
            stream, x, dense, estimates, 1, whole=False, removed=frozenset(now.gone), weigh=times.of, before=before
        )
        (sublayer,) = chosen[0]
        freed += times.of(sublayer)
        now = _Mixture((*now.gone, sublayer), (*now.lost, lost))
        if lost >= best.loss:
            break  # what follows costs more still
        now = _with_tokens(now, wanted - freed, times, config, ranking)
        best = min(best, now, key=lambda mixture: mixture.loss)
    return best


def _with_tokens(made: _Mixture, missing: float, times: Times, config: Any, ranking: Ranking | None) -> _Mixture:
    """With as few tokens gone as make up for the time still missing, but those that nobody needs."""
    lost = made.lost[-1] if made.lost else 0.0
    if ranking is None:
        return dataclasses.replace(made, loss=lost if missing <= 0 else math.inf)
    size = int((config.vocab_size - max(0.0, missing) / times.row) // MULTIPLE * MULTIPLE)
    size = min(size, int(ranking.take().record["tokens"]))
    if size < ranking.least:
        return made
    return dataclasses.replace(made, tokens=size, loss=lost + _PIECES * float(ranking.left[size]))


def _described(made: _Mixture, ranking: Ranking | None, times: Times, config: Any, report: Report) -> Choice:
    """Tells of each removal what it costs for what it frees."""
    step, before = times.step(config), 0.0
    for sublayer, lost in zip(made.gone, made.lost, strict=True):
        report(_rate(f"without {sublayer}", times.of(sublayer) / step, lost - before))
        before = lost
    steps: dict[str, dict[str, Any]] = {}
    if made.gone:
        share = sum(map(times.of, made.gone)) / step
        steps["blocks"] = {"removed": [str(s) for s in made.gone], "kld": made.lost[-1], "time": share}
    vocabulary = None
    if ranking is not None:
        vocabulary = ranking.take(made.tokens)
        share = (config.vocab_size - len(vocabulary.kept)) * times.row / step
        record = {**vocabulary.record, "time": share, "kld": made.loss - before}
        vocabulary = dataclasses.replace(vocabulary, record=record)
        report(_rate(f"with {record['tokens']} of {record['of']} tokens", share, record["kld"]))
    return Choice(frozenset(made.gone), vocabulary, steps)


def _rate(what: str, share: float, nats: float) -> str:
    price = f"{nats / (100 * share):.4f}" if share else "-"
    return f"{what}: {100 * share:.1f} % of a step's time for about {nats:.3f} nats ({price} a per cent)"
