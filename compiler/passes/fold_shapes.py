"""Reshape(x, Concat(Shape(x)[0], Shape(x)[1], 4, 16)) -> Reshape(x, [0, 0, 4, 16]): 0 copies a dimension of x.

The tracer computes the sizes of every reshape at run time, half a dozen nodes each. So it does for the ones of a norm
without weight: RMSNormalization(x, ConstantOfShape(Shape(x))) -> RMSNormalization(x, [1, 1, ...]).
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


class FoldShapes(ir.passes.InPlacePass):
    """Needs the symbolic shapes that the tracer notes on its values."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Reshape" and (sizes := _sizes(node)) is not None:
                _fold(model.graph, node, sizes)
                modified = True
            elif node.op_type == "RMSNormalization" and (width := _plain_width(node)):
                _constant(model.graph, node, np.ones(width, np.float32))
                modified = True
        return RemoveUnusedNodesPass()(model) if modified else ir.passes.PassResult(model, modified=False)


def _sizes(node: ir.Node) -> list[int] | None:
    """The shape to give, 0 where a dimension stays; None where one that is not known moves."""
    source, target = node.inputs[0], node.outputs[0].shape
    if source is None or source.shape is None or target is None:
        return None
    sizes = []
    for axis, size in enumerate(target):
        if isinstance(size, int):
            sizes.append(size)
        elif axis < len(source.shape) and source.shape[axis] == size:
            sizes.append(0)
        else:
            return None
    return sizes


def _fold(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> None:
    _constant(graph, node, np.array(sizes, np.int64))
    node.attributes.pop("allowzero", None)  # with it, 0 would mean none


def _plain_width(node: ir.Node) -> int | None:
    """The size of the axis that a norm without weight is over, None where there is a weight."""
    x, scale = node.inputs[0], node.inputs[1].producer() if node.inputs[1] is not None else None
    if x is None or x.shape is None or scale is None or scale.op_type != "ConstantOfShape":
        return None
    width, value = x.shape[-1], scale.attributes.get("value")
    is_one = value is not None and value.as_tensor().numpy().item() == 1
    return width if is_one and isinstance(width, int) else None


def _constant(graph: ir.Graph, node: ir.Node, value: np.ndarray) -> None:
    """The second input of `node` from now on."""
    constant = ir.node("Constant", [], {"value": ir.tensor(value)})
    constant.metadata_props.update(node.metadata_props)  # the scope, from which its name is made
    graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
