"""dsopt compile: a checkpoint to an optimized ONNX directory, whose path is printed."""

from pathlib import Path
from typing import Annotated

import typer

from dsopt.cli.models import BUILT_IN, check_overwrite, default_directory, remember_last
from dsopt.cli.progress import note, progress_bar


def compile_command(
    model: Annotated[
        str, typer.Argument(help="Hugging Face directory or hub id, GGUF file, or a built-in name.")
    ] = BUILT_IN,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write. [default: in the cache]")] = None,
    quant: Annotated[
        str,
        typer.Option(help="auto, none, int4, int8, w8a8; int4-zp, int8-b64, ...; then ROLE=FORMAT by commas."),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a compiled model that is in the way.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done and its size, as JSON.")] = False,
) -> None:
    """Compile MODEL and print the path of the result.

    A model compiled before with the same recipe from the same files is not compiled again.
    """
    if plan:
        _print_plan(model, quant)
        return
    print(compile_model(model, out, quant, force=force))


def compile_model(model: str, out: Path | None = None, quant: str = "auto", *, force: bool = False) -> Path:
    """Compile unless the same result is there already; returns its directory and remembers it as the last one."""
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.recipe import Recipe

    recipe = Recipe.parse(quant)
    checkpoint = open_checkpoint(model, progress=note)
    directory = (
        out.absolute() if out else default_directory(checkpoint.source.name, recipe.text, checkpoint.source.sha256)
    )
    if not _is_current(directory, checkpoint.source.sha256, recipe.text) or force:
        check_overwrite(directory, force=force)
        from dsopt.compiler import build  # torch: two seconds that a wrong call need not wait for

        note(f"exporting {checkpoint.source.name}")
        plan = build.plan(checkpoint, recipe)
        with progress_bar("writing weights") as progress:
            build.write(plan, directory, progress=progress)
    remember_last(directory)
    return directory


def _is_current(directory: Path, source: str, recipe: str) -> bool:
    """Whether `directory` holds, unchanged, what this compilation would write."""
    from importlib.metadata import version

    from dsopt.runtime.artifact import open_artifact
    from dsopt.runtime.errors import DsoptError

    try:
        manifest = open_artifact(directory).manifest
    except DsoptError:
        return False
    made = manifest.versions.get("dsopt"), manifest.source.get("sha256"), manifest.recipe
    return made == (version("dsopt"), source, recipe)


def _print_plan(model: str, quant: str) -> None:
    import json

    from dsopt.compiler import build
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.recipe import Recipe

    made = build.plan(open_checkpoint(model, progress=note), Recipe.parse(quant))
    manifest = made.manifest
    report = {
        "name": manifest.name,
        "recipe": manifest.recipe,
        "target": manifest.target,
        "model": dict(manifest.model),
        "bytes": made.nbytes,
        "linears": [dict(node) for node in manifest.nodes],
    }
    print(json.dumps(report, indent=1))
