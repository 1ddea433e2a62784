"""dsopt compile: a checkpoint to an optimized ONNX directory, whose path is printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsopt.cli.models import BUILT_IN, check_overwrite, default_directory, remember_last
from dsopt.cli.progress import note, progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsopt.compiler.recipe import Recipe


def compile_command(
    model: Annotated[
        str, typer.Argument(help="Hugging Face directory or hub id, GGUF file, or a built-in name.")
    ] = BUILT_IN,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write. [default: in the cache]")] = None,
    quant: Annotated[
        str,
        typer.Option(help="auto, none, int4, int8, w8a8, fp8; int4-zp, int8-b64, ...; then ROLE=FORMAT by commas."),
    ] = "auto",
    target: Annotated[
        str, typer.Option(help="cpu or cuda: what will run it. [default: what this machine has]", show_default=False)
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of activations and cache: fp32 on cpu; fp16 (default) or bf16 on cuda.")
    ] = None,
    prune: Annotated[
        str, typer.Option(help="none, or by commas: ffn=10%, layers=2, blocks=3, kv=1, vocab=FILE or FILE:TOKENS.")
    ] = "none",
    force: Annotated[bool, typer.Option("--force", help="Replace a compiled model that is in the way.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done and its size, as JSON.")] = False,
) -> None:
    """Compile MODEL and print the path of the result.

    A model compiled before with the same recipe from the same files is not compiled again.
    """
    if plan:
        _print_plan(model, quant, target, dtype, prune)
        return
    print(compile_model(model, out, quant, target, dtype, prune, force=force))


def compile_model(
    model: str,
    out: Path | None = None,
    quant: str = "auto",
    target: str = "auto",
    dtype: str | None = None,
    prune: str = "none",
    *,
    force: bool = False,
) -> Path:
    """Compile unless the same result is there already; returns its directory and remembers it as the last one."""
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.pruning.options import Pruning, full_text

    target, recipe = _target_and_recipe(quant, target, dtype)
    pruning = Pruning.parse(prune)
    text = full_text(recipe.text, pruning)
    checkpoint = open_checkpoint(model, progress=note)
    directory = out.absolute() if out else default_directory(checkpoint.source.name, text, checkpoint.source.sha256)
    if not _is_current(directory, checkpoint.source.sha256, text) or force:
        check_overwrite(directory, force=force)
        from dsopt.compiler import build  # torch: two seconds that a wrong call need not wait for

        note(f"exporting {checkpoint.source.name}")
        plan = build.plan(checkpoint, recipe, target=target, pruning=pruning, report=note)
        _note_rates(plan.manifest.pruning)
        with progress_bar("writing weights") as progress:
            build.write(plan, directory, progress=progress)
    remember_last(directory)
    return directory


def _target_and_recipe(quant: str, target: str, dtype: str | None) -> "tuple[str, Recipe]":
    """The target's name and the recipe with its float type. Raises DsoptError on a type without kernels there."""
    from dsopt.compiler.recipe import Recipe
    from dsopt.compiler.targets import find_target
    from dsopt.runtime.devices import missing_provider

    if target == "auto":
        target = "cpu" if missing_provider("CUDAExecutionProvider") else "cuda"
    chosen, recipe = find_target(target), Recipe.parse(quant)
    return target, recipe.with_dtype(chosen.check_dtype(dtype or recipe.said_dtype))


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


def _note_rates(pruning: "Mapping[str, Any] | None") -> None:
    """What each kind of pruning costs for what it frees."""
    from dsopt.compiler.pruning.account import exchange_lines

    for line in exchange_lines(pruning) if pruning else ():
        note(line)


def _print_plan(model: str, quant: str, target: str, dtype: str | None, prune: str) -> None:
    import json

    from dsopt.compiler import build
    from dsopt.compiler.checkpoint import open_checkpoint
    from dsopt.compiler.pruning.options import Pruning

    target, recipe = _target_and_recipe(quant, target, dtype)
    pruning = Pruning.parse(prune)
    made = build.plan(open_checkpoint(model, progress=note), recipe, target=target, pruning=pruning, report=note)
    manifest = made.manifest
    report = {
        "name": manifest.name,
        "recipe": manifest.recipe,
        "target": manifest.target,
        "model": dict(manifest.model),
        "pruning": manifest.pruning,
        "bytes": made.nbytes,
        "linears": [dict(node) for node in manifest.nodes],
    }
    print(json.dumps(report, indent=1))
