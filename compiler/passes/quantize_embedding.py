"""Gather(table, ids) -> GatherBlockQuantized, reading the tied head's codes where the formats agree.

The codes keep MatMulNBits' three dimensions [vocab, blocks, bytes], so the gathered rows come as
[batch, sequence, blocks, block] and are reshaped; the file holds the table once.
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.kernels import MICROSOFT
from dsopt.compiler.passes.quantize_linears import block_initializers
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.weights import initializer, lazy


class QuantizeEmbedding(ir.passes.InPlacePass):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        gather = next(node for node in model.graph if node.op_type == "Gather")
        table = gather.inputs[0]
        assert table is not None
        assert table.shape is not None
        form = self.recipe.embedding(int(table.shape[1]))  # type: ignore[arg-type]
        if form.kernel == "none":
            return ir.passes.PassResult(model, modified=False)
        quantize_gather(model.graph, gather, form, "model.embed_tokens")
        return ir.passes.PassResult(model, modified=True)


def quantize_gather(graph: ir.Graph, gather: ir.Node, form: Format, name: str) -> None:
    """Replace `gather` of rows by ids [a, b] with one that reads codes in blocks; `name` is its module's."""
    table, ids = gather.inputs
    assert table is not None
    assert table.shape is not None
    width = int(table.shape[1])  # type: ignore[arg-type]
    codes, scales, *zeros = block_initializers(graph, table, form)
    last = _constant(graph, "constant.two", [2])
    rows = _constant(graph, f"{name}.shape", [0, 0, width])
    scales3 = ir.node("Unsqueeze", [scales, last], name=f"{name}.scales/Unsqueeze")
    gathered = ir.node(
        "GatherBlockQuantized",
        [codes, ids, scales3.outputs[0], *(_unpacked(graph, zero, scales, form.bits) for zero in zeros)],
        {"bits": form.bits, "block_size": form.block, "quantize_axis": 2, "gather_axis": 0},
        domain=MICROSOFT,
        name=f"{name}/GatherBlockQuantized",
    )
    joined = ir.node("Reshape", [gathered.outputs[0], rows], name=f"{name}/Reshape")
    nodes = [scales3, gathered, joined]
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], nodes, gather.outputs, joined.outputs)
    for zero in zeros:
        if not zero.uses():  # only a tied head reads them packed
            graph.initializers.pop(str(zero.name))
    if not table.uses():
        graph.initializers.pop(str(table.name))


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    return graph.initializers.get(name) or initializer(graph, ir.tensor(np.array(values, np.int64), name=name))


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
