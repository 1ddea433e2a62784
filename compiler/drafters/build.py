"""A drafter's checkpoint beside its target's: planned, quantized by the same recipe, written into the artifact."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from dsopt.compiler import package
from dsopt.compiler.checkpoint import Checkpoint, Tensor
from dsopt.compiler.drafters.checkpoint import DraftCheckpoint
from dsopt.compiler.drafters.graphs import candidates, export_drafter
from dsopt.compiler.drafters.quantize import passes
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.weights import Weight
from dsopt.runtime.artifact import GRAPH, WEIGHTS
from dsopt.runtime.drafters.manifest import DRAFT_MANIFEST, DraftManifest
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import hash_content

_MADE_WITH = ("dsopt", "torch", "onnx_ir", "onnxscript")
_OWN = "drafter."
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # compared together


@dataclass(frozen=True)
class DraftPlan:
    """Graphs by file name, weights unread, and the manifest so far. `shared`: initializers of the model's graph too."""

    models: Mapping[str, ir.Model]
    manifest: DraftManifest
    shared: frozenset[str]

    @property
    def directory(self) -> str:
        """Its name within the artifact."""
        return f"draft-{self.manifest.kind}"

    @property
    def nbytes(self) -> int:
        """Size of the weights on disk, without those of the model."""
        values = [value for model in self.models.values() for value in model.graph.initializers.values()]
        return sum(v.const_value.nbytes for v in values if v.const_value is not None and v.name not in self.shared)


def plan_drafter(
    draft: DraftCheckpoint, target: Checkpoint, target_config: Any, target_model: ir.Model, recipe: Recipe
) -> DraftPlan:
    """Export and rewrite. Embedding and head are compared with the target's, nothing else is read.

    Raises DsoptError when the drafter was made for another target, or its tensors are not those of its config.
    """
    check_target(draft, target_config)
    models = export_drafter(draft.config)
    names = _weight_names(draft, target, tied=target_config.tie_word_embeddings)
    _bind_weights(models, draft, names)
    for model in models.values():
        for step in passes(recipe):
            step(model)
        _name_tables(model, target_model)
    shared = frozenset(
        name for model in models.values() for name, value in model.graph.initializers.items()
        if not name.startswith(_OWN) and _is_same(value, target_model.graph.initializers.get(name))
    )  # fmt: skip
    return DraftPlan(models, _manifest(draft, recipe), shared)


def check_target(draft: DraftCheckpoint, target: Any) -> None:
    """Raises DsoptError unless the drafter reads a target of this shape."""
    config = draft.config
    for what, own, its in (
        ("vocabulary", config.decoder.vocab_size, target.vocab_size),
        ("width", config.decoder.hidden_size, target.hidden_size),
        ("number of layers", config.target_layers, target.num_hidden_layers),
    ):
        if own != its:
            raise DsoptError(f"{draft.source.path}: was made for a target with a {what} of {own}; this one has {its}")


def _weight_names(draft: DraftCheckpoint, target: Checkpoint, *, tied: bool) -> dict[str, str]:
    """The initializer of each tensor: the target's own where embedding and head hold the same numbers."""
    names = {name: _OWN + name for name in draft.tensors}
    embedding = f"model.{_EMBEDDING}"
    for own, its in ((_EMBEDDING, embedding), (_HEAD, embedding if tied else _HEAD)):
        if _equal(draft.tensors.get(own), target.tensors.get(its)):
            names[own] = its
    if names.get(_HEAD, "").startswith(_OWN) and _equal(draft.tensors.get(_HEAD), draft.tensors.get(_EMBEDDING)):
        names[_HEAD] = names[_EMBEDDING]
    return names


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    starts = range(0, a.shape[0], _ROWS)
    return all(np.array_equal(a.read(start, start + _ROWS), b.read(start, start + _ROWS)) for start in starts)


def _bind_weights(models: Mapping[str, ir.Model], draft: DraftCheckpoint, names: Mapping[str, str]) -> None:
    unused = set(draft.tensors)
    for model in models.values():
        for value in list(model.graph.initializers.values()):
            if value.const_value is None:
                name = str(value.name).removeprefix(_OWN)
                _bind(model.graph, value, draft, name, names.get(name, ""))
                unused.discard(name)
    if unused:
        raise DsoptError(f"{draft.source.path}: tensors that a {draft.config.kind} drafter does not have: "
                         f"{', '.join(sorted(unused)[:3])}")  # fmt: skip


def _bind(graph: ir.Graph, value: ir.Value, draft: DraftCheckpoint, name: str, stored: str) -> None:
    tensor = draft.tensors.get(name)
    if tensor is None:
        raise DsoptError(f"{draft.source.path}: tensor {name} is missing")
    if value.shape is None or tuple(value.shape) != tensor.shape:
        raise DsoptError(f"{draft.source.path}: tensor {name} is {list(tensor.shape)}, config.json says {value.shape}")
    graph.initializers.pop(str(value.name))
    if stored in graph.initializers:  # a head that is the embedding
        value.replace_all_uses_with(graph.initializers[stored])
        return
    value.name, value.const_value = stored, Weight(tensor, stored)
    graph.initializers.add(value)


def _name_tables(model: ir.Model, target: ir.Model) -> None:
    """Rotary tables by the names of equal ones of the target, which may have several."""
    values = model.graph.initializers
    for name, value in list(values.items()):
        first, _, part = name.partition(".")
        theirs = [n for n in target.graph.initializers if n.startswith(f"{first}.") and n.endswith(f".{part}")]
        same = [n for n in theirs if first == "rotary" and _is_same(value, target.graph.initializers[n])]
        if same and name not in same:
            values.pop(name)
            value.name = same[0]
            values.add(value)


def _is_same(value: ir.Value, other: ir.Value | None) -> bool:
    mine, its = value.const_value, other.const_value if other is not None else None
    if mine is None or its is None or (mine.shape, mine.dtype) != (its.shape, its.dtype):
        return False
    lazy = isinstance(mine, ir.LazyTensor) and isinstance(its, ir.LazyTensor)
    return lazy or np.array_equal(mine.numpy(), its.numpy())


def _manifest(draft: DraftCheckpoint, recipe: Recipe) -> DraftManifest:
    config, source = draft.config, draft.source
    shape = config.decoder
    return DraftManifest(
        kind=config.kind,
        name=source.name,
        recipe=recipe.text,
        source={"kind": source.kind, "name": source.name, "sha256": source.sha256},
        model={
            "layers": shape.num_hidden_layers,
            "hidden_size": shape.hidden_size,
            "kv_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab_size,
            "context_length": shape.max_position_embeddings,
        },
        taps=config.taps,
        steps=config.steps,
        mask_token=config.mask_token,
        candidates=candidates(config),
        confidence=config.confidence,
        target_weights="",
        borrowed={},
        files={},
        versions={name: version(name) for name in _MADE_WITH},
    )


def write_drafter(plan: DraftPlan, artifact: Path, progress: package.Progress | None = None) -> DraftManifest:
    """Write the drafter into the directory `artifact`, where the model's graph and weights stand already."""
    directory = artifact / plan.directory
    directory.mkdir()
    stored = _stored(artifact)
    borrowed = {}
    for file, model in plan.models.items():
        taken = {name: stored[name] for name in model.graph.initializers if name in plan.shared and name in stored}
        _write(model, directory, file, taken, progress)
        borrowed[file] = {name: _place(tensor) for name, tensor in taken.items()}
    manifest = replace(
        plan.manifest,
        target_weights=hash_content(artifact / WEIGHTS),
        borrowed=borrowed,
        files=package.describe_files(directory),
    )
    (directory / DRAFT_MANIFEST).write_bytes(manifest.to_json())
    return manifest


def _stored(artifact: Path) -> dict[str, ir.ExternalTensor]:
    """What stands in the model's weights file, and where."""
    values = ir.load(artifact / GRAPH).graph.initializers
    return {name: v.const_value for name, v in values.items() if isinstance(v.const_value, ir.ExternalTensor)}


def _write(
    model: ir.Model,
    directory: Path,
    file: str,
    borrowed: Mapping[str, ir.ExternalTensor],
    progress: package.Progress | None,
) -> None:
    """The borrowed initializers are left out of the weights; the graph names the model's file for them."""
    left_out = [model.graph.initializers.pop(name) for name in borrowed]
    package.write_graph(model, directory, progress, file)
    for value in left_out:
        model.graph.initializers.add(value)
    proto = onnx.load(directory / file, load_external_data=False)
    for name, tensor in borrowed.items():
        place = ir.ExternalTensor(
            f"../{WEIGHTS}", tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name
        )
        proto.graph.initializer.append(ir.serde.serialize_tensor(place))
    onnx.save(proto, directory / file)


def _place(tensor: ir.ExternalTensor) -> dict[str, Any]:
    return {"offset": tensor.offset, "shape": list(tensor.shape.numpy()), "dtype": tensor.dtype.numpy().name}
