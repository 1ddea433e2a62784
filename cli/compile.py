"""dsopt compile: a checkpoint to an optimized ONNX directory, whose path is printed."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsopt.cli.generate import warn
from dsopt.cli.models import BUILT_IN, check_overwrite, remember_last
from dsopt.cli.order import DEFAULT_LOSS, Job, Order, note_rates
from dsopt.cli.progress import note, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from dsopt.compiler.goal import Goal
    from dsopt.compiler.pruning.pruned import Pruned
    from dsopt.compiler.study import Study


def compile_command(
    model: Annotated[
        str, typer.Argument(help="Hugging Face directory or hub id, GGUF file, or a built-in name.")
    ] = BUILT_IN,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write. [default: in the cache]")] = None,
    quant: Annotated[
        str,
        typer.Option(
            help="auto, none, int4, int8, w8a8, w7a8, fp8; int4-zp, int8-b64, ...; then ROLE=FORMAT by commas."
        ),
    ] = "auto",
    target: Annotated[
        str, typer.Option(help="cpu or cuda: what will run it. [default: what this machine has]", show_default=False)
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of activations and cache: fp32 on cpu; fp16 (default) or bf16 on cuda.")
    ] = None,
    prune: Annotated[
        str,
        typer.Option(
            help="none; auto:1.15 (times as fast), with vocab=FILE; or ffn=10%, layers=2, blocks=3, kv=1, vocab=FILE:N."
        ),
    ] = "none",
    draft: Annotated[
        str | None,
        typer.Option(help="Drafter beside MODEL: self (a pruned copy), or a DeepSpec directory or hub id."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--max-quality-loss",
            help=f"What auto, with --prune, may lose: nats (KL divergence) or N% of ppl. [default: {DEFAULT_LOSS}]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[str | None, typer.Option("--max-size", help="What auto may weigh: 105MB.", metavar="SIZE")] = None,
    workload: Annotated[
        str, typer.Option("--for", help="What auto makes fast: chat, decode, prefill, batch, speculative.")
    ] = "chat",
    calib: Annotated[
        Path | None, typer.Option(help="Text or JSON lines to calibrate auto or --prune on. [default: the model's own]")
    ] = None,
    allow_miss: Annotated[bool, typer.Option("--allow-miss", help="Keep the best build though it loses more.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what auto found as an HTML page.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="dsopt.json of a search on the machine that will run it: its kernel times, not this one's."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a compiled model that is in the way.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done and its size, as JSON.")] = False,
) -> None:
    """Compile MODEL and print the path of the result.

    With --quant auto the kernel of each layer is chosen on this machine: the fastest mix that loses no more than
    allowed, as measured on text that was not calibrated on. A model compiled before with the same recipe from the
    same files is not compiled again.
    """
    order = Order(quant, target, dtype, prune, draft, loss, size, workload, calib, allow_miss, report, profile)
    if plan:
        _print_plan(model, order)
        return
    print(compile_model(model, out, order, force=force))


def compile_model(model: str, out: Path | None = None, order: Order | None = None, *, force: bool = False) -> Path:
    """Compile unless the same result is there already; returns its directory and remembers it as the last one."""
    job = Job.open(model, order or Order())
    directory = out.absolute() if out else job.directory
    if not job.is_done(directory) or force:
        check_overwrite(directory, force=force)
        if job.goal is None:
            _build(job, directory)
        else:
            _search(job, job.goal, directory)
    if job.order.report:
        _write_report(directory, job.order.report)
    remember_last(directory)
    return directory


def _build(job: Job, directory: Path) -> None:
    from dsopt.compiler import build  # torch: two seconds that a wrong call need not wait for

    note(f"exporting {job.checkpoint.source.name}")
    plan = job.plan()
    note_rates(plan.manifest.pruning)
    with progress_bar("writing weights") as progress:
        build.write(plan, directory, progress=progress)


def _search(job: Job, goal: "Goal", directory: Path) -> None:
    from dsopt.compiler.compress import compress

    manifest = compress(
        job.checkpoint,
        _study(job, goal),
        goal,
        directory,
        job.text,
        allow_miss=job.order.allow_miss,
        stage=_stage,
        report=note,
    )
    note_rates(manifest.pruning)


def _study(job: Job, goal: "Goal") -> "Study":
    from dsopt.compiler.corpus import read_windows, self_windows
    from dsopt.compiler.setting import Setting
    from dsopt.compiler.study import study

    setting = Setting.open(job.checkpoint, job.target, job.recipe.dtype, job.times())
    if job.order.calib:
        windows = read_windows(job.order.calib, job.checkpoint)
        if job.pruning.vocab and _is_part(job.order.calib, job.pruning.vocab):
            warn(
                "dsopt: --calib is part of the text by which vocab= chooses tokens: other text loses more than what is "
                "measured on it; leave --calib out, or give another one"
            )
    else:
        with _stage("writing text") as progress:
            windows = self_windows(job.checkpoint, progress)
    pruned = _prune(job, windows) if job.pruning else None
    return study(job.checkpoint, windows, goal, _stage, setting, pruned, allow_miss=job.order.allow_miss)


def _is_part(calib: Path, corpus: Path) -> bool:
    """Whether the text of one file, both were read before, is in the other."""
    from dsopt.compiler.corpus import read_text

    whole = corpus.read_text(encoding="utf-8")
    return any(text.strip() in whole for text in (calib.read_text(encoding="utf-8"), read_text(calib)))


def _prune(job: Job, windows: "np.ndarray") -> "Pruned":
    """By the windows that do not judge."""
    from dsopt.compiler.corpus import HELD
    from dsopt.compiler.pruning.pruned import prune

    return prune(job.checkpoint, job.recipe, job.pruning, job.target, lambda _: windows[:-HELD], note)


@contextmanager
def _stage(label: str) -> "Iterator[Callable[[int, int], None]]":
    note(label)
    with progress_bar(label, count=label != "writing weights") as progress:
        yield progress


def _write_report(directory: Path, path: Path) -> None:
    from dsopt.compiler.report import render
    from dsopt.runtime.artifact import open_artifact
    from dsopt.runtime.errors import DsoptError
    from dsopt.runtime.files import write_atomically

    page = render(open_artifact(directory).manifest).encode()
    try:
        write_atomically(path, page, parents=False)
    except OSError as error:
        raise DsoptError(f"{path}: cannot be written ({error.strerror}); choose another --report") from error


def _print_plan(model: str, order: Order) -> None:
    import json

    job = Job.open(model, order)
    if job.goal is not None:
        _print_choice(job, job.goal)
        return
    made = job.plan()
    manifest = made.manifest
    report = {
        "name": manifest.name,
        "recipe": manifest.recipe,
        "target": manifest.target,
        "model": dict(manifest.model),
        "bytes": made.nbytes,
        "pruning": manifest.pruning,
        "drafters": [
            *([{"name": made.drafter.directory, "bytes": made.drafter.nbytes}] if made.drafter else []),
            *({"name": name, "bytes": draft.nbytes} for name, draft in made.drafts.items()),
        ],
        "linears": [dict(node) for node in manifest.nodes],
    }
    print(json.dumps(report, indent=1))


def _print_choice(job: Job, goal: "Goal") -> None:
    """What a search would build first, by its estimates, and what else there is."""
    import json

    from dsopt.compiler.outcome import preview

    print(json.dumps(preview(_study(job, goal), goal), indent=1))
