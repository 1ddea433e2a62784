"""logits -> the largest of them and their tokens, [batch, logits_length, count] each, largest first.

On a device of its own memory a step then brings back what sampling needs, 12 bytes of it where it is greedy, in place
of a row of logits. `candidates.count` is an initializer that a caller may override, 1 unless it does, so that other
programs load the file. TopK and not ArgMax: the CUDA provider's ArgMax goes through cuDNN, which nothing else needs.
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.weights import initializer


class EmitCandidates(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        count = initializer(graph, ir.tensor(np.array([1], np.int64), name="candidates.count"))
        graph.inputs.append(count)
        node = ir.node("TopK", [graph.outputs[0], count], {"axis": -1}, num_outputs=2, name="candidates/TopK")
        for value, part, dtype in zip(
            node.outputs, ("logits", "tokens"), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True
        ):
            value.name, value.type = f"candidates.{part}", ir.TensorType(dtype)
            value.shape = ir.Shape(["batch", "logits_length", "candidates"])
        graph.append(node)
        graph.outputs.extend(node.outputs)
        return ir.passes.PassResult(model, modified=True)
