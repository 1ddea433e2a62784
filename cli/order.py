"""What `dsopt compile` is asked to do: the options, checked, and what they name, opened."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsopt.cli.models import default_directory
from dsopt.cli.progress import note
from dsopt.runtime.artifact import MANIFEST
from dsopt.runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsopt.compiler.build import Plan
    from dsopt.compiler.checkpoint import Checkpoint
    from dsopt.compiler.drafters.checkpoint import DraftCheckpoint
    from dsopt.compiler.goal import Goal
    from dsopt.compiler.kernel_table import KernelTable
    from dsopt.compiler.pruning.options import Pruning
    from dsopt.compiler.recipe import Recipe
    from dsopt.compiler.self_text import Calibrate
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
    loss: str | None = None
    size: str | None = None
    workload: str = "chat"
    calib: Path | None = None
    allow_miss: bool = False
    report: Path | None = None
    profile: Path | None = None

    def __post_init__(self) -> None:
        if self.insists and not self.searches:
            if self.calib is not None and not replace(self, calib=None).insists:
                raise UsageError(
                    "--calib is for a search, for --prune and for --draft self; --quant or --draft leaves none of them"
                )
            raise UsageError("a search is asked for, but --quant or --draft leaves nothing to search")

    @property
    def insists(self) -> bool:
        """Whether an option is given that only a search has; a text to calibrate on is for pruning and for the pruned
        copy that drafts, too."""
        given = (self.loss, self.size, self.workload) != (None, None, "chat")
        given |= self.calib is not None and not self.prunes and self.draft != SELF
        return given or self.allow_miss or bool(self.report) or bool(self.profile)

    @property
    def prunes(self) -> bool:
        return self.prune != "none"

    @property
    def budget(self) -> str:
        return DEFAULT_LOSS if self.loss is None else self.loss

    @property
    def searches(self) -> bool:
        """Whether formats are chosen by measurement rather than by the recipe; beside pruning, which most often loses
        more than the default allows, only if an option of the search says so."""
        return self.quant == "auto" and self.draft is None and (self.insists or not self.prunes)


@dataclass(frozen=True)
class Job:
    """An order whose parts are read and understood."""

    checkpoint: "Checkpoint"
    recipe: "Recipe"
    target: str
    pruning: "Pruning"
    drafter: "DraftCheckpoint | None"
    order: Order
    goal: "Goal | None"  # of a search

    @classmethod
    def open(cls, model: str, order: Order) -> "Job":
        from dsopt.compiler.checkpoint import open_checkpoint
        from dsopt.compiler.pruning.options import Pruning

        target, recipe = _target_and_recipe(order)
        pruning = Pruning.parse(order.prune)
        if order.calib and order.prunes and not (pruning.needs_text or order.searches or order.draft == SELF):
            raise UsageError(f"--calib: --prune {order.prune} needs no text to calibrate on; leave out one")
        order, goal = replace(order, target=target), None
        if order.searches and (order.insists or _is_here(target)):
            from dsopt.compiler.goal import Goal

            goal = Goal.parse(order.budget, order.size, order.workload)
        checkpoint = open_checkpoint(model, progress=note)
        if goal is None and order.searches:
            recipe = _keep_float8(checkpoint, recipe, target)
        return cls(checkpoint, recipe, target, pruning, _open_drafter(order.draft), order, goal)

    @property
    def text(self) -> str:
        """What the manifest will say was done."""
        from dsopt.compiler.pruning.options import full_text

        if self.goal is None:
            text = full_text(self.recipe.text, self.pruning)
            return f"{text} calib={_digest(self.order.calib, _TEXTS)}" if self.order.calib else text
        # However numbers were spelled: orders of the same model meet.
        number, percent = self.order.budget.rstrip("% "), self.order.budget.endswith("%")
        words = ["auto", f"loss={float(number):.12g}{'%' * percent}", f"for={self.order.workload}"]
        words += [f"size={self.goal.size / 1e6:.12g}MB"] if self.goal.size else []
        if self.order.calib:
            words.append(f"calib={_digest(self.order.calib, _TEXTS)}")
        if self.order.profile:
            words.append(f"profile={_digest(_profile_file(self.order.profile), _PROFILES)}")
        if self.recipe.dtype != "fp32":
            words.append(f"dtype={self.recipe.dtype}")
        return full_text(",".join(words), self.pruning)

    def times(self) -> "KernelTable | None":
        """The kernel times that --profile names. Raises DsoptError where it has none."""
        if self.order.profile is None:
            return None
        from dsopt.compiler.kernel_table import KernelTable

        return KernelTable.read(_profile_file(self.order.profile), _PROFILES)

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
        from functools import partial

        from dsopt.compiler import build
        from dsopt.compiler.corpus import read_windows, self_windows
        from dsopt.compiler.pruning.draft import DIRECTORY, plan_draft

        calibrate: Calibrate = partial(read_windows, self.order.calib) if self.order.calib else self_windows
        plan = build.plan(
            self.checkpoint, self.recipe, self.pruning,
            target=self.target, draft=self.drafter, calibrate=calibrate, report=note,
        )  # fmt: skip
        # The recipe alone does not say which text the pruning was chosen by.
        plan = replace(plan, manifest=replace(plan.manifest, recipe=self.text))
        if self.order.draft == SELF:
            note("making the drafter")
            pruning = self.pruning
            if pruning.auto and pruning.vocab:  # the drafter is told tokens by the numbers that they have now
                pruning = replace(pruning, auto=0.0, tokens=plan.manifest.model["vocab_size"])
            draft = plan_draft(self.checkpoint, pruning, calibrate=calibrate, report=note)
            note_rates(draft.manifest.pruning)
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


def _is_here(target: str) -> bool:
    from dsopt.compiler.targets import find_target
    from dsopt.runtime.devices import missing_provider

    return missing_provider(find_target(target).provider) is None


def _keep_float8(checkpoint: "Checkpoint", recipe: "Recipe", target: str) -> "Recipe":
    """What auto is where nothing is searched: float8 weights stay what they are on a target that has a kernel."""
    from dsopt.compiler.fp8 import Fp8Tensor
    from dsopt.compiler.recipe import Recipe
    from dsopt.compiler.targets import find_target

    tensors = checkpoint.tensors
    coded = any(isinstance(tensor, Fp8Tensor) for tensor in tensors.values())
    if not coded or "fp8" not in find_target(target).linears[recipe.dtype]:
        return recipe
    head = "" if isinstance(tensors.get("lm_head.weight"), Fp8Tensor) else ",head=none"
    return Recipe.parse(f"fp8{head}").with_dtype(recipe.dtype)


_TEXTS = "--calib names a text file"
_PROFILES = "--profile names the dsopt.json of a model that a search compiled"


def _profile_file(path: Path) -> Path:
    return path / MANIFEST if path.is_dir() else path


def _digest(path: Path, what: str) -> str:
    from dsopt.runtime.errors import DsoptError
    from dsopt.runtime.files import sha256_file

    try:
        return sha256_file(path)[:8]
    except OSError as error:
        raise DsoptError(f"{path} could not be read ({error.strerror}); {what}") from error


def _open_drafter(draft: str | None) -> "DraftCheckpoint | None":
    if draft is None or draft == SELF:
        return None
    from dsopt.compiler.drafters.checkpoint import open_drafter

    return open_drafter(draft)


def note_rates(pruning: "Mapping[str, Any] | None") -> None:
    """What each kind of pruning costs for what it frees."""
    from dsopt.compiler.pruning.account import exchange_lines

    for line in exchange_lines(pruning) if pruning else ():
        note(line)
