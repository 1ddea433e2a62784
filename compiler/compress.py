"""From a checkpoint and a goal to the artifact that meets it: calibrate, price, time, choose, build, measure."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsopt.compiler import build, package
from dsopt.compiler.calibrate import Statistics, calibrate
from dsopt.compiler.chains import Body
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.corpus import HELD
from dsopt.compiler.judge import Judge
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.models import kinds_of
from dsopt.compiler.passes.quantize_linears import is_exact
from dsopt.compiler.profile import measure
from dsopt.compiler.pruning.options import NOTHING
from dsopt.compiler.pruning.pruned import Pruned
from dsopt.compiler.recipe import HEAD, Format, Recipe
from dsopt.compiler.search import (
    Assignment,
    Goal,
    Option,
    Round,
    formats_of,
    options,
    pareto,
    price_option,
    rows_of,
    search,
    solve,
)
from dsopt.compiler.sensitivity import sweep_back
from dsopt.compiler.setting import HERE, Setting
from dsopt.compiler.sites import Pricer, Site, price_head
from dsopt.compiler.stream import BlockStream
from dsopt.runtime.artifact import Manifest, open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.quality import session_scorer
from dsopt.runtime.session import Session

Progress = Callable[[int, int], None]
Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress bar with a label."""

_LEAST = 0.1  # of the budget, for quantization, where pruning alone took more than there is
_SHAPES = 10  # of linear layers that are timed, at most


@dataclass(frozen=True)
class Study:
    """All that is known of a model on this machine before anything is chosen."""

    statistics: Statistics
    sites: list[Site]
    table: KernelTable
    judge: Judge
    setting: Setting
    pruned: Pruned | None = None
    lost: Mapping[str, float] = field(default_factory=dict)  # by pruning alone, as `judge` finds

    def options(self, goal: Goal) -> list[list[Option]]:
        return options(self.sites, self.table, goal.workload)

    def taken(self, goal: Goal) -> float:
        """What pruning took of the budget."""
        return max(0.0, self.lost.get(goal.quantity, 0.0))

    def left(self, goal: Goal) -> Goal:
        """For quantization. Where pruning alone loses more than allowed, and may: a little."""
        left = goal.loss - self.taken(goal)
        return replace(goal, loss=left if left > 0 else _LEAST * goal.loss)


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
    """Statistics, prices and times. `windows` int64 [windows, tokens]; the last HELD are kept for judging.

    What is `pruned` is studied as it is left, and judged against what it was. Raises DsoptError where that alone loses
    more than the goal allows, unless `allow_miss`.
    """
    judge, lost = None, dict[str, float]()
    if pruned:
        with stage("running the whole model") as progress:
            judge = Judge.of(BlockStream(pruned.whole), windows[-HELD:], pruned.spelling, progress)
        checkpoint, windows = pruned.cut, pruned.spelling.windows(windows) if pruned.spelling else windows
    stream = BlockStream(checkpoint)
    config = stream.config
    with stage("calibrating") as progress:
        statistics = calibrate(stream, windows, HELD, progress)
    head = stream.head()
    if judge:
        lost = _judge_pruning(judge, statistics, head, goal, allow_miss=allow_miss)
    judge = judge or Judge(*statistics.held_out(), head)
    pricer = Pricer(checkpoint, statistics, None if config.norms_values else config.head_dim, setting.arithmetic)
    with stage("pricing errors") as progress:
        gradient = sweep_back(stream, statistics.hidden, pricer, progress=progress)
    with torch.no_grad():
        sites = [
            *pricer.sites,
            price_head(checkpoint, head, statistics, setting.arithmetic, gradient, stream.head_weight),
        ]
    with stage("timing kernels") as progress:
        table = setting.table or _table(sites, config, goal, setting, progress)
    return Study(statistics, sites, table, judge, setting, pruned, lost)


def _judge_pruning(
    judge: Judge, statistics: Statistics, head: torch.nn.Module, goal: Goal, *, allow_miss: bool
) -> dict[str, float]:
    with torch.inference_mode():
        lost = judge.compare(head(states).numpy() for states in statistics.held_out()[1])
    if lost[goal.quantity] >= goal.loss and not allow_miss:
        raise DsoptError(
            f"--prune alone loses {lost[goal.quantity]:.4f} nats, --max-quality-loss allows {goal.loss:.4g}; prune "
            "less, allow more, or keep it with --allow-miss"
        )
    return lost


def _table(sites: list[Site], config: Any, goal: Goal, setting: Setting, progress: Progress) -> KernelTable:
    shapes = _some(sorted({(site.n, site.k) for site in sites}, key=lambda shape: shape[0] * shape[1]))
    # Kernels that take four rows at a time read their weights twice for five: no line from four to eight shows it.
    rows = sorted({1, 5, 8, 128, *rows_of(goal.workload, setting.target)})
    first = config.layer(0)  # where layers differ, most are like it
    heads, kv_heads = first.num_attention_heads, first.num_key_value_heads
    body = Body(config.hidden_size, config.intermediate_size, heads, kv_heads, first.head_dim)
    forms = list(dict.fromkeys(choice.format for site in sites for choice in site.prices))
    return measure(shapes, rows, forms, target=setting.target, dtype=setting.dtype, body=body, progress=progress)


def _some(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of very many, as pruned layers may have, enough to tell the times of the others by."""
    places = np.linspace(0, len(shapes) - 1, min(len(shapes), _SHAPES)).round().astype(int)
    return [shapes[place] for place in places]


def compress(
    checkpoint: Checkpoint,
    found: Study,
    goal: Goal,
    out: Path,
    text: str,
    *,
    allow_miss: bool = False,
    stage: Stage = no_stage,
    report: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Search, and put the best artifact at `out`; `text` is what its manifest calls the recipe.

    Raises DsoptError where no build kept the budget, unless `allow_miss`: then the one that came nearest is kept.
    """
    with package.scratch(out) as folder:
        builds: dict[int, tuple[Path, dict[str, float]]] = {}  # by identity: a choice is a dict

        def try_out(made: Assignment) -> float:
            place = folder / str(len(builds))
            _build(checkpoint, found, made, place, text, stage)
            with stage("measuring the loss") as progress:
                quality = judge(found, place, progress)
            builds[id(made)] = place, quality
            loss = quality[goal.quantity]
            report(_said(made, loss, taken, place))
            return loss - taken

        taken, left = found.taken(goal), found.left(goal)
        size = goal.size and goal.size - _fixed_bytes(checkpoint, found)
        if found.pruned:
            report(f"pruning took {taken:.4f} of {goal.loss:.4g} nats")
        best, rounds = search(found.sites, found.options(goal), replace(left, size=size), try_out)
        if best is None and not allow_miss:
            nearest = min(rounds, key=lambda r: r.measured)
            raise DsoptError(
                f"the loss of the best of {len(rounds)} builds is {nearest.measured + taken:.4f} nats, more than "
                f"{goal.loss:g}; raise --max-quality-loss, or keep it with --allow-miss"
            )
        best = best or min(rounds, key=lambda r: r.measured)
        rotated = rotated_sites(found.pruned.cut if found.pruned else checkpoint, found.sites, best.assignment)
        return _take(*builds[id(best.assignment)], out, found, goal, best, rounds, text, rotated)


def preview(found: Study, goal: Goal) -> dict[str, Any]:
    """What a search would build first, by its estimates, choice by choice; and the other points of the curve."""
    offered, taken = found.options(goal), found.taken(goal)
    made = solve(found.sites, offered, found.left(goal).loss, goal.size)
    first = made and _point(made, taken) | {"choices": {name: str(choice) for name, choice in made.choices.items()}}
    return {
        "goal": dataclasses.asdict(goal),
        **({"pruning": {**found.pruned.facts(), "loss": taken}} if found.pruned else {}),
        "first": first,
        "pareto": [_point(point, taken) for point in pareto(found.sites, offered)],
    }


def _said(made: Assignment, loss: float, taken: float, place: Path) -> str:
    size = open_artifact(place).size / 1e6
    counts = ", ".join(f"{count} {form}" for form, count in _counted(made).items())
    return f"{size:.1f} MB, loss {loss:.4f} nats (expected {made.loss + taken:.4f}): {counts}"


def _counted(made: Assignment) -> dict[str, int]:
    forms = [str(choice.format) for choice in made.choices.values()]
    return {form: forms.count(form) for form in dict.fromkeys(forms)}


def _build(checkpoint: Checkpoint, found: Study, made: Assignment, out: Path, text: str, stage: Stage) -> None:
    recipe = Recipe(text, Format("nbits", 8, 32), modules=formats_of(found.sites, made), dtype=found.setting.dtype)
    scales = {
        site.name: site.scales[alpha] for site in found.sites if (alpha := made.choices[site.name].alpha) is not None
    }
    evidence = found.statistics.input
    rotated = rotated_sites(found.pruned.cut if found.pruned else checkpoint, found.sites, made)
    plan = build.plan(
        checkpoint,
        recipe,
        found.pruned or NOTHING,
        target=found.setting.target,
        evidence=evidence,
        smoothing=scales,
        rotated=rotated,
    )
    with stage("writing weights") as progress:
        build.write(plan, out, progress=progress)


def rotated_sites(checkpoint: Checkpoint, sites: list[Site], made: Assignment) -> frozenset[str]:
    """Those chosen to be rotated, where the values' weights are rounded anyway: codes of a file, as they are, stay."""
    chosen = {site.name for site in sites if made.choices[site.name].rotated}
    values = {name: f"{name.removesuffix('o_proj')}v_proj" for name in chosen}
    forms = formats_of(sites, made)
    exact = {o for o, v in values.items() if is_exact(checkpoint.tensors[f"{v}.weight"], forms[v])}
    return frozenset(chosen - exact)


def judge(found: Study, directory: Path, progress: Progress = lambda done, total: None) -> dict[str, float]:
    """The quantities of `dsopt compare` on the windows held out, against the whole model in float32."""
    score = session_scorer(Session(open_artifact(directory), device=found.setting.device))
    return found.judge.compare((score(ids, len(ids)) for ids in found.judge.texts()), progress)


def _take(
    place: Path,
    quality: Mapping[str, float],
    out: Path,
    found: Study,
    goal: Goal,
    best: Round,
    rounds: list[Round],
    text: str,
    rotated: Set[str],
) -> Manifest:
    """Complete the manifest, and let the build take its place."""
    made = open_artifact(place).manifest
    kept = ("tokens", "kld_mean", "kld_mean_err", "kld_p99", "ppl_ratio", "ppl_ratio_err", "same_top_p")
    manifest = replace(
        made,
        recipe=text,
        nodes=tuple(_described(made.nodes, found.sites, best.assignment, rotated)),
        quality={name: quality[name] for name in kept},
        profile=found.table.to_json(),
        search=_record(found, goal, best, rounds),
    )
    with package.written_aside(out) as aside:
        for name in manifest.files:
            (place / name).rename(aside / name)
        package.seal(aside, manifest)
    package.remember_hashes(out, manifest.files)
    return manifest


def _described(
    nodes: tuple[Mapping[str, Any], ...], sites: list[Site], made: Assignment, rotated: Set[str]
) -> Iterator[Mapping[str, Any]]:
    """Each node with what was chosen for its site and what that is expected to cost."""
    sites_by_module = {module: site for site in sites for module in site.modules}
    for node in nodes:
        site = sites_by_module.get(HEAD if node["role"] == "head" else node["name"])
        if site is None or node["role"] == "embed":
            yield node
            continue
        choice = dataclasses.replace(made.choices[site.name], rotated=site.name in rotated)
        yield {
            **node,
            "smoothing": choice.alpha,
            "rotated": choice.rotated,
            "site": site.name,
            "loss": site.prices[choice],
        }


def _record(found: Study, goal: Goal, best: Round, rounds: list[Round]) -> dict[str, Any]:
    curve, taken = pareto(found.sites, found.options(goal)), found.taken(goal)
    return {
        "goal": dataclasses.asdict(goal),
        "pruned": taken,
        "rounds": [_point(r.assignment, taken) | {"measured": r.measured + taken, "chosen": r is best} for r in rounds],
        "pareto": [_point(made, taken) for made in curve],
        "uniform": {
            str(replace(kind, block=32)): _point(made, taken)
            for kind in dict.fromkeys(_kind(choice.format) for site in found.sites for choice in site.prices)
            if (made := _uniform(found, goal, kind)) is not None
        },
    }


def _point(made: Assignment, taken: float) -> dict[str, Any]:
    """`taken` by pruning, before any format was chosen."""
    return {"loss": made.loss + taken, "seconds": made.seconds, "bytes": made.nbytes, "formats": _counted(made)}


def _uniform(found: Study, goal: Goal, form: Format) -> Assignment | None:
    """The fixed recipe: one kind of format everywhere, in the fastest blocks, unsmoothed; the head's is 8 bits where it
    has not that kind."""
    picked: list[Option] = []
    for site in found.sites:
        plain = [price_option(site, c, found.table, goal.workload) for c in site.prices if c.alpha is None]
        same = [option for option in plain if _kind(option.choice.format) == _kind(form)]
        if not same and site.layer is None:
            same = [option for option in plain if option.choice.format.bits == 8]
        if not same:
            return None
        picked.append(min(same, key=lambda option: option.seconds))
    return Assignment(
        {site.name: option.choice for site, option in zip(found.sites, picked, strict=True)},
        sum(option.loss for option in picked),
        sum(option.seconds for option in picked),
        sum(option.nbytes for option in picked),
    )


def _kind(form: Format) -> Format:
    """The format but for the size of its blocks."""
    return replace(form, block=0)


def _fixed_bytes(checkpoint: Checkpoint, found: Study) -> int:
    """Of an artifact's graph and weights, what no choice changes: norms, rotary tables, the graph itself."""
    config = BlockStream(checkpoint).config
    width = found.table.float_bytes
    norms = sum(width * tensor.shape[0] for tensor in checkpoint.tensors.values() if len(tensor.shape) == 1)
    tables = sum(width * kind.max_position_embeddings * kind.head_dim for kind in kinds_of(config))
    return norms + tables + 2500 * len(found.sites) + (1 << 16)
