"""Keys and values in 8 bits: GroupQueryAttention quantizes what it appends and reads half the bytes, or a quarter.

float8 (e4m3) has one scale of 1 for all: it reaches from 2^-9 to 448, and keys and values of language models lie
within; values beyond are clipped. (vLLM does the same where a checkpoint brings no scales.) int8 has a scale for each
channel: keys have channels that are many times larger than others (KIVI, arXiv:2402.02750).
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dsopt.compiler.cache_reach import Reach
from dsopt.compiler.weights import initializer

FIRST_SCALE, _PAST, _PRESENT = 12, (3, 4), (1, 2)  # inputs k_scale and v_scale; past and present of key and value


def narrow_cache(dtype: ir.DataType) -> dict[str, str | int]:
    """The attributes of attention whose cache has codes of this type."""
    kind = "PER_CHANNEL" if dtype == ir.DataType.INT8 else "PER_TENSOR"
    return {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}


class QuantizeCache(ir.passes.InPlacePass):
    """int8 with the `reach` of each layer, float8 without."""

    def __init__(self, reach: Sequence[Reach] | None = None) -> None:
        super().__init__()
        self.reach = reach

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
        dtype = ir.DataType.FLOAT8E4M3FN if self.reach is None else ir.DataType.INT8
        for node, scales in zip(nodes, self._scales(graph, len(nodes)), strict=True):
            node.resize_inputs(FIRST_SCALE + 2)
            for index, past, present in zip(range(2), _PAST, _PRESENT, strict=True):
                node.replace_input_with(FIRST_SCALE + index, scales[index])
                for value in (node.inputs[past], node.outputs[present]):
                    assert value is not None
                    value.type = ir.TensorType(dtype)
            for name, said in narrow_cache(dtype).items():
                node.attributes.add(ir.convenience.convert_attribute(name, said))
        return ir.passes.PassResult(model, modified=bool(nodes))

    def _scales(self, graph: ir.Graph, layers: int) -> list[list[ir.Value]]:
        """Of keys and values, for each layer."""
        if self.reach is None:
            one = initializer(graph, ir.tensor(np.ones(1, np.float32), name="cache.scale"))
            return [[one, one]] * layers
        return [
            [
                initializer(graph, ir.tensor(steps, name=f"cache.{layer}.{name}.scale"))
                for name, steps in zip(("key", "value"), reach.steps(), strict=True)
            ]
            for layer, reach in enumerate(self.reach)
        ]
