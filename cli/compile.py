"""dsopt compile: a checkpoint to an optimized ONNX directory, whose path is printed."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsopt.cli.models import BUILT_IN, check_overwrite, default_directory, remember_last
from dsopt.cli.progress import note, progress_bar
from dsopt.runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dsopt.compiler.build import Plan
    from dsopt.compiler.checkpoint import Checkpoint
    from dsopt.compiler.compress import Study
    from dsopt.compiler.drafters.checkpoint import DraftCheckpoint
    from dsopt.compiler.pruning.options import Pruning
    from dsopt.compiler.recipe import Recipe
    from dsopt.compiler.search import Goal
    from dsopt.runtime.artifact import Artifact

DEFAULT_LOSS = "0.01"
SELF = "self"  # as a drafter: a pruned copy of the model


@dataclass(frozen=True)
class Order:
    """What is to be done to a model, as the options say it."""

    quant: str = "auto"
    target: str = "auto"
    dtype: str | None = None
    prune: str = "none"
    draft: str | None = None
    loss: str = DEFAULT_LOSS
    size: str | None = None
    workload: str = "chat"
    calib: Path | None = None
    allow_miss: bool = False
    report: Path | None = None

    def __post_init__(self) -> None:
        searching = (self.loss, self.size, self.workload, self.calib) != (DEFAULT_LOSS, None, "chat", None)
        if (searching or self.allow_miss or self.report) and not self.searches:
            raise UsageError(
                "a search is asked for, but --quant, --prune, --draft or --target leaves nothing to search"
            )

    @property
    def searches(self) -> bool:
        """Whether formats are chosen by measurement rather than by the recipe."""
        return self.quant == "auto" and self.prune == "none" and self.draft is None and self.target != "cuda"


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
    draft: Annotated[
        str | None,
        typer.Option(help="Drafter beside MODEL: self (a pruned copy), or a DeepSpec directory or hub id."),
    ] = None,
    loss: Annotated[
        str, typer.Option("--max-quality-loss", help="What auto may lose: nats (KL divergence), or N% of perplexity.")
    ] = DEFAULT_LOSS,
    size: Annotated[str | None, typer.Option("--max-size", help="What auto may weigh: 105MB.", metavar="SIZE")] = None,
    workload: Annotated[
        str, typer.Option("--for", help="What auto makes fast: chat, prefill, batch, speculative.")
    ] = "chat",
    calib: Annotated[
        Path | None, typer.Option(help="Text or JSON lines to calibrate auto on. [default: the model's own]")
    ] = None,
    allow_miss: Annotated[bool, typer.Option("--allow-miss", help="Keep the best build though it loses more.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what auto found as an HTML page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a compiled model that is in the way.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done and its size, as JSON.")] = False,
) -> None:
    """Compile MODEL and print the path of the result.

    With --quant auto the kernel of each layer is chosen on this machine: the fastest mix that loses no more than
    allowed, as measured on text that was not calibrated on. A model compiled before with the same recipe from the
    same files is not compiled again.
    """
    order = Order(quant, target, dtype, prune, draft, loss, size, workload, calib, allow_miss, report)
    if plan:
        _print_plan(model, order)
        return
    print(compile_model(model, out, order, force=force))


def compile_model(model: str, out: Path | None = None, order: Order | None = None, *, force: bool = False) -> Path:
    """Compile unless the same result is there already; returns its directory and remembers it as the last one."""
    job = _Job.open(model, order or Order())
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


def _build(job: "_Job", directory: Path) -> None:
    from dsopt.compiler import build  # torch: two seconds that a wrong call need not wait for

    note(f"exporting {job.checkpoint.source.name}")
    plan = job.plan()
    _note_rates(plan.manifest.pruning)
    with progress_bar("writing weights") as progress:
        build.write(plan, directory, progress=progress)


def _search(job: "_Job", goal: "Goal", directory: Path) -> None:
    from dsopt.compiler.compress import compress

    compress(
        job.checkpoint,
        _study(job, goal),
        goal,
        directory,
        job.text,
        allow_miss=job.order.allow_miss,
        stage=_stage,
        report=note,
    )


def _study(job: "_Job", goal: "Goal") -> "Study":
    from dsopt.compiler.compress import study
    from dsopt.compiler.corpus import read_windows, self_windows

    if job.order.calib:
        windows = read_windows(job.order.calib, job.checkpoint)
    else:
        with _stage("writing text") as progress:
            windows = self_windows(job.checkpoint, progress)
    return study(job.checkpoint, windows, goal, _stage)


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


@dataclass(frozen=True)
class _Job:
    """An order whose parts are read and understood."""

    checkpoint: "Checkpoint"
    recipe: "Recipe"
    target: str
    pruning: "Pruning"
    drafter: "DraftCheckpoint | None"
    order: Order
    goal: "Goal | None"  # of a search

    @classmethod
    def open(cls, model: str, order: Order) -> "_Job":
        from dsopt.compiler.checkpoint import open_checkpoint
        from dsopt.compiler.pruning.options import Pruning

        target, recipe = _target_and_recipe(order)
        pruning = Pruning.parse(order.prune)
        goal = None
        order = replace(
            order, target=target
        )  # a search is asked for in vain where the target turns out not to have one
        if order.searches:
            from dsopt.compiler.search import Goal

            goal = Goal.parse(order.loss, order.size, order.workload)
        checkpoint = open_checkpoint(model, progress=note)
        return cls(checkpoint, recipe, target, pruning, _open_drafter(order.draft), order, goal)

    @property
    def text(self) -> str:
        """What the manifest will say was done."""
        from dsopt.compiler.pruning.options import full_text

        if self.goal is None:
            return full_text(self.recipe.text, self.pruning)
        words = ["auto", f"loss={self.order.loss}", f"for={self.order.workload}"]
        words += [f"size={self.order.size}"] if self.order.size else []
        if self.order.calib:
            words.append(f"calib={_digest(self.order.calib)}")
        return ",".join(words)

    @property
    def directory(self) -> Path:
        """Where the result goes unless told."""
        source = self.checkpoint.source
        if self.drafter is None:
            text = f"{self.text} {SELF}" if self.order.draft == SELF else self.text
            return default_directory(source.name, text, source.sha256)
        both = sha256((source.sha256 + self.drafter.source.sha256).encode()).hexdigest()
        return default_directory(f"{source.name}+{self.drafter.source.name}", self.text, both)

    def is_done(self, directory: Path) -> bool:
        """Whether `directory` holds, unchanged, what this compilation would write."""
        from importlib.metadata import version

        from dsopt.runtime.artifact import open_artifact
        from dsopt.runtime.errors import DsoptError

        try:
            artifact = open_artifact(directory)
            drafts = [_draft_source(artifact, name) for name in artifact.manifest.drafters]
        except DsoptError:
            return False
        manifest, source = artifact.manifest, self.checkpoint.source.sha256
        made = manifest.versions.get("dsopt"), manifest.source.get("sha256"), manifest.recipe, drafts
        wanted = [self.drafter.source.sha256] if self.drafter else [source] if self.order.draft == SELF else []
        return made == (version("dsopt"), source, self.text, wanted) and self._is_near_enough(manifest.search)

    def _is_near_enough(self, search: "Mapping[str, Any] | None") -> bool:
        """Whether what a search kept holds the budget: with --allow-miss it need not."""
        if self.goal is None or self.order.allow_miss:
            return True
        return search is not None and any(r["chosen"] and r["measured"] <= self.goal.loss for r in search["rounds"])

    def plan(self) -> "Plan":
        from dsopt.compiler import build
        from dsopt.compiler.pruning.draft import DIRECTORY, plan_draft

        plan = build.plan(
            self.checkpoint, self.recipe, self.pruning, target=self.target, draft=self.drafter, report=note
        )
        if self.order.draft == SELF:
            note("making the drafter")
            draft = plan_draft(self.checkpoint, self.pruning, report=note)
            _note_rates(draft.manifest.pruning)
            plan = build.add_draft(plan, DIRECTORY, draft)
        return plan


def _draft_source(artifact: "Artifact", name: str) -> str:
    """The hash of the checkpoint that a drafter of the artifact was made from. Raises DsoptError when it is damaged."""
    from dsopt.compiler.pruning.draft import DIRECTORY
    from dsopt.runtime.artifact import WEIGHTS, open_artifact
    from dsopt.runtime.drafters.manifest import open_draft

    if name == DIRECTORY:
        return str(open_artifact(artifact.directory / name).manifest.source["sha256"])
    weights = str(artifact.manifest.files[WEIGHTS]["sha256"])
    return str(open_draft(artifact.directory / name, weights).source["sha256"])


def _target_and_recipe(order: Order) -> "tuple[str, Recipe]":
    """The target's name and the recipe with its float type. Raises DsoptError on a type without kernels there."""
    from dsopt.compiler.recipe import Recipe
    from dsopt.compiler.targets import find_target
    from dsopt.runtime.devices import missing_provider

    target = order.target
    if target == "auto":
        target = "cpu" if missing_provider("CUDAExecutionProvider") else "cuda"
    chosen, recipe = find_target(target), Recipe.parse(order.quant)
    return target, recipe.with_dtype(chosen.check_dtype(order.dtype or recipe.said_dtype))


def _digest(path: Path) -> str:
    from dsopt.runtime.errors import DsoptError
    from dsopt.runtime.files import sha256_file

    try:
        return sha256_file(path)[:8]
    except OSError as error:
        raise DsoptError(f"{path} could not be read ({error.strerror}); --calib names a text file") from error


def _open_drafter(draft: str | None) -> "DraftCheckpoint | None":
    if draft is None or draft == SELF:
        return None
    from dsopt.compiler.drafters.checkpoint import open_drafter

    return open_drafter(draft)


def _note_rates(pruning: "Mapping[str, Any] | None") -> None:
    """What each kind of pruning costs for what it frees."""
    from dsopt.compiler.pruning.account import exchange_lines

    for line in exchange_lines(pruning) if pruning else ():
        note(line)


def _print_plan(model: str, order: Order) -> None:
    import json

    job = _Job.open(model, order)
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


def _print_choice(job: _Job, goal: "Goal") -> None:
    """What a search would build first, by its estimates, and what else there is."""
    import json

    from dsopt.compiler.compress import preview

    print(json.dumps(preview(_study(job, goal), goal), indent=1))
