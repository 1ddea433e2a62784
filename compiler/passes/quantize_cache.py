"""Keys and values in float8 (e4m3): GroupQueryAttention quantizes what it appends and reads half the bytes.

One scale of 1 for all: e4m3 reaches from 2^-9 to 448, and keys and values of language models lie within; values beyond
are clipped. (vLLM does the same where a checkpoint brings no scales.)
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.weights import initializer

_FIRST_SCALE, _PAST, _PRESENT = 12, (3, 4), (1, 2)  # inputs k_scale and v_scale; past and present of key and value


class QuantizeCache(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        scale = initializer(graph, ir.tensor(np.ones(1, np.float32), name="cache.scale"))
        nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
        for node in nodes:
            node.resize_inputs(_FIRST_SCALE + 2)
            for part, past, present in zip("kv", _PAST, _PRESENT, strict=True):
                node.replace_input_with(_FIRST_SCALE + "kv".index(part), scale)
                node.attributes.add(ir.AttrString(f"{part}_quant_type", "PER_TENSOR"))
                for value in (node.inputs[past], node.outputs[present]):
                    assert value is not None
                    value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
            node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
        return ir.passes.PassResult(model, modified=bool(nodes))
