"""logits -> greedy int64 [batch, logits_length, 1], the token with the largest logit.

On a device of its own memory a greedy step then brings 8 bytes back in place of a row of logits. TopK and not ArgMax:
the CUDA provider's ArgMax goes through cuDNN, which nothing else here needs.
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.weights import initializer


class EmitGreedy(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = graph.outputs[0]
        one = initializer(graph, ir.tensor(np.array([1], np.int64), name="greedy.count"))
        node = ir.node("TopK", [logits, one], {"axis": -1}, num_outputs=2, name="greedy/TopK")
        largest, token = node.outputs
        largest.name, token.name = "greedy.logit", "greedy"
        token.type, token.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch", "logits_length", 1])
        graph.append(node)
        graph.outputs.append(token)
        return ir.passes.PassResult(model, modified=True)
