"""x W^T -> r * ((x / r) W^T), r the largest absolute value of each row of x: one activation scale for each token.

DynamicQuantizeMatMul has one scale for all rows of a run; a token with large values would leave the others few codes.
Rows that span the same range share a scale without loss. What it costs is five operators over the activations, so the
formats with a scale for each token are for inputs that no norm has made alike: the context of attention, the MLP's
product. Source: per-token activation scales (ZeroQuant, arXiv:2206.01861).
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.kernels import format_of
from dsopt.compiler.weights import initializer

_SMALLEST = 1e-20  # of a row of zeros


class ScaleRows(ir.passes.InPlacePass):
    """Of every linear layer whose format is per token; what it reads becomes shared by none but itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if (form := format_of(node)) is not None and form.per_token]
        constants = row_constants(model.graph) if found else []
        for node in found:
            _scale(model.graph, node, constants)
        return ir.passes.PassResult(model, modified=bool(found))


def _scale(graph: ir.Graph, node: ir.Node, constants: list[ir.Value]) -> None:
    x, y, place = node.inputs[0], node.outputs[0], (node.name or "").rpartition("/")[0]
    assert x is not None
    before, largest = row_scales(x, constants)
    after = ir.node("Mul", [y, largest])
    name, after.outputs[0].shape = y.name, y.shape
    y.replace_all_uses_with(after.outputs[0], replace_graph_outputs=True)
    after.replace_input_with(0, y)
    node.replace_input_with(0, before[-1].outputs[0])
    for made in (*before, after):
        made.name = f"{place}/{made.op_type}.rows"
        made.outputs[0].name = f"{made.name}.out"
        made.outputs[0].type = y.type or x.type
    y.name, after.outputs[0].name = f"{name}.unscaled", name  # a graph's output keeps its name
    graph.insert_before(node, before)
    graph.insert_after(node, after)


def row_constants(graph: ir.Graph) -> list[ir.Value]:
    """The axes that rows have, int64 [1], and what a row is divided by at least, a scalar."""
    return [
        initializer(graph, ir.tensor(np.array([-1], np.int64), name="rows.axes")),
        initializer(graph, ir.tensor(np.array(_SMALLEST, np.float32), name="rows.smallest")),
    ]


def row_scales(x: ir.Value, constants: list[ir.Value]) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that bring each row of x into [-1, 1], the last being the quotient; and what each row was divided by.

    `constants` are those of the graph.
    """
    axes, smallest = constants
    absolute = ir.node("Abs", [x])
    largest = ir.node("ReduceMax", [absolute.outputs[0], axes], {"keepdims": 1})
    divisor = ir.node("Max", [largest.outputs[0], smallest])
    quotient = ir.node("Div", [x, divisor.outputs[0]])
    return [absolute, largest, divisor, quotient], divisor.outputs[0]
