"""What a compiled model says of itself: its weights by module, its sizes, the manifest."""

import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import onnx_ir as ir

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.fp8 import Fp8Tensor
from dsopt.compiler.gguf import FLOAT_TYPES, GgufTensor
from dsopt.compiler.models import family_name
from dsopt.compiler.passes.quantize_linears import is_exact, module_name
from dsopt.compiler.passes.tie_embeddings import EMBEDDING
from dsopt.compiler.recipe import HEAD, Format, Recipe
from dsopt.compiler.roles import find_linears
from dsopt.compiler.weights import Weight
from dsopt.runtime.artifact import Manifest
from dsopt.runtime.errors import DsoptError

_MADE_WITH = ("dsopt", "torch", "onnx_ir", "onnxscript")


def rounded_again(checkpoint: Checkpoint, nodes: list[dict[str, Any]]) -> list[str]:
    """A line for each quantized type of the checkpoint whose weights another format will hold: a loss of its own.

    Codes that become floats lose nothing; but a checkpoint in float8 is chosen for its size, so that is said too.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        name = "model.embed_tokens" if f"{node['name']}.weight" not in checkpoint.tensors else node["name"]
        tensor, form = checkpoint.tensors[f"{name}.weight"], Format.parse(node["format"])
        coded = isinstance(tensor, GgufTensor) and tensor.dtype not in FLOAT_TYPES and form.kernel != "none"
        if coded or isinstance(tensor, Fp8Tensor):
            counts[(tensor.dtype, node["format"])] += not is_exact(tensor, form)
    return [
        f"{count} weights stored as {dtype} become floats; --target cuda --quant fp8 keeps them"
        if form == "none"
        else f"{count} weights stored as {dtype} are rounded again to {form}; dsopt compare tells what that costs"
        for (dtype, form), count in counts.items()
        if count
    ]


def describe_weights(model: ir.Model, recipe: Recipe, *, tied: bool) -> list[dict[str, Any]]:
    """An entry a matrix: each linear layer, and the embedding (0 bytes where it is stored as the head)."""
    linears, width = find_linears(model.graph), recipe.float_bytes
    nodes = [_entry(x.name, x.role, x.layer, x.size, recipe.format(x.role, module_name(x)), width) for x in linears]
    hidden, shape = linears[-1].size[1], model.graph.initializers[EMBEDDING].shape
    vocab = int(shape[0]) if shape is not None else 0  # type: ignore[arg-type]
    embedding = recipe.embedding(hidden)
    nodes.append(_entry("model.embed_tokens", "embed", None, (vocab, hidden), embedding, width))
    if tied and embedding == recipe.format("head", HEAD):
        nodes[-1]["bytes"] = 0
    return nodes


def _entry(name: str, role: str, layer: int | None, size: tuple[int, int], form: Format, width: int) -> dict[str, Any]:
    name = "lm_head" if role == "head" else name
    return {"name": name, "role": role, "layer": layer, "shape": list(size), "format": str(form),
            "bytes": form.nbytes(*size, width)}  # fmt: skip


def with_rows(node: dict[str, Any], recipe: Recipe, vocab: int) -> dict[str, Any]:
    """A node's entry, the head's as if its vocabulary were `vocab`."""
    if node["role"] != "head":
        return node
    return {**node, "bytes": recipe.format("head", HEAD).nbytes(vocab, node["shape"][1], recipe.float_bytes)}


def _cache_shape(attention: ir.Node) -> ir.Shape:
    past = attention.inputs[3]
    assert past is not None
    assert past.shape is not None
    return past.shape


def describe_sizes(model: ir.Model, config: Any) -> dict[str, Any]:
    """The manifest's `model`. Layers are those with a cache, which is what a runtime allocates; see `pruning`."""
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if not attentions:
        raise DsoptError("--prune: no attention would be left; ask for less")
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    caches = [[int(size) for size in (shape[1], shape[3])] for shape in map(_cache_shape, attentions)]  # type: ignore[arg-type]
    return {
        "layers": len(attentions),
        "hidden_size": config.hidden_size,
        "heads": attentions[0].attributes["num_heads"].as_int(),
        "kv_heads": caches[0][0],
        "head_dim": caches[0][1],
        **({} if caches == caches[:1] * len(caches) else {"caches": caches}),
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "parameters": sum(weight.size for weight in weights if isinstance(weight, Weight)),
    }


def make_manifest(
    checkpoint: Checkpoint,
    config: Any,
    recipe: str,
    target: str,
    sizes: dict[str, Any],
    nodes: list[dict[str, Any]],
    pruning: Mapping[str, Any] | None,
) -> Manifest:
    source = checkpoint.source
    bos, eos = token_ids(checkpoint, config.vocab_size)
    return Manifest(
        name=source.name,
        recipe=recipe,
        target=target,
        family=family_name(str(checkpoint.config["model_type"])),
        source={"kind": source.kind, "name": source.name, "sha256": source.sha256},
        model=sizes,
        bos=bos,
        eos=eos,
        nodes=tuple(nodes),
        files={},
        versions={name: version(name) for name in _MADE_WITH},
        pruning=pruning,
    )


def token_ids(checkpoint: Checkpoint, vocab_size: int) -> tuple[int | None, tuple[int, ...]]:
    """bos and the set of eos ids: generation_config.json has the last word, as in transformers."""
    generation = json.loads(checkpoint.files.get("generation_config.json", b"{}"))
    fields = {**checkpoint.config, **{key: value for key, value in generation.items() if value is not None}}
    eos = fields.get("eos_token_id")
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    if not eos or not all(_is_token(token, vocab_size) for token in eos):
        raise DsoptError(f"{checkpoint.source.path}: eos_token_id {eos} is not in the vocabulary of {vocab_size}")
    bos = fields.get("bos_token_id")
    return (bos if _is_token(bos, vocab_size) else None), eos


def _is_token(value: object, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size
