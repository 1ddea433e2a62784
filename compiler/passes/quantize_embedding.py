"""Gather(table, ids) -> one that reads codes; the tied head's, where formats agree, so that the file holds them once.

Codes in blocks keep MatMulNBits' three dimensions [vocab, blocks, bytes]: GatherBlockQuantized gives rows [batch,
sequence, blocks, block], which are reshaped. Those of w8a8 and w7a8 have a scale for each token, and are rotated back
where the head reads rotated rows.
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.kernels import MICROSOFT
from dsopt.compiler.passes.prepare_rows import rotated_rows
from dsopt.compiler.passes.quantize_linears import block_initializers, column_initializers
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.weights import constant, initializer, lazy


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
    """Replace `gather` of rows by ids [a, b] with one that reads the codes of `form`; `name` is its module's."""
    table, ids = gather.inputs
    assert table is not None
    assert table.shape is not None
    assert ids is not None
    make = _tokens if form.kernel == "w8a8" else _blocks
    nodes = make(graph, table, ids, form)
    for number, node in enumerate(nodes):
        node.name = f"{name}/{node.op_type}.{number}"
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], nodes, gather.outputs, nodes[-1].outputs)
    if not table.uses():
        graph.initializers.pop(str(table.name))


def _blocks(graph: ir.Graph, table: ir.Value, ids: ir.Value, form: Format) -> list[ir.Node]:
    assert table.shape is not None
    codes, scales, *zeros = block_initializers(graph, table, form)
    width = int(table.shape[1])  # type: ignore[arg-type]
    rows = constant(graph, f"{str(table.name).removesuffix('.weight')}.shape", np.array([0, 0, width]))
    scales3 = ir.node("Unsqueeze", [scales, constant(graph, "constant.two", np.array([2]))])
    gathered = ir.node(
        "GatherBlockQuantized",
        [codes, ids, scales3.outputs[0], *(_unpacked(graph, zero, scales, form.bits) for zero in zeros)],
        {"bits": form.bits, "block_size": form.block, "quantize_axis": 2, "gather_axis": 0},
        domain=MICROSOFT,
    )
    for zero in zeros:
        if not zero.uses():  # only a tied head reads them packed
            graph.initializers.pop(str(zero.name))
    return [scales3, gathered, ir.node("Reshape", [gathered.outputs[0], rows])]


def _tokens(graph: ir.Graph, table: ir.Value, ids: ir.Value, form: Format) -> list[ir.Node]:
    assert table.shape is not None
    codes, scales, *zero = column_initializers(graph, table, form)
    rows = ir.node("Gather", [_by_token(graph, codes), ids])
    values = ir.node(
        "DequantizeLinear", [rows.outputs[0], constant(graph, "constant.unit", np.array(1, np.float32)), *zero]
    )
    steps = ir.node("Gather", [scales, ids])
    steps3 = ir.node("Unsqueeze", [steps.outputs[0], constant(graph, "constant.two", np.array([2]))])
    scaled = ir.node("Mul", [values.outputs[0], steps3.outputs[0]])
    nodes = [rows, values, steps, steps3, scaled]
    if form.rotated:
        nodes += rotated_rows(graph, scaled.outputs[0], int(table.shape[1]), back=True)  # type: ignore[arg-type]
    return nodes


def _by_token(graph: ir.Graph, codes: ir.Value) -> ir.Value:
    """Codes [K, N] as [N, K], transposed for the head as the graph is loaded (0.04 s for 28 MB). Gathered as columns
    they would take as many cache lines as a token has values, a fortieth of the time of a prompt."""
    assert codes.const_value is not None
    stored, dtype = codes.const_value, codes.const_value.dtype
    k, n = (int(d) for d in stored.shape)  # type: ignore[arg-type]
    name = f"{codes.name}.by_token"
    graph.initializers.pop(str(codes.name))
    made = initializer(graph, lazy(name, (n, k), dtype, lambda: np.ascontiguousarray(stored.numpy().T)))
    if codes.uses():
        turned = ir.node("Transpose", [made], {"perm": [1, 0]}, name=f"{codes.name}/Transpose")
        turned.outputs[0].name, turned.outputs[0].shape = f"{codes.name}.turned", codes.shape
        turned.outputs[0].type = codes.type
        codes.replace_all_uses_with(turned.outputs[0])
        graph.insert_before(next(iter(graph)), turned)
    return made


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
