"""A head over some of the tokens, for a model that drafts: logits = W[kept] x.

A tied head gets a weight of its own. `WidenLogits` gives the logits their places again, once the head is quantized.
"""

import onnx_ir as ir

from dsopt.compiler.passes.tie_embeddings import HEAD
from dsopt.compiler.pruning.tensors import Indices, select
from dsopt.compiler.roles import find_linears
from dsopt.compiler.weights import Weight, initializer


class ShortenHead(ir.passes.InPlacePass):
    """kept: token ids, ascending."""

    def __init__(self, kept: Indices) -> None:
        super().__init__()
        self.kept = kept

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        (head,) = (linear for linear in find_linears(graph) if linear.role == "head")
        whole = head.weight
        assert isinstance(whole.const_value, Weight)
        rows = select(whole.const_value.tensor, rows=self.kept)
        if whole.name == HEAD:
            graph.initializers.pop(HEAD)
        head.node.replace_input_with(1, initializer(graph, Weight(rows, HEAD)))
        logits = graph.outputs[0]
        assert logits.shape is not None
        logits.shape = ir.Shape([*logits.shape[:-1], len(self.kept)])
        return ir.passes.PassResult(model, modified=True)
