"""FusedMatMul -> MatMulNBits or DynamicQuantizeMatMul, each linear in the format that the recipe gives its role."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import torch

from dsopt.compiler.quantizers import for_row_chunks, pack_nibbles, quantize_blocks, quantize_columns
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.roles import Linear, find_linears
from dsopt.compiler.weights import Shared, Weight, initializer, lazy

MICROSOFT = "com.microsoft"
ACCURACY_LEVEL = 4  # activations to int8 per block: the only level with fast CPU kernels


class QuantizeLinears(ir.passes.InPlacePass):
    """`importance` maps a module's name to E[x^2] of its input, float32 [K]; modules without it weigh all alike.

    `find` gives the linear layers of a graph that is no decoder's.
    """

    def __init__(
        self,
        recipe: Recipe,
        importance: Mapping[str, np.ndarray] | None = None,
        find: Callable[[ir.Graph], list[Linear]] = find_linears,
    ) -> None:
        super().__init__()
        self.recipe, self.importance, self.find = recipe, importance or {}, find

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for linear in self.find(graph):
            form = self.recipe.format(linear.role)
            if form.kernel == "none":
                continue
            weight = linear.weight
            build = {"nbits": self._nbits, "w8a8": self._w8a8}[form.kernel]
            _replace(graph, linear.node, build(graph, linear, form))
            if not weight.uses():
                graph.initializers.pop(str(weight.name))
            modified = True
        return ir.passes.PassResult(model, modified)

    def _nbits(self, graph: ir.Graph, linear: Linear, form: Format) -> ir.Node:
        n, k = linear.size
        weights = block_initializers(graph, linear.weight, form, self.importance.get(linear.name))
        attributes = {
            "K": k,
            "N": n,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": ACCURACY_LEVEL,
        }
        inputs = [linear.node.inputs[0], *weights]
        return ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)

    def _w8a8(self, graph: ir.Graph, linear: Linear, form: Format) -> ir.Node:
        n, k = linear.size
        source, name = _weight(linear.weight), linear.weight.name
        shared = Shared(lambda: _column_codes(source, n, k))
        codes = initializer(graph, lazy(f"{name}.codes", (k, n), ir.DataType.INT8, lambda: shared.take("codes")))
        scales = initializer(graph, lazy(f"{name}.scales", (n,), ir.DataType.FLOAT, lambda: shared.take("scales")))
        return ir.node("DynamicQuantizeMatMul", [linear.node.inputs[0], codes, scales], domain=MICROSOFT)


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.name = f"{(old.name or '').rpartition('/')[0]}/{new.op_type}"
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def _weight(value: ir.Value) -> Weight:
    assert isinstance(value.const_value, Weight), value.name
    return value.const_value


def block_initializers(
    graph: ir.Graph, value: ir.Value, form: Format, importance: np.ndarray | None = None
) -> list[ir.Value]:
    """The lazily quantized `value` [N, K]: codes uint8 [N, blocks, bytes], scales [N, blocks], zero points or none.

    Asked for twice (a head tied to its embedding), the same initializers come back.
    """
    name, weight = f"{value.name}.{form}", _weight(value)
    if f"{name}.codes" in graph.initializers:
        found = [graph.initializers.get(f"{name}.{part}") for part in ("codes", "scales", "zeros")]
        return [part for part in found if part is not None]
    n, k = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    blocks = -(-k // form.block)
    shared = Shared(lambda: _block_codes(weight, n, k, form, importance), keep=["zeros"])
    parts: list[tuple[str, tuple[int, ...], ir.DataType]] = [
        ("codes", (n, blocks, form.block * form.bits // 8), ir.DataType.UINT8),
        ("scales", (n, blocks), ir.DataType.FLOAT),
    ]
    if form.zero_points:
        parts.append(("zeros", (n, -(-blocks * form.bits // 8)), ir.DataType.UINT8))
    return [
        initializer(graph, lazy(f"{name}.{part}", shape, dtype, lambda part=part: shared.take(part)))  # type: ignore[misc]
        for part, shape, dtype in parts
    ]


def _block_codes(weight: Weight, n: int, k: int, form: Format, importance: np.ndarray | None) -> dict[str, np.ndarray]:
    blocks = -(-k // form.block)
    codes = np.empty((n, blocks, form.block * form.bits // 8), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    zeros = np.empty((n, -(-blocks * form.bits // 8)), np.uint8)
    weights = None if importance is None else torch.from_numpy(importance)

    def work(start: int, stop: int) -> None:
        rows = torch.from_numpy(weight.read(start, stop))
        made = quantize_blocks(rows, form.bits, form.block, zero_points=form.zero_points, importance=weights)
        pack = pack_nibbles if form.bits == 4 else torch.Tensor.numpy
        codes[start:stop], scales[start:stop] = pack(made.codes), made.scales.numpy()
        zeros[start:stop] = pack(made.zero_points)

    for_row_chunks(n, k, work)
    return {"codes": codes, "scales": scales, **({"zeros": zeros} if form.zero_points else {})}


def _column_codes(weight: Weight, n: int, k: int) -> dict[str, np.ndarray]:
    codes, scales = np.empty((k, n), np.int8), np.empty(n, np.float32)

    def work(start: int, stop: int) -> None:
        rows, scale = quantize_columns(torch.from_numpy(weight.read(start, stop)))
        codes[:, start:stop], scales[start:stop] = rows.numpy().T, scale.numpy()

    for_row_chunks(n, k, work)
    return {"codes": codes, "scales": scales}
