"""From a checkpoint and a goal to the artifact that meets it: calibrate, price, time, choose, build, measure."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from dsopt.compiler import build, package
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.goal import Goal
from dsopt.compiler.knapsack import Assignment, formats_of
from dsopt.compiler.outcome import count_formats, describe_nodes, describe_search
from dsopt.compiler.pruning.options import NOTHING
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.search import Round, search
from dsopt.compiler.study import Progress, Stage, Study, no_stage
from dsopt.runtime.artifact import Manifest, open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.quality import session_scorer
from dsopt.runtime.session import Session


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
            report(_said(made, goal, loss, taken, place))
            return loss - taken

        taken = found.taken(goal)
        if found.pruned:
            report(f"pruning took {goal.said(taken)} of the {goal.budget} allowed")
        best, rounds = search(found.space(goal), found.left(goal), try_out)
        if best and best.measured + taken > goal.loss * (1 + 1e-9):
            best = None  # pruning alone lost more than is allowed: no luck of a build makes up for that
        if best is None and not allow_miss:
            nearest = min(rounds, key=lambda r: r.measured)
            raise DsoptError(
                f"the loss of the best of {len(rounds)} builds is {goal.said(nearest.measured + taken)}, more than "
                f"{goal.budget}; raise --max-quality-loss, or keep it with --allow-miss"
            )
        best = best or min(rounds, key=lambda r: r.measured)
        return _take(*builds[id(best.assignment)], out, found, goal, best, rounds, text)


def _said(made: Assignment, goal: Goal, loss: float, taken: float, place: Path) -> str:
    size = open_artifact(place).size / 1e6
    counts = ", ".join(f"{count} {form}" for form, count in count_formats(made).items())
    cache = ", cache in int8" if made.cache == "int8" else ""
    return f"{size:.1f} MB, loss {goal.said(loss)} (expected {goal.said(made.loss + taken)}): {counts}{cache}"


def _build(checkpoint: Checkpoint, found: Study, made: Assignment, out: Path, text: str, stage: Stage) -> None:
    recipe = Recipe(
        text,
        Format("nbits", 8, 32),
        modules=formats_of(found.sites, made),
        dtype=found.setting.dtype,
        cache=made.cache,
    )
    scales = {
        site.name: site.scales[alpha] for site in found.sites if (alpha := made.choices[site.name].alpha) is not None
    }
    rotated = frozenset(name for name, choice in made.choices.items() if choice.rotated)
    plan = build.plan(
        checkpoint,
        recipe,
        found.pruned or NOTHING,
        target=found.setting.target,
        evidence=found.evidence(),
        smoothing=scales,
        rotated=rotated,
        reach=found.narrow.reach if found.narrow else None,
    )
    with stage("writing weights") as progress:
        build.write(plan, out, progress=progress)


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
) -> Manifest:
    """Complete the manifest, and let the build take its place."""
    made = open_artifact(place).manifest
    kept = ("tokens", "kld_mean", "kld_mean_err", "kld_p99", "ppl_ratio", "ppl_ratio_err", "same_top_p")
    manifest = replace(
        made,
        recipe=text,
        nodes=tuple(describe_nodes(made.nodes, found.sites, best.assignment)),
        quality={name: quality[name] for name in kept},
        profile=found.table.to_json(),
        search=describe_search(found, goal, best, rounds),
    )
    with package.written_aside(out) as aside:
        for name in manifest.files:
            (place / name).rename(aside / name)
        package.seal(aside, manifest)
    package.remember_hashes(out, manifest.files)
    return manifest
