"""Linear layers that read the same input -> one with their outputs side by side.

q, k and v become one call whose output GroupQueryAttention reads packed: two kernel launches and two reads of the
activations fewer in each layer. Weights are concatenated along the output dimension, which is exact in every format.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from dsopt.compiler.weights import initializer, lazy

# The axis of each weight input that runs over output channels.
_OUTPUT_AXIS = {"FusedMatMul": (0,), "MatMulNBits": (0, 0, 0), "DynamicQuantizeMatMul": (1, 0)}


class PackProjections(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for attention in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
            projections = [value.producer() for value in attention.inputs[:3] if value is not None]
            if _can_pack(projections):
                packed = _pack(model.graph, [node for node in projections if node is not None])
                attention.replace_input_with(0, packed)
                attention.replace_input_with(1, None)
                attention.replace_input_with(2, None)
                for node in projections:
                    _remove(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)


def _can_pack(nodes: list[ir.Node | None]) -> bool:
    if len(nodes) != 3 or any(node is None or node.op_type not in _OUTPUT_AXIS for node in nodes):
        return False
    first, *others = [node for node in nodes if node is not None]
    return all(_kind(node) == _kind(first) for node in others)


def _kind(node: ir.Node) -> tuple[object, ...]:
    attributes = {name: value.value for name, value in node.attributes.items() if name != "N"}
    return node.op_type, node.inputs[0], len(node.inputs), tuple(sorted(attributes.items()))


def _pack(graph: ir.Graph, nodes: list[ir.Node]) -> ir.Value:
    first = nodes[0]
    axes = _OUTPUT_AXIS[first.op_type]
    weights = [_concatenate(graph, [node.inputs[i + 1] for node in nodes], axis) for i, axis in enumerate(axes)
               if i + 1 < len(first.inputs)]  # fmt: skip
    attributes = dict(first.attributes)
    if "N" in attributes:
        attributes["N"] = ir.AttrInt64("N", sum(node.attributes["N"].as_int() for node in nodes))
    name = f"{(first.name or '').rpartition('/')[0].removesuffix('q_proj')}qkv_proj/{first.op_type}"
    packed = ir.Node(first.domain, first.op_type, [first.inputs[0], *weights], list(attributes.values()), name=name)
    packed.outputs[0].name = name
    graph.insert_before(first, packed)
    return packed.outputs[0]


def _concatenate(graph: ir.Graph, values: list[ir.Value | None], axis: int) -> ir.Value:
    tensors = [value.const_value for value in values if value is not None and value.const_value is not None]
    assert len(tensors) == len(values)
    shape = list(tensors[0].shape.numpy())
    shape[axis] = sum(tensor.shape.numpy()[axis] for tensor in tensors)
    make: Callable[[], np.ndarray] = lambda: np.concatenate([t.numpy() for t in tensors], axis)  # noqa: E731
    name = (tensors[0].name or "").replace("q_proj", "qkv_proj")
    return initializer(graph, lazy(name, shape, tensors[0].dtype, make))


def _remove(graph: ir.Graph, node: ir.Node | None) -> None:
    assert node is not None
    weights = [value for value in node.inputs[1:] if value is not None]
    graph.remove(node, safe=True)
    for value in weights:
        if not value.uses():
            graph.initializers.pop(str(value.name))
