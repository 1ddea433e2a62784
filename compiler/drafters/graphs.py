"""The graphs of a drafter, traced whole: a few layers are not worth stitching.

Weights are named `drafter.` and as in the checkpoint, and have no content yet; the rotary tables have theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsopt.compiler.drafters import dspark, eagle3
from dsopt.compiler.drafters.config import DraftConfig
from dsopt.compiler.export import DOMAIN, OPSET, Example, module_path, trace
from dsopt.compiler.weights import initializer

_STATE = ("seqlens_k", "total_length")
_TABLES = ("rotary.cos", "rotary.sin")


def export_drafter(config: DraftConfig) -> dict[str, ir.Model]:
    """By file name: `context.onnx` and, for DSpark and DFlash, `block.onnx`, for Eagle3 `step.onnx`.

    Inputs and outputs are those of the modules in `dspark` and `eagle3`; a cache is named as the target's.
    """
    with FakeTensorMode():
        drafter, parts = _eagle3(config) if config.kind == "eagle3" else _dspark(config)
        example = [entry for part in parts for entry in part.example]
        graph = trace(_SideBySide(drafter, parts), example)
    models, used_in, used_out = {}, 0, 0
    for part in parts:
        inputs, outputs = range(used_in, used_in + len(part.inputs)), range(used_out, used_out + len(part.outputs))
        models[part.file] = _finish(config, _cut(graph.clone(), inputs, outputs), part)
        used_in, used_out = inputs.stop, outputs.stop
    return models


@dataclass(frozen=True)
class _Part:
    """A graph to be: the module, its example, the names of what goes in and comes out."""

    file: str
    module: nn.Module
    example: Example
    inputs: list[str]
    outputs: list[str]


class _SideBySide(nn.Module):
    """One trace for all graphs: each costs a second of set-up."""

    def __init__(self, drafter: nn.Module, parts: Sequence[_Part]) -> None:
        super().__init__()
        self.drafter = drafter
        self._parts = tuple((part.module, len(part.inputs)) for part in parts)  # in a tuple: no modules of this one

    def forward(self, *values: torch.Tensor) -> list[torch.Tensor]:
        made, used = [], 0
        for module, count in self._parts:
            made += module(*values[used : used + count])
            used += count
        return made


def _cut(graph: ir.Graph, inputs: range, outputs: range) -> ir.Graph:
    """What is needed for some of the outputs."""
    kept_in, kept_out = (
        [values[i] for i in kept] for values, kept in ((graph.inputs, inputs), (graph.outputs, outputs))
    )
    graph.outputs[:] = kept_out
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
    graph.inputs[:] = kept_in
    return graph


def _dspark(config: DraftConfig) -> tuple[nn.Module, list[_Part]]:
    drafter = dspark.Drafter(config)
    ids = (torch.empty(1, config.steps, dtype=torch.int64), ())
    noise = (torch.empty(config.steps, candidates(config), dtype=torch.float64), ())
    start = (torch.empty(1, dtype=torch.int64), ())
    layers = config.decoder.num_hidden_layers
    rows = [f"{part}.{layer}" for layer in range(layers) for part in ("key", "value")]
    drawn = ["tokens", "candidates", "logits", *["confidence"] * config.confidence]
    context = _Part(
        "context.onnx", dspark.Context(drafter), [_hidden(config, len(config.taps)), start, *_tables(config)],
        ["hidden", "start", *_TABLES], rows,
    )  # fmt: skip
    block = _Part(
        "block.onnx", dspark.Block(drafter), [ids, noise, *_state(), *_tables(config), *_cache(config)],
        ["input_ids", "noise", *_STATE, *_TABLES, *_names(layers, "past_key_values")],
        [*drawn, *_names(layers, "present")],
    )  # fmt: skip
    return drafter, [context, block]


def _eagle3(config: DraftConfig) -> tuple[nn.Module, list[_Part]]:
    drafter = eagle3.Drafter(config)
    ids = (torch.empty(1, 3, dtype=torch.int64), (1,))
    context = _Part(
        "context.onnx", eagle3.Context(drafter), [_hidden(config, len(config.taps))], ["hidden"], ["context"]
    )
    step = _Part(
        "step.onnx", eagle3.Step(drafter), [_hidden(config, 1), ids, *_state(), *_tables(config), *_cache(config)],
        ["context", "input_ids", *_STATE, *_TABLES, *_names(1, "past_key_values")],
        ["last", "candidates", "logits", *_names(1, "present")],
    )  # fmt: skip
    return drafter, [context, step]


def candidates(config: DraftConfig) -> int:
    """Tokens that a row's choice is made among."""
    return min(dspark.CANDIDATES, config.decoder.vocab_size)


def _hidden(config: DraftConfig, count: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    return torch.empty(1, 3, count * config.decoder.hidden_size), (1,)


def _state() -> Example:
    return [(torch.empty(1, dtype=torch.int32), ()), (torch.empty((), dtype=torch.int32), ())]


def _tables(config: DraftConfig) -> Example:
    shape = config.decoder
    return [(torch.empty(shape.max_position_embeddings, shape.head_dim // 2), ()) for _ in _TABLES]


def _cache(config: DraftConfig) -> Example:
    shape = config.decoder
    one = (1, shape.num_key_value_heads, 9, shape.head_dim)
    return [(torch.empty(one), (2,)) for _ in range(2 * shape.num_hidden_layers)]


def _names(layers: int, prefix: str) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _finish(config: DraftConfig, graph: ir.Graph, part: _Part) -> ir.Model:
    _name_nodes(graph)
    for weight in graph.initializers.values():
        weight.const_value = None  # fake ones
    for values, names in ((graph.inputs, part.inputs), (graph.outputs, part.outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
            if value.shape is not None and any(not isinstance(size, int) for size in value.shape):
                free = "capacity" if name.startswith(("past", "present")) else "rows"
                value.shape = ir.Shape([size if isinstance(size, int) else free for size in value.shape])
    for name, table in zip(_TABLES, config.decoder.rotary(config.decoder.max_position_embeddings), strict=True):
        _fix_input(graph, name, table)
    graph.opset_imports.update({"": OPSET, DOMAIN: 1})
    return ir.Model(graph, ir_version=10, producer_name="dsopt")


def _name_nodes(graph: ir.Graph) -> None:
    """As the decoder's: module and operator."""
    used: dict[str, int] = {}
    for node in graph:
        name = f"{module_path(node) or 'drafter'}/{node.op_type}"
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}.{index}" if index else node.name


def _fix_input(graph: ir.Graph, name: str, table: torch.Tensor) -> None:
    """An input that is always the same becomes an initializer."""
    given = next((value for value in graph.inputs if value.name == name), None)
    if given is None:
        return
    graph.inputs.remove(given)
    given.name = None
    given.replace_all_uses_with(initializer(graph, ir.tensor(table.numpy(), name=name)))
