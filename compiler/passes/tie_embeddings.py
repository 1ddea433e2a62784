"""lm_head.weight -> model.embed_tokens.weight, when the checkpoint says that they are one."""

import onnx_ir as ir

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TieEmbeddings(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        head = graph.initializers.pop(HEAD)
        head.replace_all_uses_with(graph.initializers[EMBEDDING])
        return ir.passes.PassResult(model, modified=True)
