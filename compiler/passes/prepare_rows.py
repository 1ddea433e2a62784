"""x W^T -> r * ((x / r) W^T), r the size of each row of x; x W^T -> (x R) (W R)^T, R orthogonal.

DynamicQuantizeMatMul has one scale for all rows of a run; a token with large values would leave the others few codes.
Rows that span the same range share a scale without loss. Formats with a scale for each token are for inputs that no
norm has made alike: the context of attention, the MLP's product. Source: per-token activation scales (ZeroQuant,
arXiv:2206.01861).

`-token` divides by the largest value, with five operators around the kernel. `-rot` rotates channels in blocks
(rotation.py): three operators, of which two move nothing. Behind it rows have no values that stand out, and for
`-token-rot` their root mean square does as well: the norm that divides by it gives its inverse too.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from dsopt.compiler.kernels import format_of
from dsopt.compiler.recipe import Format
from dsopt.compiler.rotation import rotation, run_time_block
from dsopt.compiler.weights import constant

SMALLEST = 1e-20  # that a row is divided by, should it be zeros: of its largest value, of its mean square

_ROTATION = "rows.rotation"  # the matrix in a graph


class Prepared(NamedTuple):
    """`nodes` make of rows what the kernel reads, the last one's first output; what it gives is to be multiplied or
    divided (`undo`) by `size`, where there is one."""

    nodes: list[ir.Node]
    undo: str = ""
    size: ir.Value | None = None

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    def after(self, y: ir.Value) -> list[ir.Node]:
        """What follows the kernel's output y."""
        return [] if self.size is None else [ir.node(self.undo, [y, self.size])]


class PrepareRows(ir.passes.InPlacePass):
    """Before every linear layer whose format has it; what such a layer reads becomes shared by none but itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(node, form) for node in model.graph if (form := format_of(node)) and prepares_rows(form)]
        for node, form in found:
            _prepare(model.graph, node, form)
        return ir.passes.PassResult(model, modified=bool(found))


def prepares_rows(form: Format) -> bool:
    return form.per_token or form.rotated


def _prepare(graph: ir.Graph, node: ir.Node, form: Format) -> None:
    x, y, place = node.inputs[0], node.outputs[0], (node.name or "").rpartition("/")[0]
    codes = node.inputs[1]
    assert x is not None
    assert codes is not None
    assert codes.shape is not None
    rows = prepared_rows(graph, x, form, int(codes.shape[0]))  # type: ignore[arg-type]
    after = rows.after(y)
    for number, made in enumerate([*rows.nodes, *after]):
        made.name = f"{place}/{made.op_type}.rows.{number}"
        for output in made.outputs:
            output.name, output.type = f"{made.name}.{output.index()}", y.type or x.type
    for last in after:
        name, output = y.name, last.outputs[0]
        output.shape = y.shape
        y.replace_all_uses_with(output, replace_graph_outputs=True)
        last.replace_input_with(0, y)
        y.name, output.name = f"{name}.unscaled", name  # a graph's output keeps its name
    node.replace_input_with(0, rows.output)
    graph.insert_before(node, rows.nodes)
    graph.insert_after(node, after)


def prepared_rows(graph: ir.Graph, x: ir.Value, form: Format, width: int) -> Prepared:
    """What stands around the kernel of `form` for x [b, s, width]; constants are added to the graph, once."""
    if not form.rotated:
        return _divided(graph, x)
    turned = rotated_rows(graph, x, width)
    return _normed(graph, turned, width) if form.per_token else Prepared(turned)


def _divided(graph: ir.Graph, x: ir.Value) -> Prepared:
    absolute = ir.node("Abs", [x])
    axes = constant(graph, "rows.axes", np.array([-1], np.int64))
    largest = ir.node("ReduceMax", [absolute.outputs[0], axes], {"keepdims": 1})
    divisor = ir.node("Max", [largest.outputs[0], constant(graph, "rows.smallest", np.array(SMALLEST, np.float32))])
    quotient = ir.node("Div", [x, divisor.outputs[0]])
    return Prepared([absolute, largest, divisor, quotient], "Mul", divisor.outputs[0])


def rotated_rows(graph: ir.Graph, x: ir.Value, width: int, *, back: bool = False) -> list[ir.Node]:
    """x [b, s, width] in the basis of kernels that read rotated rows, or out of it `back` to its own."""
    block = run_time_block(width)
    matrix, name = (rotation(block).T, f"{_ROTATION}-back") if back else (rotation(block), _ROTATION)
    # In full: ONNX Runtime infers no size of a tensor of no rows, which the head reads of all of a prompt but its end.
    blocks = constant(graph, f"rows.blocks-{width}", np.array([0, 0, width // block, block], np.int64))
    whole = constant(graph, f"rows.whole-{width}", np.array([0, 0, width], np.int64))
    split = ir.node("Reshape", [x, blocks])
    turned = ir.node("MatMul", [split.outputs[0], constant(graph, f"{name}-{block}", np.ascontiguousarray(matrix))])
    return [split, turned, ir.node("Reshape", [turned.outputs[0], whole])]


def is_rotation(node: ir.Node) -> bool:
    """Whether a MatMul is one of those made here, and not a linear layer that no pass knew."""
    matrix = node.inputs[1]
    return matrix is not None and str(matrix.name).startswith(_ROTATION)


def _normed(graph: ir.Graph, before: list[ir.Node], width: int) -> Prepared:
    ones = constant(graph, f"rows.ones-{width}", np.ones(width, np.float32))
    attributes = {"axis": -1, "epsilon": SMALLEST}
    norm = ir.node("SimplifiedLayerNormalization", [before[-1].outputs[0], ones], attributes, num_outputs=2)
    return Prepared([*before, norm], "Div", norm.outputs[1])
