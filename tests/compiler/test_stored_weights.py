"""Each format by what stands in the written file, and by what ONNX Runtime makes of that."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs_tiny import close, near, run, unpack
from onnx import numpy_helper
from safetensors.numpy import load_file

from dsopt.compiler import build
from dsopt.compiler.recipe import Format
from dsopt.runtime.artifact import Artifact

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def read(artifact: Artifact) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    proto = onnx.load(artifact.graph)
    return proto, {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def dequantize_nbits(node: onnx.NodeProto, stored: dict[str, np.ndarray]) -> np.ndarray:
    """[N, K] in float64, by the operator's specification."""
    a = attributes(node)
    n, k, bits, block = a["N"], a["K"], a["bits"], a["block_size"]
    blocks = -(-k // block)
    codes, scales, *zeros = (stored[name] for name in node.input[1:] if name)
    assert codes.shape == (n, blocks, block * bits // 8)
    assert codes.dtype == np.uint8
    scales = scales.reshape(n, blocks)
    zero = np.full((n, blocks), 2.0 ** (bits - 1))
    if zeros:
        zero = unpack(zeros[0].reshape(n, -1), bits)[:, :blocks]
    values = scales[..., None].astype(np.float64) * (unpack(codes, bits) - zero[..., None])
    return values.reshape(n, -1)[:, :k]


def dequantize_columns(node: onnx.NodeProto, stored: dict[str, np.ndarray]) -> np.ndarray:
    codes, scales, *zeros = (stored[name] for name in node.input[1:])
    assert codes.dtype == (np.uint8 if zeros else np.int8)
    assert zeros or (abs(codes.astype(int)) < 64).all()
    return ((codes - sum(zeros, 0.0)) * scales.astype(np.float64)).T


def linears(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    """Each stored linear layer as (kernel, dequantized [N, K]), in graph order."""
    proto, stored = read(artifact)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            yield node.op_type, dequantize_nbits(node, stored)
        if node.op_type == "DynamicQuantizeMatMul":
            yield node.op_type, dequantize_columns(node, stored)
        if node.op_type == "FusedMatMul":
            yield node.op_type, stored[node.input[1]].astype(np.float64)


def originals(source: Path) -> list[np.ndarray]:
    """The same layers in the checkpoint, with q, k and v one below the other, and gate and up."""
    weights = load_file(source / "model.safetensors")
    found = []
    for layer in range(2):
        q, k, v, o, gate, up, down = (weights[f"model.layers.{layer}.{name}.weight"] for name in LINEARS)
        found += [np.concatenate([q, k, v]), o, np.concatenate([gate, up]), down]
    return [*found, weights.get("lm_head.weight", weights["model.embed_tokens.weight"])]


def plain_error(x: np.ndarray, form: Format) -> float:
    """Squared error of rounding to the nearest code between the extremes of each block, or row."""
    x = x.astype(np.float64)
    if form.kernel == "w8a8":
        scale = np.abs(x).max(1, keepdims=True) / (127 if form.bits == 8 else 63)
        return float(((np.round(x / scale) * scale - x) ** 2).sum())
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % form.block))).reshape(len(x), -1, form.block)
    top = 2**form.bits - 1
    if form.zero_points:
        low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
        scale = (high - low) / top
        zero = np.round(-low / scale)
    else:
        scale = -np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1) * 2.0 ** (1 - form.bits)
        zero = np.full_like(scale, 2 ** (form.bits - 1))
    return float(((scale * (np.clip(np.round(x / scale) + zero, 0, top) - zero) - x) ** 2).sum())


STORED = [
    *("int4", "int8", "int4-zp", "int8-zp", "int4-b16", "int8-b16", "int4-zp-b16"),
    *("int4-b64", "int4-b128", "int8-zp-b256"),  # blocks wider than some rows
    *("w8a8", "w7a8", "int4-zp,head=int8-zp-b16,mlp=int8", "w8a8,head=int8"),
]


@pytest.mark.parametrize("text", STORED[:-2])
def test_stored_codes_mean_the_weights(
    text: str, build_tiny: Callable[..., Artifact], tiny_llama_dir: Callable[..., Path]
) -> None:
    source, form = tiny_llama_dir(tied=False), Format.parse(text)
    expected, found = originals(source), list(linears(build_tiny(text, source=source)))
    assert len(found) == len(expected)
    for (_, stored), weight in zip(found, expected, strict=True):
        assert stored.shape == weight.shape
        left = ((stored - weight) ** 2).sum()
        assert 0 < left <= plain_error(weight, form) * (1 + 1e-5)


def with_float_activations(artifact: Artifact, tmp_path: Path) -> Path:
    """The same file with accuracy_level 0: float activations times dequantized weights."""
    proto = onnx.load(artifact.graph)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                assert attribute.i == 4
                attribute.i = 0
    onnx.save(proto, tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def dequantized_copy(source: Path, artifact: Artifact, folder: Path) -> Path:
    """The checkpoint's graph of recipe none, with what the artifact stores in the place of the weights."""
    proto, stored = read(artifact)
    weights = [w for _, w in linears(artifact)]
    table = next((n for n in proto.graph.node if n.op_type == "GatherBlockQuantized"), None)
    plain = onnx.load(source)
    names = [n.input[1] for n in plain.graph.node if n.op_type == "FusedMatMul"]
    replaced = dict(zip(names, weights, strict=True))
    if table is not None:
        a = attributes(table)
        codes, scales = unpack(stored[table.input[0]], a["bits"]), stored[_scales_of(proto, table)]
        zero = np.float64(2 ** (a["bits"] - 1))
        if len(table.input) > 3:
            zero = stored[table.input[3]].reshape(*scales.shape, 1).astype(np.float64)
        rows = (codes.reshape(*scales.shape, -1) - zero) * scales[..., None]
        replaced["model.embed_tokens.weight"] = rows.reshape(len(rows), -1)
    for tensor in plain.graph.initializer:
        if tensor.name in replaced:
            tensor.CopyFrom(numpy_helper.from_array(replaced[tensor.name].astype(np.float32), tensor.name))
    onnx.save(plain, folder / "plain.onnx")
    return folder / "plain.onnx"


def _scales_of(proto: onnx.ModelProto, table: onnx.NodeProto) -> str:
    """The gather's scales before their Unsqueeze."""
    return next(n.input[0] for n in proto.graph.node if table.input[2] in n.output)


@pytest.mark.parametrize("text", STORED)
def test_onnxruntime_reads_the_codes_as_they_were_meant(
    text: str, build_tiny: Callable[..., Artifact], tiny_llama_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """With float activations exactly; as compiled, with activations in 8 bits too, nearly."""
    source = tiny_llama_dir(tied=False)
    artifact = build_tiny(text, source=source)
    expected = run(dequantized_copy(build_tiny("none", source=source).graph, artifact, tmp_path))
    if "a8" not in text:
        close(run(with_float_activations(artifact, tmp_path)), expected, 2e-5)
    near(run(artifact.graph), expected, 0.15)


@pytest.mark.parametrize("text", ["int8,v=none", "int4,k=w8a8", "none,down=int8,q=int4"])
def test_mixed_projections_run(text: str, build_tiny: Callable[..., Artifact]) -> None:
    near(run(build_tiny(text).graph), run(build_tiny("none").graph), 0.7)


@pytest.mark.parametrize("text", ["int4", "int8-zp", "int4,head=int8", "none,head=int4-zp"])
def test_a_tied_table_is_stored_once(text: str, build_tiny: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = build_tiny(text, tied=True)
    _, stored = read(artifact)
    tables = [name for name, array in stored.items() if array.shape[0] == 320 and array.nbytes >= 320 * 16]
    scales = [name for name, array in stored.items() if array.shape == (320, 1) and array.dtype == np.float32]
    assert len(tables) == 1, tables
    assert len(scales) == 1, scales


@pytest.mark.parametrize("text", ["none", "int4", "int4-zp-b16", "w8a8", "int8,head=int4-zp,qkv=w8a8"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_says_the_bytes_that_are_written(
    text: str, tied: bool, plan_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    plan = plan_tiny(text, tied=tied)
    build.write(plan, tmp_path / "out")
    _, stored = read(Artifact(tmp_path / "out", plan.manifest))
    assert plan.nbytes == sum(array.nbytes for array in stored.values())
    for node in plan.manifest.nodes:
        n, k = node["shape"]
        stored_as_head = tied and node["role"] == "embed" and node["bytes"] == 0
        assert stored_as_head or node["bytes"] == Format.parse(node["format"]).nbytes(n, k)


def test_an_embedding_that_no_block_fits_is_said_to_be_float(plan_tiny: Callable[..., Any]) -> None:
    """Blocks of 64 do not divide a row of 96: the table stays whole, or is said to be something else."""
    plan = plan_tiny("int4-b64", hidden_size=96, num_hidden_layers=1, num_key_value_heads=2)
    table = [value for name, value in plan.model.graph.initializers.items() if name == "model.embed_tokens.weight"]
    said = [node["format"] for node in plan.manifest.nodes if node["role"] == "embed"]
    assert said == (["none"] if table else ["int4"])
