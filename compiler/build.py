"""The compiler's front door: a checkpoint and a recipe in, an artifact out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dsopt.compiler import package
from dsopt.compiler.cache_reach import Reach, measure_reach
from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.corpus import self_windows
from dsopt.compiler.description import (
    describe_sizes,
    describe_weights,
    make_manifest,
    rounded_again,
    token_ids,
    with_rows,
)
from dsopt.compiler.drafters.build import DraftPlan, check_target, plan_drafter, write_drafter
from dsopt.compiler.drafters.checkpoint import DraftCheckpoint
from dsopt.compiler.export import export
from dsopt.compiler.models import find_family
from dsopt.compiler.passes import CLEAN, pipeline
from dsopt.compiler.passes.check_kernels import CheckKernels
from dsopt.compiler.passes.prune_blocks import PruneBlocks
from dsopt.compiler.passes.prune_features import PruneFeatures
from dsopt.compiler.passes.quantize_linears import Evidence
from dsopt.compiler.passes.rotate_values import RotateValues
from dsopt.compiler.passes.shorten_head import ShortenHead
from dsopt.compiler.passes.smooth_linears import SmoothLinears
from dsopt.compiler.passes.tie_embeddings import TieEmbeddings
from dsopt.compiler.passes.widen_logits import WidenLogits
from dsopt.compiler.probe import probed
from dsopt.compiler.pruning.account import describe_pruning
from dsopt.compiler.pruning.head import choose_head
from dsopt.compiler.pruning.options import NOTHING, Pruning, full_text
from dsopt.compiler.pruning.pruned import Pruned, prune
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.self_text import Calibrate
from dsopt.compiler.smoothing import Scales
from dsopt.compiler.weights import Weight
from dsopt.runtime.artifact import Manifest
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.tokenizer import Tokenizer

_DERIVED = ("rotary_emb.inv_freq",)  # some checkpoints store what the config already says


@dataclass(frozen=True)
class Plan:
    """A model ready to be written: the rewritten graph, its weights still unread, and its manifest so far."""

    model: ir.Model
    manifest: Manifest
    files: Mapping[str, bytes]
    drafter: DraftPlan | None = None
    drafts: Mapping[str, "Plan"] = field(default_factory=dict)  # smaller models to draft for this one, by directory

    @property
    def nbytes(self) -> int:
        """Size of the weights on disk."""
        inner = sum(draft.nbytes for draft in self.drafts.values()) + (self.drafter.nbytes if self.drafter else 0)
        return package.stored_bytes(self.model) + inner


def plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    pruning: Pruning | Pruned = NOTHING,
    *,
    draft: DraftCheckpoint | None = None,
    target: str = "cpu",
    evidence: Evidence | None = None,
    smoothing: Scales | None = None,
    rotated: Set[str] = frozenset(),
    reach: Sequence[Reach] | None = None,
    calibrate: Calibrate = self_windows,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Export and rewrite, computing no weight, unless there is to be pruned: that reads and decides by text.

    A recipe that says no float type gets the target's own. `evidence` tells what the inputs of each linear layer look
    like; `rotated` are the output projections whose inputs are to be rotated with the values that they are made of;
    `reach` is that of keys and values, where it is known, for a cache in int8.
    `calibrate` gives windows of token ids, all of one length, for a checkpoint; it is asked only where pruning needs
    text and was not decided before. With a drafter the graph gives the outputs of the layers that it reads, and it is
    compiled beside the model. `report` is told what is done. Raises DsoptError on a model that is not supported.
    """
    chosen = probed(target)
    recipe = recipe.with_dtype(chosen.check_dtype(recipe.said_dtype))
    family = find_family(checkpoint.config.get("model_type"))
    # A model that cannot be spoken to is not worth compiling: a broken tokenizer is an error now.
    Tokenizer.from_bytes(checkpoint.files["tokenizer.json"], checkpoint.source.path / "tokenizer.json")
    _check_names(checkpoint, family.Config.from_dict(checkpoint.config))
    checkpoint.check_no_biases()
    decided = pruning
    if isinstance(decided, Pruning):
        decided = prune(checkpoint, recipe, decided, chosen.name, calibrate, report)
    pruning, checkpoint = decided.pruning, decided.checkpoint
    config = family.Config.from_dict(checkpoint.config)
    if draft:
        _check_draft(draft, config, chosen.name, pruning)
    taps = draft.config.taps if draft else ()
    model = export(family.Model, config, taps)
    if config.tie_word_embeddings:
        TieEmbeddings()(model)
    _bind_weights(model, checkpoint, tied=config.tie_word_embeddings)
    passes = pipeline(recipe, chosen, evidence, reach or _reach(checkpoint, recipe, pruning, report))
    for step in passes[: len(CLEAN)]:
        step(model)
    nodes = describe_weights(model, recipe, tied=config.tie_word_embeddings)
    pruned, said = None, None
    if pruning:
        cuts = decided.cuts
        for step in (PruneFeatures(cuts.channels, cuts.groups, cuts.weights), PruneBlocks(cuts.removed)):
            step(model)
        if pruning.head:
            size = config.vocab_size
            said = choose_head(calibrate(checkpoint), round(pruning.head * size), size, token_ids(checkpoint, size)[1])
            ShortenHead(said)(model)
            fact = {"head": {"tokens": len(said), "of": config.vocab_size}}
            cuts = dataclasses.replace(cuts, steps={**cuts.steps, **fact})
        before = [with_rows(node, recipe, decided.whole.config["vocab_size"]) for node in nodes]
        nodes = describe_weights(model, recipe, tied=config.tie_word_embeddings and not pruning.head)
        vocab = decided.vocabulary.record if decided.vocabulary else {}
        pruned = describe_pruning(pruning.text, before, nodes, cuts, vocab)
    for line in rounded_again(checkpoint, nodes):
        report(line)
    sizes = describe_sizes(model, config) | ({"cache": recipe.cache} if recipe.cache != "float" else {})
    if smoothing:
        SmoothLinears(smoothing)(model)
    if rotated:
        RotateValues(rotated)(model)
    for step in passes[len(CLEAN) :]:
        step(model)
    if said is not None:
        WidenLogits(said, config.vocab_size)(model)
    CheckKernels(chosen)(model)
    text = full_text(recipe.text, pruning)
    manifest = make_manifest(checkpoint, config, text, chosen.name, sizes, nodes, pruned)
    files = {**checkpoint.files, "genai_config.json": package.genai_config(manifest)}
    if draft is None:
        return Plan(model, manifest, files)
    drafter = plan_drafter(draft, checkpoint, config, model, recipe)
    return Plan(model, dataclasses.replace(manifest, drafters=(drafter.directory,), taps=taps), files, drafter)


def _reach(
    checkpoint: Checkpoint, recipe: Recipe, pruning: Pruning, report: Callable[[str], None]
) -> list[Reach] | None:
    """What a cache in int8 is scaled by: the checkpoint is run for it."""
    if recipe.cache != "int8":
        return None
    if pruning.needs_text:
        raise DsoptError(f"--quant: cache=int8 is scaled by the whole model, not one pruned by {pruning.text}; leave "
                         "out one")  # fmt: skip
    report("measuring keys and values")
    return measure_reach(checkpoint)


def write(plan: Plan, out: Path, *, progress: package.Progress | None = None) -> Manifest:
    """Compute the weights and write them to a new directory, which then takes the place of `out`."""
    package.check_free_space(out, plan.nbytes)
    with package.written_aside(out) as aside:
        package.write_graph(plan.model, aside, progress)
        package.write_texts(aside, plan.files)
        drafter = write_drafter(plan.drafter, aside, progress) if plan.drafter else None
        inner = {name: write(draft, aside / name, progress=progress) for name, draft in plan.drafts.items()}
        manifest = dataclasses.replace(plan.manifest, files=package.describe_files(aside))
        package.seal(aside, manifest)
    package.remember_hashes(out, manifest.files)
    if plan.drafter and drafter:
        package.remember_hashes(out / plan.drafter.directory, drafter.files)
    for name, made in inner.items():
        package.remember_hashes(out / name, made.files)
    return manifest


def add_draft(plan: Plan, name: str, draft: Plan) -> Plan:
    """The plan with another one to be written to the directory `name` inside, as a drafter."""
    manifest = dataclasses.replace(plan.manifest, drafters=(*plan.manifest.drafters, name))
    return dataclasses.replace(plan, manifest=manifest, drafts={**plan.drafts, name: draft})


def _check_draft(draft: DraftCheckpoint, config: Any, target: str, pruning: Pruning) -> None:
    """Raises DsoptError where the drafter could not follow the model."""
    check_target(draft, config)
    if target != "cpu":
        raise DsoptError(f"--draft: drafters run on the cpu alone so far, the target is {target}; give --target cpu")
    if pruning:
        raise DsoptError(f"--draft: the drafter knows the whole model, not one pruned by {pruning.text}; leave out one")


def _check_names(checkpoint: Checkpoint, config: Any) -> None:
    """Before a graph of many layers is built: does the checkpoint have the last one?"""
    last = f"model.layers.{config.num_hidden_layers - 1}."
    if not any(name.startswith(last) for name in checkpoint.tensors):
        raise DsoptError(f"{checkpoint.source.path}: tensors {last}* are missing; config.json says "
                         f"{config.num_hidden_layers} layers")  # fmt: skip


def _bind_weights(model: ir.Model, checkpoint: Checkpoint, *, tied: bool) -> None:
    """Give each weight of the graph its tensor; every tensor of the checkpoint must have found its place."""
    unused = set(checkpoint.tensors) - {"lm_head.weight"} if tied else set(checkpoint.tensors)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            raise DsoptError(f"{checkpoint.source.path}: tensor {name} is missing")
        if value.shape is None or tuple(value.shape) != tensor.shape:
            raise DsoptError(
                f"{checkpoint.source.path}: tensor {name} is {list(tensor.shape)}, config.json says {value.shape}"
            )
        value.const_value = Weight(tensor, name)
        unused.discard(name)
    if left := sorted(name for name in unused if not name.endswith(_DERIVED)):
        raise DsoptError(
            f"{checkpoint.source.path}: tensors that this model type does not have: {', '.join(left[:3])}"
            f"{f' and {len(left) - 3} more' * (len(left) > 3)}"
        )
