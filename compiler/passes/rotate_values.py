"""Values of a layer in a rotated basis: v = x V^T -> x (R^T V)^T for each key-value head, o = c W^T -> c (W R)^T.

The context c is a mean of values, so it is in the same basis. Smoothing goes before: it is of the channels as they are.
"""

from collections.abc import Set

import onnx_ir as ir

from dsopt.compiler.passes.smooth_linears import heads_before
from dsopt.compiler.roles import Linear, find_linears
from dsopt.compiler.rotation import rotate
from dsopt.compiler.weights import Weight


class RotateValues(ir.passes.InPlacePass):
    """`outputs` are the module names of the output projections whose inputs are to be rotated."""

    def __init__(self, outputs: Set[str]) -> None:
        super().__init__()
        self.outputs = outputs

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        linears = find_linears(model.graph)
        values = {linear.layer: linear for linear in linears if linear.role == "v"}
        chosen = [linear for linear in linears if linear.name in self.outputs]
        assert {linear.name for linear in chosen} == self.outputs, "a rotation of a layer that is not there"
        for output in chosen:
            head = output.size[1] // heads_before(output)[0]
            _rotate(values[output.layer], head, 0)
            _rotate(output, head, 1)
        return ir.passes.PassResult(model, modified=bool(chosen))


def _rotate(linear: Linear, head: int, axis: int) -> None:
    value = linear.weight
    assert isinstance(value.const_value, Weight), value.name
    assert all(use.node is linear.node for use in value.uses()), "a weight that others read too"
    value.const_value = Weight(rotate(value.const_value.tensor, head, axis), str(value.name))
