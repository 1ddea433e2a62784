"""x + sublayer(norm(x)) -> x, for sublayers that were removed. The cache's names stay consecutive.

An attention that goes takes its cache along, so the numbers in `past_key_values.N` count the attentions that are left;
weights keep the checkpoint's names. onnxruntime-genai knows a number of caches only, and finds those.
"""

import re
from collections.abc import Collection

import onnx_ir as ir

from dsopt.compiler.pruning.stream import Sublayer
from dsopt.compiler.roles import find_linears

_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


class PruneBlocks(ir.passes.InPlacePass):
    def __init__(self, removed: Collection[Sublayer]) -> None:
        super().__init__()
        self.removed = removed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for linear in find_linears(graph):
            if linear.role in ("o", "down") and Sublayer(linear.layer or 0, linear.role == "down") in self.removed:
                _bypass(linear.node)
        gone = [layer for layer, mlp in self.removed if not mlp]
        _remove_caches(graph, {f"{layer}" for layer in gone})
        ir.passes.common.RemoveUnusedNodesPass()(model)
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_input():
                graph.initializers.pop(name)
        _renumber(graph)
        return ir.passes.PassResult(model, modified=bool(self.removed))


def _bypass(last: ir.Node) -> None:
    """The sum that the last linear layer's output enters becomes its other side."""
    output = last.outputs[0]
    (add,) = output.consumers()
    assert add.op_type == "Add", f"{last.name} goes into {add.op_type}"
    other = next(value for value in add.inputs if value is not output)
    assert other is not None
    add.outputs[0].replace_all_uses_with(other)


def _remove_caches(graph: ir.Graph, layers: set[str]) -> None:
    for values in (graph.inputs, graph.outputs):
        for value in list(values):
            if (match := _CACHE.fullmatch(value.name or "")) and match[2] in layers:
                values.remove(value)


def _renumber(graph: ir.Graph) -> None:
    """Caches 0, 1, 2 ... in the order of their layers."""
    for values in (graph.inputs, graph.outputs):
        found = [(value, match) for value in values if (match := _CACHE.fullmatch(value.name or ""))]
        places = {layer: place for place, layer in enumerate(sorted({int(match[2]) for _, match in found}))}
        for value, match in found:
            value.name = f"{match[1]}.{places[int(match[2])]}.{match[3]}"
