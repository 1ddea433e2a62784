"""float32 -> float16 or bfloat16 everywhere but in the logits, which come back to float32 for sampling.

The last pass: what the others compute and compare is float32. Scales that an operator wants in float32 whatever the
activations are (block-fp8 weights, a quantized cache) stay as they are.
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.weights import lazy
from dsopt.runtime.errors import DsoptError

FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOAT32_INPUTS = {"MatMulBlockQuantizedFp8Weight": (2,), "GroupQueryAttention": (12, 13)}


class LowerPrecision(ir.passes.InPlacePass):
    """`dtype` is fp16 or bf16."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = FLOATS[dtype]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        _keep_logits(graph)
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        for value in values:
            if value.dtype == ir.DataType.FLOAT and value.name != "logits" and not _stays(value):
                self._lower(value)
        return ir.passes.PassResult(model, modified=True)

    def _lower(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self.dtype)
        tensor = value.const_value
        if tensor is None:
            return

        def cast(tensor: ir.TensorProtocol = tensor) -> np.ndarray:
            with np.errstate(over="ignore"):
                array = tensor.numpy().astype(self.dtype.numpy())
            if not np.isfinite(array).all():
                raise DsoptError(f"tensor {tensor.name} has weights beyond float16; compile with --dtype bf16")
            return array

        value.const_value = lazy(str(value.name), tensor.shape.numpy(), self.dtype, cast)


def _stays(value: ir.Value) -> bool:
    return any(use.idx in _FLOAT32_INPUTS.get(use.node.op_type, ()) for use in value.uses())


def _keep_logits(graph: ir.Graph) -> None:
    """The graph's output becomes Cast(logits), under its old name."""
    lower = graph.outputs[0]
    cast = ir.node("Cast", [lower], {"to": ir.DataType.FLOAT}, name="logits/Cast")
    logits = cast.outputs[0]
    logits.shape, logits.type = lower.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.append(cast)
    graph.outputs[0] = logits
    lower.name, logits.name = "logits.lower", "logits"
