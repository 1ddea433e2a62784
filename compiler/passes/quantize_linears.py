"""FusedMatMul -> MatMulNBits or DynamicQuantizeMatMul, each linear in the format that the recipe gives its role."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from dsopt.compiler.calibrate import InputStatistics
from dsopt.compiler.gguf import GgufTensor
from dsopt.compiler.gguf_blocks import counterpart, repack
from dsopt.compiler.gptq import inverse_factor, round_weights
from dsopt.compiler.quantizers import (
    Blocks,
    for_row_chunks,
    pack_nibbles,
    quantize_blocks,
    quantize_columns,
    quantize_minima,
)
from dsopt.compiler.recipe import HEAD, Format, Recipe
from dsopt.compiler.roles import Linear, find_linears
from dsopt.compiler.weights import Shared, Weight, initializer, lazy

MICROSOFT = "com.microsoft"
_GPTQ_ROWS = 768  # rounded together: enough rows to hide the loop over channels, few enough for the cache
ACCURACY_LEVEL = 4  # activations to int8 per block: the only level with fast CPU kernels


Evidence = Callable[[str], InputStatistics]
"""What is known of a module's input, by module name."""


class QuantizeLinears(ir.passes.InPlacePass):
    """With `evidence`, weights of few bits are rounded by GPTQ; without it, each to the nearest code."""

    def __init__(self, recipe: Recipe, evidence: Evidence | None = None) -> None:
        super().__init__()
        self.recipe, self.evidence = recipe, evidence

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for linear in find_linears(graph):
            form = self.recipe.format(linear.role, module_name(linear))
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
        name, evidence = module_name(linear), self.evidence
        weights = block_initializers(graph, linear.weight, form, (lambda: evidence(name)) if evidence else None)
        source = linear.node.inputs[0]
        assert source is not None
        if form.minima:
            source, k = _with_block_means(graph, linear.node, source, form.block), k + k // form.block
        attributes = {
            "K": k,
            "N": n,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": ACCURACY_LEVEL,
        }
        return ir.node("MatMulNBits", [source, *weights], attributes, domain=MICROSOFT)

    def _w8a8(self, graph: ir.Graph, linear: Linear, form: Format) -> ir.Node:
        n, k = linear.size
        source, name = _weight(linear.weight), linear.weight.name
        shared = Shared(lambda: _column_codes(source, n, k))
        codes = initializer(graph, lazy(f"{name}.codes", (k, n), ir.DataType.INT8, lambda: shared.take("codes")))
        scales = initializer(graph, lazy(f"{name}.scales", (n,), ir.DataType.FLOAT, lambda: shared.take("scales")))
        return ir.node("DynamicQuantizeMatMul", [linear.node.inputs[0], codes, scales], domain=MICROSOFT)


def module_name(linear: Linear) -> str:
    """The name by which a recipe knows a linear layer: the checkpoint's, and `lm_head` for a tied head too."""
    return HEAD if linear.role == "head" else linear.name


def _with_block_means(graph: ir.Graph, before: ir.Node, x: ir.Value, block: int) -> ir.Value:
    """x [b, s, K] with the means of its blocks behind it, [b, s, K + K / block]; one for all that read x."""
    name = f"{x.name}.means-{block}"
    found = [use.node for use in x.uses() if use.node.op_type == "Concat" and use.node.outputs[0].name == name]
    if found:
        return found[0].outputs[0]
    pool = ir.node("AveragePool", [x], {"kernel_shape": [block], "strides": [block]}, name=f"{name}/AveragePool")
    joined = ir.node("Concat", [x, pool.outputs[0]], {"axis": -1}, name=f"{name}/Concat")
    joined.outputs[0].name = name
    graph.insert_before(before, [pool, joined])
    return joined.outputs[0]


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.name = f"{(old.name or '').rpartition('/')[0]}/{new.op_type}"
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def _weight(value: ir.Value) -> Weight:
    assert isinstance(value.const_value, Weight), value.name
    return value.const_value


def block_initializers(
    graph: ir.Graph, value: ir.Value, form: Format, evidence: Callable[[], InputStatistics] | None = None
) -> list[ir.Value]:
    """The lazily quantized `value` [N, K]: codes uint8 [N, blocks, bytes], scales [N, blocks], zero points or none.

    Asked for twice (a head tied to its embedding), the same initializers come back.
    """
    name, weight = f"{value.name}.{form}", _weight(value)
    if f"{name}.codes" in graph.initializers:
        found = [graph.initializers.get(f"{name}.{part}") for part in ("codes", "scales", "zeros")]
        return [part for part in found if part is not None]
    n, k = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    blocks = form.blocks(k)
    shared = Shared(lambda: _block_codes(weight, n, k, form, evidence), keep=["zeros"])
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


def is_exact(weight: Weight, form: Format) -> bool:
    """Whether `form` holds the weight as the checkpoint does, code for code."""
    return isinstance(weight.tensor, GgufTensor) and counterpart(weight.tensor.dtype) == form


def _block_codes(
    weight: Weight, n: int, k: int, form: Format, evidence: Callable[[], InputStatistics] | None
) -> dict[str, np.ndarray]:
    blocks = form.blocks(k)
    codes = np.empty((n, blocks, form.block * form.bits // 8), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    zeros = np.empty((n, -(-blocks * form.bits // 8)), np.uint8)

    def keep(start: int, stop: int, made: Blocks) -> None:
        made = made if made.rest is None else _with_rest(made, form)
        pack = pack_nibbles if form.bits == 4 else torch.Tensor.numpy
        codes[start:stop], scales[start:stop] = pack(made.codes), made.scales.numpy()
        zeros[start:stop] = pack(made.zero_points)

    if evidence is not None and form.bits < 8 and not is_exact(weight, form):
        factor = inverse_factor(evidence().gram, form.block)

        def work(start: int, stop: int) -> None:
            keep(start, stop, _fed_back(weight, start, stop, factor, form))

        for_row_chunks(n, k, work, _GPTQ_ROWS)
    else:
        for_row_chunks(n, k, lambda start, stop: keep(start, stop, _rounded(weight, start, stop, form)))
    return {"codes": codes, "scales": scales, **({"zeros": zeros} if form.zero_points else {})}


def _fed_back(weight: Weight, start: int, stop: int, factor: torch.Tensor, form: Format) -> Blocks:
    return round_weights(torch.from_numpy(weight.read(start, stop)), factor, form)


def _rounded(weight: Weight, start: int, stop: int, form: Format) -> Blocks:
    if is_exact(weight, form):
        assert isinstance(weight.tensor, GgufTensor)
        return repack(weight.tensor, start, stop)
    rows = torch.from_numpy(weight.read(start, stop))
    if form.minima:
        return quantize_minima(rows, form.bits, form.block)
    return quantize_blocks(rows, form.bits, form.block, zero_points=form.zero_points)


def _with_rest(made: Blocks, form: Format) -> Blocks:
    """The rest of each block as a weight of that block's mean: sum(rest * x) = rest * block * mean(x)."""
    assert made.rest is not None
    more = quantize_blocks(made.rest * form.block, form.bits, form.block, zero_points=True)
    pairs = [(made.codes, more.codes), (made.scales, more.scales), (made.zero_points, more.zero_points)]
    return Blocks(*(torch.cat(pair, 1) for pair in pairs))


def _column_codes(weight: Weight, n: int, k: int) -> dict[str, np.ndarray]:
    codes, scales = np.empty((k, n), np.int8), np.empty(n, np.float32)

    def work(start: int, stop: int) -> None:
        rows, scale = quantize_columns(torch.from_numpy(weight.read(start, stop)))
        codes[:, start:stop], scales[start:stop] = rows.numpy().T, scale.numpy()

    for_row_chunks(n, k, work)
    return {"codes": codes, "scales": scales}
