"""Which layers or single blocks to remove: those without which the model's predictions change least.

A candidate is judged by what it does: the model is run with its sublayers gated off and compared with the whole model
by KL divergence. All candidates of a round share one pass through the weights, each with hidden states of its own from
where it leaves the others. Rounds are greedy, since neighbours are often each dispensable but not both; after the
first, only the best of the round before are tried again.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dsopt.compiler.pruning.stream import Stream, Sublayer, divergence

Group = frozenset[Sublayer]  # what goes together: the two sublayers of a layer, or one
_FIRST, _AGAIN = 14, 6  # candidates of the first round, of the others; the number still to be removed on top
_ROUNDS = 4  # at most: where much is to go, several leave together


def gated_divergences(stream: Stream, x: Tensor, base: Tensor, removed: Group, groups: Sequence[Group]) -> list[float]:
    """KL(whole || without `removed` and a group) in nats, for each group, which may be empty.

    x [n, s, hidden] is embedded text, base [n, s, hidden] the whole model's last hidden states for it.
    """
    branches: dict[int, Tensor] = {}
    for sublayer in stream.sublayers:
        for number, group in enumerate(groups):
            if sublayer in group:
                branches.setdefault(number, x)
            elif number in branches and sublayer not in removed:
                branches[number] = stream.advance(sublayer, branches[number])
        if sublayer not in removed:
            x = stream.advance(sublayer, x)
    head = stream.head()
    return [divergence(head, base, branches.get(number, x)) for number in range(len(groups))]


def choose_removals(
    stream: Stream,
    x: Tensor,
    base: Tensor,
    estimates: Mapping[Sublayer, float],
    count: int,
    *,
    whole: bool,
    removed: Group = frozenset(),
    weigh: Callable[[Sublayer], float] = lambda sublayer: 1.0,
    before: float = 0.0,
) -> tuple[list[Group], float]:
    """(`count` groups in the order of removal, the divergence without them); layers if `whole`, else sublayers.

    `estimates` say which to try at all. Of sublayers those go that cost least for what `weigh` says they free, beyond
    `before`, the divergence without `removed`.
    """
    layers = range(stream.config.num_hidden_layers)
    groups = [frozenset(Sublayer(layer, mlp) for mlp in (False, True)) for layer in layers]
    if not whole:
        groups = [frozenset({sublayer}) for sublayer in stream.sublayers]
    freed = {group: sum(map(weigh, group)) for group in groups}
    left = [group for group in groups if not group & removed]
    left.sort(key=lambda group: sum(estimates[sublayer] for sublayer in group) / freed[group])
    chosen: list[Group] = []
    left = left[: _FIRST + 2 * count]
    step = -(-count // _ROUNDS)
    while len(chosen) < count:
        found = dict(zip(left, gated_divergences(stream, x, base, removed, left), strict=True))
        left.sort(key=lambda group: (found[group] - before) / freed[group])
        best, left = left[: min(step, count - len(chosen))], left[step:]
        chosen += best
        removed, left = removed.union(*best), left[: _AGAIN + 2 * (count - len(chosen))]
        before = found[best[0]] if len(best) == 1 else gated_divergences(stream, x, base, removed, [frozenset()])[0]
    return chosen, before
