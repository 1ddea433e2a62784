"""dsopt compile: a checkpoint to an optimized ONNX directory, whose path is printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsopt.cli.models import BUILT_IN, check_overwrite, default_directory, remember_last
from dsopt.cli.progress import note, progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsopt.compiler.build import Plan
    from dsopt.compiler.checkpoint import Checkpoint
    from dsopt.compiler.pruning.options import Pruning
    from dsopt.compiler.recipe import Recipe


def compile_command(
    model: Annotated[
        str, typer.Argument(help="Hugging Face directory or hub id, GGUF file, or a built-in name.")
    ] = BUILT_IN,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write. [default: in the cache]")] = None,
    quant: Annotated[
        str,
        typer.Option(help="auto, none, int4, int8, w8a8; int4-zp, int8-b64, ...; then ROLE=FORMAT by commas."),
    ] = "auto",
    prune: Annotated[
        str, typer.Option(help="none, or by commas: ffn=10%, layers=2, blocks=3, kv=1, vocab=FILE or FILE:TOKENS.")
    ] = "none",
    draft: Annotated[
        str, typer.Option(help="none, or self: a pruned copy of the model beside it, to draft tokens for it.")
    ] = "none",
    force: Annotated[bool, typer.Option("--force", help="Replace a compiled model that is in the way.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done and its size, as JSON.")] = False,
) -> None:
    """Compile MODEL and print the path of the result.

    A model compiled before with the same recipe from the same files is not compiled again.
    """
    if plan:
        _print_plan(model, quant, prune, draft)
        return
    print(compile_model(model, out, quant, prune, draft, force=force))


def compile_model(
    model: str,
    out: Path | None = None,
    quant: str = "auto",
    prune: str = "none",
    draft: str = "none",
    *,
    force: bool = False,
) -> Path:
    """Compile unless the same result is there already; returns its directory and remembers it as the last one."""
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.pruning.options import Pruning, full_text
    from dsopt.compiler.recipe import Recipe

    recipe, pruning, drafters = Recipe.parse(quant), Pruning.parse(prune), _drafters(draft)
    text = full_text(recipe.text, pruning)
    checkpoint = open_checkpoint(model, progress=note)
    name, sha256 = checkpoint.source.name, checkpoint.source.sha256
    directory = out.absolute() if out else default_directory(name, " ".join((text, *drafters)), sha256)
    if not _is_current(directory, sha256, text, drafters) or force:
        check_overwrite(directory, force=force)
        plan = _plan(checkpoint, recipe, pruning, drafters)
        from dsopt.compiler import build

        with progress_bar("writing weights") as progress:
            build.write(plan, directory, progress=progress)
    remember_last(directory)
    return directory


def _drafters(draft: str) -> tuple[str, ...]:
    from dsopt.compiler.pruning.draft import DIRECTORY
    from dsopt.runtime.errors import UsageError

    known: dict[str, tuple[str, ...]] = {"none": (), "self": (DIRECTORY,)}
    if draft not in known:
        raise UsageError(f"--draft is {draft!r}; {' and '.join(known)} work")
    return known[draft]


def _plan(checkpoint: "Checkpoint", recipe: "Recipe", pruning: "Pruning", drafters: tuple[str, ...]) -> "Plan":
    """The model's plan with its drafters', saying what pruning costs on the way."""
    from dsopt.compiler import build  # torch: two seconds that a wrong call need not wait for
    from dsopt.compiler.pruning.draft import DIRECTORY, plan_draft

    note(f"exporting {checkpoint.source.name}")
    plan = build.plan(checkpoint, recipe, pruning, report=note)
    _note_rates(plan.manifest.pruning)
    if DIRECTORY in drafters:
        note("making the drafter")
        draft = plan_draft(checkpoint, pruning, report=note)
        _note_rates(draft.manifest.pruning)
        plan = build.add_draft(plan, DIRECTORY, draft)
    return plan


def _is_current(directory: Path, source: str, recipe: str, drafters: tuple[str, ...]) -> bool:
    """Whether `directory` holds, unchanged, what this compilation would write."""
    from importlib.metadata import version

    from dsopt.runtime.artifact import open_artifact
    from dsopt.runtime.errors import DsoptError

    try:
        manifest = open_artifact(directory).manifest
    except DsoptError:
        return False
    made = manifest.versions.get("dsopt"), manifest.source.get("sha256"), manifest.recipe, manifest.drafters
    return made == (version("dsopt"), source, recipe, drafters)


def _note_rates(pruning: "Mapping[str, Any] | None") -> None:
    """What each kind of pruning costs for what it frees."""
    from dsopt.compiler.pruning.account import exchange_lines

    for line in exchange_lines(pruning) if pruning else ():
        note(line)


def _print_plan(model: str, quant: str, prune: str, draft: str) -> None:
    import json

    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.pruning.options import Pruning
    from dsopt.compiler.recipe import Recipe

    recipe, pruning, drafters = Recipe.parse(quant), Pruning.parse(prune), _drafters(draft)
    made = _plan(open_checkpoint(model, progress=note), recipe, pruning, drafters)
    manifest = made.manifest
    report = {
        "name": manifest.name,
        "recipe": manifest.recipe,
        "target": manifest.target,
        "model": dict(manifest.model),
        "pruning": manifest.pruning,
        "bytes": made.nbytes,
        "drafters": {name: inner.nbytes for name, inner in made.drafts.items()},
        "linears": [dict(node) for node in manifest.nodes],
    }
    print(json.dumps(report, indent=1))
