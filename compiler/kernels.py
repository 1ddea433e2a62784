"""The operator of each weight format: the shapes of its weights, its node. Passes emit it, the profile times it.

Sources: ONNX Runtime's contrib operators MatMulNBits, DynamicQuantizeMatMul, FusedMatMul and
MatMulBlockQuantizedFp8Weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dsopt.compiler.recipe import Format

MICROSOFT = "com.microsoft"
# Metadata of a DynamicQuantizeMatMul around which `PrepareRows` puts a scale for each row, or a rotation before it.
PER_TOKEN, ROTATED = "dsopt.per_token", "dsopt.rotated"
ACCURACY_LEVEL = 4  # activations to int8 per block: the only level with fast CPU kernels


@dataclass(frozen=True)
class Part:
    """One weight input of a kernel, by its name in the graph: `codes`, `scales`, `zeros`, or `` for a plain weight."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    fixed: bool = False  # float32 whatever the activations are

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weight_parts(form: Format, n: int, k: int) -> list[Part]:
    """The weight inputs of a linear layer y [M, n] = x [M, k] W^T in order, for float32 activations."""
    if form.kernel == "none":
        return [Part("", (n, k), ir.DataType.FLOAT)]
    if form.kernel == "w8a8":
        scales = Part("scales", (n,), ir.DataType.FLOAT)
        if form.bits < 8:
            return [Part("codes", (k, n), ir.DataType.INT8), scales]
        # Signed codes of 8 bits would overflow the 16 bits in which AVX2 adds two products. For unsigned ones ONNX
        # Runtime has another kernel there, and the same one on processors with VNNI.
        return [Part("codes", (k, n), ir.DataType.UINT8), scales, Part("zeros", (), ir.DataType.UINT8)]
    blocks = form.blocks(k)
    if form.kernel == "fp8":
        return [
            Part("codes", (n, k), ir.DataType.FLOAT8E4M3FN),
            Part("scales", (n, blocks), ir.DataType.FLOAT, fixed=True),
        ]
    parts = [
        Part("codes", (n, blocks, form.block * form.bits // 8), ir.DataType.UINT8),
        Part("scales", (n, blocks), ir.DataType.FLOAT),
    ]
    if form.zero_points:
        parts.append(Part("zeros", (n, -(-blocks * form.bits // 8)), ir.DataType.UINT8))
    return parts


def format_of(node: ir.Node) -> Format | None:
    """The format that `linear_node` made the node for; None where it is another operator."""
    if node.op_type == "MatMulNBits":
        bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
        return Format("nbits", bits, block, zero_points=len(node.inputs) > 3 and node.inputs[3] is not None)
    words = {"FusedMatMul": "none", "MatMulBlockQuantizedFp8Weight": "fp8"}
    if node.op_type == "DynamicQuantizeMatMul":
        bits = 8 if len(node.inputs) > 3 else 7
        per_token, rotated = (bool(node.metadata_props.get(mark)) for mark in (PER_TOKEN, ROTATED))
        return Format("w8a8", bits, per_token=per_token, rotated=rotated)
    return Format.parse(words[node.op_type]) if node.op_type in words else None


def linear_node(form: Format, x: ir.Value | None, weights: Sequence[ir.Value], n: int, k: int) -> ir.Node:
    """The node that multiplies x [..., k] with weights as `weight_parts` lists them.

    CUDA's MatMulNBits does not look at the accuracy level: its activations stay float16 or bfloat16. For a format with
    minima x has its block means behind it (`with_block_means`).
    """
    if form.kernel == "none":
        return ir.node("FusedMatMul", [x, *weights], {"transB": 1}, domain=MICROSOFT)
    if form.kernel == "w8a8":
        marks = {name: "1" for name, is_so in ((PER_TOKEN, form.per_token), (ROTATED, form.rotated)) if is_so}
        return ir.node("DynamicQuantizeMatMul", [x, *weights], domain=MICROSOFT, metadata_props=marks)
    if form.kernel == "fp8":
        return ir.node("MatMulBlockQuantizedFp8Weight", [x, *weights], {"block_size": form.block}, domain=MICROSOFT)
    attributes = {
        "K": k + (k // form.block if form.minima else 0),
        "N": n,
        "bits": form.bits,
        "block_size": form.block,
        "accuracy_level": ACCURACY_LEVEL,
    }
    return ir.node("MatMulNBits", [x, *weights], attributes, domain=MICROSOFT)


def with_block_means(graph: ir.Graph, before: ir.Node, x: ir.Value, block: int) -> ir.Value:
    """x [b, s, K] with the means of its blocks behind it, [b, s, K + K / block]; one for all that read x."""
    name = f"{x.name}.means-{block}"
    for use in x.uses():
        if use.node.op_type == "Concat" and use.node.outputs[0].name == name:
            return use.node.outputs[0]
    pool = ir.node("AveragePool", [x], {"kernel_shape": [block], "strides": [block]}, name=f"{name}/AveragePool")
    joined = ir.node("Concat", [x, pool.outputs[0]], {"axis": -1}, name=f"{name}/Concat")
    joined.outputs[0].name = name
    graph.insert_before(before, [pool, joined])
    return joined.outputs[0]
