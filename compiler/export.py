"""From a family's torch code to one ONNX graph without weights.

Each distinct block is traced once under fake tensors and stitched wherever the model has one like it, so the time
does not grow with the depth and no weight is in memory. Names and shapes of inputs and outputs follow
onnxruntime-genai's contract (its `genai_config.json` documentation), with one more input of dsopt's own:
`logits_start`, an initializer that a caller may override, so that a prefill computes the logits of one row.
"""

import ast
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsopt.compiler.models import kinds_of
from dsopt.compiler.passes.fold_shapes import FoldShapes
from dsopt.compiler.weights import initializer

OPSET = 23
DOMAIN = "com.microsoft"


def export(build: Callable[[Any], nn.Module], config: Any, taps: Sequence[int] = ()) -> ir.Model:
    """Trace `build(config)` (a family's `Model`) and stitch the whole decoder.

    For each layer of `taps` (-1 for the embedding) there is an output `tap.N`, float32 [batch, sequence, hidden]: the
    hidden state behind the layer, both residuals added. Drafters read them. Weight initializers are named as in the
    checkpoint and have no content yet; the rotary tables have theirs.
    """
    # Untied, or the one parameter of embedding and head would appear under one name only.
    config = dataclasses.replace(config, tie_word_embeddings=False)
    kinds = kinds_of(config)
    with FakeTensorMode():
        graph = trace(_Parts([build(kind) for kind in kinds]), _example(kinds), named=_NAMED)
    return _Stitcher(config, kinds, graph).stitch(taps)


_NAMED = 5  # inputs of `_Parts` before those that each kind of block has


class _Parts(nn.Module):
    """Embedding, head and the kinds of blocks side by side, unconnected: one trace for all (each costs a second of
    set-up)."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        first = models[0]
        self.embed, self.norm, self.lm_head = first.model.embed_tokens, first.model.norm, first.lm_head
        for kind, model in enumerate(models):
            self.add_module(f"block{kind}", model.model.layers[0])
        self._kinds = len(models)

    def forward(
        self,
        ids: torch.Tensor,
        last: torch.Tensor,
        x: torch.Tensor,
        lengths: torch.Tensor,
        total: torch.Tensor,
        *state: torch.Tensor,
    ) -> Any:
        made = [self.embed(ids), self.lm_head(self.norm(last))]
        for kind in range(self._kinds):
            key, value, cos, sin = state[4 * kind : 4 * kind + 4]
            made += self.get_submodule(f"block{kind}")(x, key, value, lengths, total, cos, sin)
        return made


def _example(kinds: Sequence[Any]) -> "Example":
    """Inputs of `_Parts` and, for each, the dimensions that are free."""
    ids = (torch.empty(2, 3, dtype=torch.int64), (0, 1))
    hidden = [(torch.empty(2, 3, kinds[0].hidden_size), (0, 1)) for _ in range(2)]
    lengths, total = (torch.empty(2, dtype=torch.int32), (0,)), (torch.empty((), dtype=torch.int32), ())
    state: Example = []
    for kind in kinds:
        state += [(torch.empty(2, kind.num_key_value_heads, 4, kind.head_dim), (0, 2)) for _ in range(2)]
        state += [(torch.empty(kind.max_position_embeddings, kind.head_dim // 2), ()) for _ in range(2)]
    return [ids, *hidden, lengths, total, *state]


Example = list[tuple[torch.Tensor, tuple[int, ...]]]


def trace(module: nn.Module, example: Example, named: int = 0) -> ir.Graph:
    """The graph of `module` called with the tensors of `example`, each with the dimensions of it that are free.

    `named` of its parameters have names of their own, the others come by `*`.
    """
    inputs, free = zip(*example, strict=True)
    shapes = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in free]
    rest = (tuple(shapes[named:]),) if len(shapes) > named else ()
    with _quiet():
        exported = torch.export.export(module, inputs, dynamic_shapes=(*shapes[:named], *rest), strict=False)
        program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False, optimize=False)
    assert program is not None
    FoldShapes()(program.model)
    return program.model.graph


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs and warns about its own insides; stderr belongs to the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Stitcher:
    """Builds the decoder graph: mask arithmetic, embedding, the block for each layer, the head."""

    def __init__(self, config: Any, kinds: Sequence[Any], traced: ir.Graph) -> None:
        self.config, self.kinds = config, kinds
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="decoder")
        self.names: set[str] = set()
        ids, last, x, lengths, total, *state = traced.inputs
        embedded, logits, *made = traced.outputs
        self.embed = _Part(traced, [ids], [embedded], {"embed": "model.embed_tokens"})
        self.blocks = []
        for kind in range(len(kinds)):
            key, value, *tables = state[4 * kind : 4 * kind + 4]
            inputs, outputs = [x, key, value, lengths, total, *tables], made[3 * kind : 3 * kind + 3]
            self.blocks.append(_Part(traced, inputs, outputs, {f"block{kind}": ""}))
        self.head = _Part(traced, [last], [logits], {"norm": "model.norm", "lm_head": "lm_head"})

    def stitch(self, taps: Sequence[int]) -> ir.Model:
        ids = self._input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        lengths, tables = self._mask_arithmetic(), [self._tables(number) for number in range(len(self.kinds))]
        (x,) = self._append(self.embed, "", [ids])
        presents: list[ir.Value] = []
        hidden = {-1: x}
        for layer in range(self.config.num_hidden_layers):
            past = [self._cache_input(layer, part) for part in ("key", "value")]
            kind = self.kinds.index(self.config.layer(layer))
            inputs = [x, *past, *lengths, *tables[kind]]
            x, *present = self._append(self.blocks[kind], f"model.layers.{layer}", inputs)
            hidden[layer] = x
            presents += [self._cache_output(layer, *pair) for pair in zip(("key", "value"), present, strict=True)]
        self.graph.outputs.append(self._logits(x))
        self.graph.outputs.extend(presents)
        self.graph.outputs.extend(self._tap(layer, hidden[layer]) for layer in taps)
        return ir.Model(self.graph, ir_version=10, producer_name="dsopt")

    def _input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self.graph.inputs.append(value)
        return value

    def _cache_input(self, layer: int, part: str) -> ir.Value:
        own = self.config.layer(layer)
        shape = ["batch", own.num_key_value_heads, "past_length", own.head_dim]
        return self._input(f"past_key_values.{layer}.{part}", ir.DataType.FLOAT, shape)

    def _cache_output(self, layer: int, part: str, value: ir.Value) -> ir.Value:
        own = self.config.layer(layer)
        value.name = f"present.{layer}.{part}"
        value.shape = ir.Shape(["batch", own.num_key_value_heads, "total_length", own.head_dim])
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value

    def _constant(self, name: str, value: np.ndarray) -> ir.Value:
        return initializer(self.graph, ir.tensor(value, name=name))

    def _node(self, op: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes, outputs=[ir.Value(name=name)], name=f"{name}/{op}")
        self.graph.append(node)
        return node.outputs[0]

    def _mask_arithmetic(self) -> list[ir.Value]:
        """attention_mask [batch, total] -> seqlens_k int32 [batch], total length int32 []."""
        mask = self._input("attention_mask", ir.DataType.INT64, ["batch", "total_length"])
        one = self._constant("constant.one", np.array([1], np.int64))
        ones = self._node("ReduceSum", [mask, one], "attention_mask.sum", keepdims=0)
        lengths = self._node("Sub", [ones, one], "attention_mask.last")
        seqlens_k = self._node("Cast", [lengths], "seqlens_k", to=ir.DataType.INT32)
        shape = self._node("Shape", [mask], "attention_mask.shape", start=1, end=2)
        length = self._node("Squeeze", [shape], "attention_mask.length")
        total = self._node("Cast", [length], "total_length", to=ir.DataType.INT32)
        return [seqlens_k, total]

    def _tables(self, number: int) -> list[ir.Value]:
        """Cosines and sines of a kind of block."""
        kind, prefix = self.kinds[number], f"rotary.{number}" if number else "rotary"
        tables = zip(("cos", "sin"), kind.rotary(kind.max_position_embeddings), strict=True)
        return [self._constant(f"{prefix}.{name}", table.numpy()) for name, table in tables]

    def _logits(self, x: ir.Value) -> ir.Value:
        start = self._constant("logits_start", np.array([0], np.int64))
        self.graph.inputs.append(start)  # input *and* initializer: a default that a caller may override
        end = self._constant("constant.end", np.array([np.iinfo(np.int64).max], np.int64))
        axis = self.graph.initializers["constant.one"]
        (logits,) = self._append(self.head, "", [self._node("Slice", [x, start, end, axis], "logits_rows")])
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        # A row symbol of its own: were it the literal 1, onnxruntime-genai would take the head for a pruned one.
        logits.shape = ir.Shape(["batch", "logits_length", self.config.vocab_size])
        return logits

    def _tap(self, layer: int, x: ir.Value) -> ir.Value:
        x.name, x.type = f"tap.{layer}", ir.TensorType(ir.DataType.FLOAT)
        x.shape = ir.Shape(["batch", "sequence", self.config.hidden_size])
        return x

    def _append(self, part: "_Part", prefix: str, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Clone a traced part into the graph with its inputs bound; returns its outputs there."""
        values = dict(zip(part.inputs, inputs, strict=True))
        for old in part.weights:
            name = _join(prefix, part.rename(old.name or ""))
            values[old] = ir.Value(name=name, shape=old.shape, type=old.type)
            self.graph.initializers.add(values[old])
        for node in part.nodes:
            self._clone(node, _join(prefix, part.rename(module_path(node))), values)
        return [values[output] for output in part.outputs]

    def _clone(self, node: ir.Node, path: str, values: dict[ir.Value, ir.Value]) -> None:
        name = self._unique(f"{path}/{node.op_type}")
        outputs = [ir.Value(name=f"{name}.{i}" if i else name, type=out.type) for i, out in enumerate(node.outputs)]
        inputs = [None if value is None else values[value] for value in node.inputs]
        self.graph.append(
            ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs, name=name)
        )
        values.update(zip(node.outputs, outputs, strict=True))

    def _unique(self, name: str) -> str:
        count = 1
        while (candidate := name if count == 1 else f"{name}_{count}") in self.names:
            count += 1
        self.names.add(candidate)
        return candidate


class _Part:
    """The nodes and weights of a traced graph that some of its outputs need."""

    def __init__(
        self, traced: ir.Graph, inputs: list[ir.Value], outputs: list[ir.Value], names: dict[str, str]
    ) -> None:
        self.inputs, self.outputs, self._names = inputs, outputs, names
        needed = set(outputs)
        for node in reversed(traced):
            if needed.intersection(node.outputs):
                needed.update(value for value in node.inputs if value is not None)
        self.nodes = [node for node in traced if needed.intersection(node.outputs)]
        self.weights = [value for value in traced.initializers.values() if value in needed]

    def rename(self, path: str) -> str:
        """`lm_head.weight` of the trace -> its name in the checkpoint, relative to the part's prefix."""
        first, _, rest = path.partition(".")
        return _join(self._names[first], rest)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def module_path(node: ir.Node) -> str:
    """`self_attn.q_proj`: the innermost module among the scopes that torch records on each node."""
    scopes = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
    return next((scope for scope in reversed(scopes[:-1]) if scope), "")
