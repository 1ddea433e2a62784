"""What is known of a model on this machine before formats are chosen: statistics, prices, times."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from dsopt.compiler.cache_reach import Reach, reach_of, states_through
from dsopt.compiler.calibrate import Statistics, calibrate
from dsopt.compiler.chains import Body
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.corpus import HELD
from dsopt.compiler.goal import Goal, rows_of
from dsopt.compiler.head_site import price_head
from dsopt.compiler.judge import Judge
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.knapsack import FLOAT_CACHE, Assignment, Space
from dsopt.compiler.models import kinds_of
from dsopt.compiler.passes.quantize_linears import Evidence
from dsopt.compiler.profile import measure
from dsopt.compiler.pruning.pruned import Pruned
from dsopt.compiler.recipe import Format
from dsopt.compiler.sensitivity import sweep_back
from dsopt.compiler.setting import HERE, Setting
from dsopt.compiler.sites import Pricer, Site, worth_pricing
from dsopt.compiler.stream import BlockStream
from dsopt.runtime.errors import DsoptError

Progress = Callable[[int, int], None]
Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress bar with a label."""

_LEAST = 0.1  # of the budget, for quantization, where pruning alone took more than there is
_SHAPES = 10  # of linear layers that are timed, at most
_DIFFERING = 0.03  # of attention and norms, between two measurements
_REACHING = 8  # windows whose keys and values are looked at


@dataclass(frozen=True)
class NarrowCache:
    """A cache in int8: what it loses in nats a token, and the reach of each layer's keys and values."""

    loss: float
    reach: list[Reach]


@dataclass(frozen=True)
class Study:
    """All that is known of a model on this machine before anything is chosen. `fixed`: bytes of an artifact's graph and
    weights that no choice changes."""

    statistics: Statistics
    sites: list[Site]
    table: KernelTable
    judge: Judge
    setting: Setting
    fixed: int
    pruned: Pruned | None = None
    lost: Mapping[str, float] = field(default_factory=dict)  # by pruning alone, as `judge` finds
    narrow: NarrowCache | None = None  # where it is faster

    def space(self, goal: Goal) -> Space:
        """What can be chosen, by what it takes of the goal's workload."""
        return Space.of(self.sites, self.table, goal.workload, self._caches(goal))

    def evidence(self) -> Evidence:
        """What GPTQ rounds the weights of each module by."""
        site_of = {module: site for site in self.sites for module in site.modules}

        @lru_cache(maxsize=4)
        def gram(first: str) -> torch.Tensor:
            return self.statistics.input(first).weighted(site_of[first].sink)

        return lambda module: gram(site_of[module].name)

    def _caches(self, goal: Goal) -> Sequence[Assignment]:
        if self.narrow is None:
            return FLOAT_CACHE
        spared = _spared(self.table, goal, len(self.narrow.reach))
        nbytes = sum(4 * part.size for reach in self.narrow.reach for part in reach.steps())
        return [*FLOAT_CACHE, Assignment({}, self.narrow.loss, -spared, nbytes, "int8")]

    def taken(self, goal: Goal) -> float:
        """What pruning took of the budget."""
        return max(0.0, self.lost.get(goal.quantity, 0.0))

    def left(self, goal: Goal) -> Goal:
        """For quantization, of loss and size. Where pruning alone loses more than allowed, and may: a little."""
        left, size = goal.loss - self.taken(goal), None if goal.size is None else goal.size - self.fixed
        return replace(goal, loss=left if left > 0 else _LEAST * goal.loss, size=size)


def no_stage(_label: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total: None)


def study(
    checkpoint: Checkpoint,
    windows: np.ndarray,
    goal: Goal,
    stage: Stage = no_stage,
    setting: Setting = HERE,
    pruned: Pruned | None = None,
    *,
    allow_miss: bool = False,
) -> Study:
    """Statistics, prices and times. `windows` int64 [windows, tokens]: the first SAMPLE are priced on, the last HELD
    are kept for judging.

    What is `pruned` is studied as it is left, and judged against what it was. Raises DsoptError where that alone loses
    more than the goal allows, unless `allow_miss`.
    """
    judge, lost = None, dict[str, float]()
    if pruned:
        with stage("running the whole model") as progress:
            judge = Judge.of(BlockStream(pruned.whole), windows[-HELD:], pruned.spelling, progress)
        with stage("running what is left") as progress:
            lost = _judge_pruning(judge, BlockStream(pruned.cut), goal, progress, allow_miss=allow_miss)
        checkpoint, windows = pruned.cut, pruned.spelling.windows(windows) if pruned.spelling else windows
    stream = BlockStream(checkpoint)
    config = stream.config
    with stage("calibrating") as progress:
        statistics = calibrate(stream, windows, HELD, progress)
    head = stream.head()
    judge = judge or Judge(*statistics.held_out(), head)
    arithmetic = worth_pricing(setting.arithmetic, goal.loss, is_small=goal.size is not None)
    pricer = Pricer(checkpoint, statistics, None if config.norms_values else config.head_dim, arithmetic)
    with stage("pricing errors") as progress:
        gradient = sweep_back(stream, statistics.hidden, pricer, progress=progress)
    with torch.no_grad():
        sites = [
            *pricer.sites,
            price_head(checkpoint, head, statistics, arithmetic, gradient, stream.head_weight),
        ]
    with stage("timing kernels") as progress:
        table = setting.table or _table(sites, config, goal, setting, progress)
    narrow = None
    # Not by the times of another model's attention, and not where layers without attention have no keys to look at.
    if setting.table is None and pruned is None and _is_worth_it(table, goal, stream.depth):
        with stage("pricing a cache in 8 bits") as progress:
            narrow = _narrow_cache(stream, statistics, judge, progress)
    fixed = _fixed_bytes(checkpoint, config, table.float_bytes, len(sites))
    return Study(statistics, sites, table, judge, setting, fixed, pruned, lost, narrow)


def _fixed_bytes(checkpoint: Checkpoint, config: Any, width: int, sites: int) -> int:
    """Of norms, rotary tables, the graph itself; `width` is that of a float."""
    norms = sum(width * tensor.shape[0] for tensor in checkpoint.tensors.values() if len(tensor.shape) == 1)
    tables = sum(width * kind.max_position_embeddings * kind.head_dim for kind in kinds_of(config))
    return norms + tables + 2500 * sites + (1 << 16)


def _spared(table: KernelTable, goal: Goal, depth: int) -> float:
    """Seconds of the workload in `depth` layers that a cache in int8 spares; less than 0 where it is the slower one."""
    if not table.narrow_bodies:
        return 0.0
    runs = rows_of(goal.workload, table.target).items()
    return depth * sum(count * (table.other(rows) - table.other(rows, "int8")) for rows, count in runs)


def _is_worth_it(table: KernelTable, goal: Goal, depth: int) -> bool:
    """Whether a cache in int8 spares more of attention's time than two measurements differ by."""
    runs = rows_of(goal.workload, table.target).items()
    spared = _spared(table, goal, depth)
    return spared > _DIFFERING * depth * sum(count * table.other(rows) for rows, count in runs)


def _narrow_cache(stream: BlockStream, statistics: Statistics, judge: Judge, progress: Progress) -> NarrowCache:
    """By the divergence itself, on the text held out: keys and values of all layers are rounded together."""
    reach = reach_of(stream, statistics.windows[: -statistics.held][:_REACHING])
    states, head = states_through(stream, reach, judge.windows), stream.head()
    with torch.inference_mode():
        lost = judge.compare((head(window).numpy() for window in states), progress)
    return NarrowCache(max(lost["kld_mean"], 0.0), reach)


def _judge_pruning(
    judge: Judge, cut: BlockStream, goal: Goal, progress: Progress, *, allow_miss: bool
) -> dict[str, float]:
    """Before anything is learnt of the smaller model, which takes several times as long."""
    states, head = cut.run(judge.texts(), progress), cut.head()
    with torch.inference_mode():
        lost = judge.compare(head(window).numpy() for window in states)
    if lost[goal.quantity] >= goal.loss and not allow_miss:
        raise DsoptError(
            f"--prune alone loses {goal.said(lost[goal.quantity])}, --max-quality-loss allows {goal.budget}; prune "
            "less, allow more, or keep it with --allow-miss"
        )
    return lost


def _table(sites: list[Site], config: Any, goal: Goal, setting: Setting, progress: Progress) -> KernelTable:
    """Of each shape the formats that are chosen among there."""
    by_shape: dict[tuple[int, int], dict[Format, None]] = {}
    for site in sites:
        by_shape.setdefault((site.n, site.k), {}).update(dict.fromkeys(choice.format for choice in site.prices))
    shapes = _some(sorted(by_shape, key=lambda shape: shape[0] * shape[1]))
    # Kernels that take four rows at a time read their weights twice for five: no line from four to eight shows it.
    rows = sorted({1, 5, 8, 128, *rows_of(goal.workload, setting.target)})
    first = config.layer(0)  # where layers differ, most are like it
    heads, kv_heads = first.num_attention_heads, first.num_key_value_heads
    body = Body(config.hidden_size, config.intermediate_size, heads, kv_heads, first.head_dim)
    # A card's times with such a cache depend on what is captured with it; `cache=int8` in a recipe asks for it there.
    caches = ("float", "int8") if setting.target == "cpu" else ("float",)
    return measure(
        {shape: list(by_shape[shape]) for shape in shapes},
        rows,
        target=setting.target,
        dtype=setting.dtype,
        body=body,
        caches=caches,
        progress=progress,
    )


def _some(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of very many, as pruned layers may have, enough to tell the times of the others by."""
    places = np.linspace(0, len(shapes) - 1, min(len(shapes), _SHAPES)).round().astype(int)
    return [shapes[place] for place in places]
