"""dsopt compile: a checkpoint to an optimized ONNX directory, whose path is printed."""

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsopt.cli.models import BUILT_IN, check_overwrite, default_directory, remember_last
from dsopt.cli.progress import note, progress_bar

if TYPE_CHECKING:
    from dsopt.compiler.checkpoint import Checkpoint
    from dsopt.compiler.drafters.checkpoint import DraftCheckpoint
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
    draft: Annotated[
        str | None, typer.Option(help="Drafter to compile beside MODEL: a checkpoint of DeepSpec, directory or hub id.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a compiled model that is in the way.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done and its size, as JSON.")] = False,
) -> None:
    """Compile MODEL and print the path of the result.

    A model compiled before with the same recipe from the same files is not compiled again.
    """
    if plan:
        _print_plan(model, quant, draft)
        return
    print(compile_model(model, out, quant, force=force, draft=draft))


def compile_model(
    model: str, out: Path | None = None, quant: str = "auto", *, force: bool = False, draft: str | None = None
) -> Path:
    """Compile unless the same result is there already; returns its directory and remembers it as the last one."""
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.recipe import Recipe

    recipe = Recipe.parse(quant)
    checkpoint = open_checkpoint(model, progress=note)
    drafter = _open_drafter(draft)
    directory = out.absolute() if out else _default(checkpoint, recipe, drafter)
    if not _is_current(directory, checkpoint.source.sha256, recipe.text, drafter) or force:
        check_overwrite(directory, force=force)
        from dsopt.compiler import build  # torch: two seconds that a wrong call need not wait for

        note(f"exporting {checkpoint.source.name}")
        plan = build.plan(checkpoint, recipe, drafter)
        with progress_bar("writing weights") as progress:
            build.write(plan, directory, progress=progress)
    remember_last(directory)
    return directory


def _open_drafter(draft: str | None) -> "DraftCheckpoint | None":
    if draft is None:
        return None
    from dsopt.compiler.drafters.checkpoint import open_drafter

    return open_drafter(draft)


def _default(checkpoint: "Checkpoint", recipe: "Recipe", drafter: "DraftCheckpoint | None") -> Path:
    source = checkpoint.source
    if drafter is None:
        return default_directory(source.name, recipe.text, source.sha256)
    both = sha256((source.sha256 + drafter.source.sha256).encode()).hexdigest()
    return default_directory(f"{source.name}+{drafter.source.name}", recipe.text, both)


def _is_current(directory: Path, source: str, recipe: str, drafter: "DraftCheckpoint | None") -> bool:
    """Whether `directory` holds, unchanged, what this compilation would write."""
    from importlib.metadata import version

    from dsopt.runtime.artifact import WEIGHTS, open_artifact
    from dsopt.runtime.drafters.manifest import open_draft
    from dsopt.runtime.errors import DsoptError

    try:
        manifest = open_artifact(directory).manifest
        weights = str(manifest.files[WEIGHTS]["sha256"])
        drafts = [open_draft(directory / name, weights).source["sha256"] for name in manifest.drafters]
    except DsoptError:
        return False
    made = manifest.versions.get("dsopt"), manifest.source.get("sha256"), manifest.recipe, drafts
    return made == (version("dsopt"), source, recipe, [drafter.source.sha256] if drafter else [])


def _print_plan(model: str, quant: str, draft: str | None) -> None:
    import json

    from dsopt.compiler import build
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.recipe import Recipe

    made = build.plan(open_checkpoint(model, progress=note), Recipe.parse(quant), _open_drafter(draft))
    manifest = made.manifest
    report = {
        "name": manifest.name,
        "recipe": manifest.recipe,
        "target": manifest.target,
        "model": dict(manifest.model),
        "bytes": made.nbytes,
        "drafters": [{"name": made.drafter.directory, "bytes": made.drafter.nbytes}] if made.drafter else [],
        "linears": [dict(node) for node in manifest.nodes],
    }
    print(json.dumps(report, indent=1))
