"""FusedMatMul -> the operator of the format that the recipe gives each linear layer's role."""

from collections.abc import Mapping
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from dsopt.compiler.kernels import linear_node, weight_parts
from dsopt.compiler.quantizers import for_row_chunks, pack_nibbles, quantize_blocks, quantize_columns, quantize_fp8
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.roles import Linear, find_linears
from dsopt.compiler.weights import Shared, Weight, initializer, lazy


class QuantizeLinears(ir.passes.InPlacePass):
    """`importance` maps a module's name to E[x^2] of its input, float32 [K]; modules without it weigh all alike."""

    def __init__(self, recipe: Recipe, importance: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.recipe, self.importance = recipe, importance or {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for linear in find_linears(graph):
            form = self.recipe.format(linear.role)
            if form.kernel == "none":
                continue
            weight = linear.weight
            weights = self._weights(graph, linear, form)
            _replace(graph, linear.node, linear_node(form, linear.node.inputs[0], weights, *linear.size))
            if not weight.uses():
                graph.initializers.pop(str(weight.name))
            modified = True
        return ir.passes.PassResult(model, modified)

    def _weights(self, graph: ir.Graph, linear: Linear, form: Format) -> list[ir.Value]:
        if form.kernel == "nbits":
            return block_initializers(graph, linear.weight, form, self.importance.get(linear.name))
        n, k = linear.size
        source = _weight(linear.weight)
        make = _fp8_codes if form.kernel == "fp8" else _column_codes
        shared = Shared(lambda: make(source, n, k))
        return _lazy_parts(graph, str(linear.weight.name), form, (n, k), shared)


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
    shared = Shared(lambda: _block_codes(weight, n, k, form, importance), keep=["zeros"])
    return _lazy_parts(graph, name, form, (n, k), shared)


def _lazy_parts(graph: ir.Graph, name: str, form: Format, size: tuple[int, int], shared: Shared) -> list[ir.Value]:
    return [
        initializer(graph, lazy(f"{name}.{part.name}", part.shape, part.dtype, partial(shared.take, part.name)))
        for part in weight_parts(form, *size)
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


def _fp8_codes(weight: Weight, n: int, k: int) -> dict[str, np.ndarray]:
    codes, scales = np.empty((n, k), np.uint8), np.empty((n, -(-k // 128)), np.float32)

    def work(start: int, stop: int) -> None:
        rows, scale = quantize_fp8(torch.from_numpy(weight.read(start, stop)))
        codes[start:stop], scales[start:stop] = rows.view(torch.uint8).numpy(), scale.numpy()

    for_row_chunks(n, k, work)
    return {"codes": codes.view(ml_dtypes.float8_e4m3fn), "scales": scales}
