"""Gather(table, ids) -> GatherBlockQuantized, reading the tied head's codes where the formats agree.

The codes keep MatMulNBits' three dimensions [vocab, blocks, bytes], so the gathered rows come as
[batch, sequence, blocks, block] and are reshaped; the file holds the table once.
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.kernels import MICROSOFT
from dsopt.compiler.passes.quantize_linears import block_initializers
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.weights import initializer, lazy


class QuantizeEmbedding(ir.passes.InPlacePass):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        gather = next(node for node in graph if node.op_type == "Gather")
        table, ids = gather.inputs
        assert table is not None
        assert table.shape is not None
        width = int(table.shape[1])  # type: ignore[arg-type]
        form = self.recipe.embedding(width)
        if form.kernel == "none":
            return ir.passes.PassResult(model, modified=False)
        codes, scales, *zeros = block_initializers(graph, table, form)
        last = initializer(graph, ir.tensor(np.array([2], np.int64), name="constant.two"))
        rows = initializer(graph, ir.tensor(np.array([0, 0, width], np.int64), name="embedding.shape"))
        scales3 = ir.node("Unsqueeze", [scales, last], name="embedding.scales/Unsqueeze")
        gathered = ir.node(
            "GatherBlockQuantized",
            [
                codes,
                ids,
                scales3.outputs[0],
                *(_unpacked(graph, zero, scales, form.bits) for zero in zeros),
            ],
            {"bits": form.bits, "block_size": form.block, "quantize_axis": 2, "gather_axis": 0},
            domain=MICROSOFT,
            name="model.embed_tokens/GatherBlockQuantized",
        )
        joined = ir.node("Reshape", [gathered.outputs[0], rows], name="model.embed_tokens/Reshape")
        nodes = [scales3, gathered, joined]
        ir.convenience.replace_nodes_and_values(graph, gather, [gather], nodes, gather.outputs, joined.outputs)
        for zero in zeros:
            if not zero.uses():  # only a tied head reads them packed
                graph.initializers.pop(str(zero.name))
        if not table.uses():
            graph.initializers.pop(str(table.name))
        return ir.passes.PassResult(model, modified=True)


def _unpacked(graph: ir.Graph, zeros: ir.Value, scales: ir.Value, bits: int) -> ir.Value:
    """The gather packs zero points along its last axis, which has one per block here: a byte each."""
    assert scales.shape is not None
    n, blocks = (int(d) for d in scales.shape)  # type: ignore[arg-type]

    def make() -> np.ndarray:
        assert zeros.const_value is not None
        packed = zeros.const_value.numpy()
        if bits == 4:
            packed = np.stack([packed & 15, packed >> 4], -1).reshape(n, -1)[:, :blocks]
        return packed.reshape(n, blocks, 1)

    return initializer(graph, lazy(f"{zeros.name}.bytes", (n, blocks, 1), ir.DataType.UINT8, make))
