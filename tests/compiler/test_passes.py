"""Each rewrite by the graph it makes and by numbers; each format by what stands in the written file."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from dsopt.compiler import build, package
from dsopt.compiler.calibrate import InputStatistics
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.models import llama
from dsopt.compiler.passes import pipeline
from dsopt.compiler.passes.fuse_skip_norms import FuseSkipNorms
from dsopt.compiler.passes.normalize_linears import NormalizeLinears
from dsopt.compiler.passes.pack_projections import PackProjections
from dsopt.compiler.passes.quantize_linears import QuantizeLinears
from dsopt.compiler.passes.tie_embeddings import TieEmbeddings
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.weights import Weight
from dsopt.runtime.artifact import Artifact
from dsopt.runtime.session import Session

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
# What a decoder of two layers always has: mask arithmetic, attention, SiLU, the choice of rows.
FRAME = Counter(ReduceSum=1, Sub=1, Cast=2, Shape=1, Squeeze=1, GroupQueryAttention=2, Sigmoid=2, Mul=4, Slice=1)
FUSED = FRAME + Counter(RMSNormalization=2, SkipSimplifiedLayerNormalization=3, Add=1)
TABLE = Counter(Unsqueeze=1, GatherBlockQuantized=1, Reshape=1)
IDS = np.random.default_rng(0).integers(0, 320, 24)


@pytest.fixture
def bound(exported_once: None, tiny_llama_dir: Callable[..., Path]) -> Callable[..., ir.Model]:
    """A graph with its weights, before any pass."""

    def make(*, tied: bool = True, **options: Any) -> ir.Model:
        checkpoint = open_checkpoint(str(tiny_llama_dir(f"bound-{tied}", tied=tied, **options)))
        model = build.export(llama.Model, llama.Config.from_dict(checkpoint.config))
        if tied:
            TieEmbeddings()(model)
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                value.const_value = Weight(checkpoint.tensors[name], name)
        return model

    return make


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(graph: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.use_per_session_threads = Session._pool_threads is None  # a process has one kind of pool or the other
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs() if i.name.startswith("past")}  # fmt: skip
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS)), np.int64), **past}
    return session.run(["logits"], feeds)[0][0]


@pytest.fixture
def logits(tmp_path: Path) -> Callable[[ir.Model], np.ndarray]:
    def compute(model: ir.Model) -> np.ndarray:
        package.write_graph(model, tmp_path)
        return run(tmp_path / "model.onnx")

    return compute


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Largest difference, relative to the largest logit."""
    off = float(np.abs(actual - expected).max() / np.abs(expected).max())
    assert off <= tolerance


def near(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Root mean square of the difference, relative to that of the logits: for activations in 8 bits."""
    off = float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))
    assert off <= tolerance


# --- the graph of each pass, and that the numbers stay


def test_the_traced_graph(bound: Callable[..., ir.Model]) -> None:
    plain = Counter(Transpose=15, MatMul=15, RMSNormalization=5, Add=4, Gather=1)
    assert operators(bound()) == FRAME + plain


def test_normalize_linears(bound: Callable[..., ir.Model], logits: Callable[..., np.ndarray]) -> None:
    model = bound()
    before = logits(model)
    assert NormalizeLinears()(model).modified
    assert operators(model) == FRAME + Counter(FusedMatMul=15, RMSNormalization=5, Add=4, Gather=1)
    close(logits(model), before, 1e-6)
    assert not NormalizeLinears()(model).modified


def test_fuse_skip_norms(bound: Callable[..., ir.Model], logits: Callable[..., np.ndarray]) -> None:
    model = bound()
    before = logits(model)
    assert FuseSkipNorms()(model).modified
    assert operators(model) == FUSED + Counter(Transpose=15, MatMul=15, Gather=1)
    close(logits(model), before, 1e-6)
    assert not FuseSkipNorms()(model).modified


def test_a_tied_head_reads_the_embedding(bound: Callable[..., ir.Model]) -> None:
    model = bound()
    NormalizeLinears()(model)
    assert "lm_head.weight" not in model.graph.initializers
    uses = {use.node.op_type for use in model.graph.initializers["model.embed_tokens.weight"].uses()}
    assert uses == {"Gather", "FusedMatMul"}


PACKABLE = ["none", "int4", "int8", "int4-zp", "int8-zp", "int4-b16", "w8a8"]


@pytest.mark.parametrize("recipe", PACKABLE)
def test_pack_projections_changes_no_bit(
    recipe: str, bound: Callable[..., ir.Model], logits: Callable[..., np.ndarray]
) -> None:
    model = bound()
    for step in (NormalizeLinears(), QuantizeLinears(Recipe.parse(recipe))):
        step(model)
    before, kind = (
        logits(model),
        Counter(op for op in operators(model).elements() if "MatMul" in op).most_common(1)[0][0],
    )
    count = operators(model)[kind]  # 15, or 14 where the head has another kernel
    assert PackProjections()(model).modified
    assert operators(model)[kind] == count - 6
    assert operators(model)["Split"] == 2
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            assert node.inputs[1] is node.inputs[2] is None
    after = logits(model)
    if recipe == "none":
        close(after, before, 1e-6)  # a float kernel may sum another width in another order
    else:
        np.testing.assert_array_equal(after, before)
    assert not PackProjections()(model).modified


@pytest.mark.parametrize(
    "recipe",
    ["none,k=int8,up=int8", "int4,v=int4-zp,up=int4-zp", "int4,q=int4-b16,gate=int4-b16", "int8,v=w8a8,up=w8a8"],
)
def test_projections_of_different_formats_stay_apart(recipe: str, bound: Callable[..., ir.Model]) -> None:
    model = bound()
    for step in (NormalizeLinears(), QuantizeLinears(Recipe.parse(recipe))):
        step(model)
    before = operators(model)
    assert not PackProjections()(model).modified
    assert operators(model) == before


def test_packed_projections_keep_the_module_in_their_name(plan_tiny: Callable[..., Any]) -> None:
    for recipe in ("none", "int4"):
        names = {node.name for node in plan_tiny(recipe).model.graph}
        for layer in (0, 1):
            assert any(name.startswith(f"model.layers.{layer}.self_attn.qkv_proj/") for name in names)
            assert any(name.startswith(f"model.layers.{layer}.mlp.gate_up_proj/") for name in names)
            assert any(name.startswith(f"model.layers.{layer}.mlp.down_proj/") for name in names)


PACKED = FUSED + Counter(Split=2)
RECIPES = {
    "none": PACKED + Counter(FusedMatMul=9, Gather=1),
    "int4": PACKED + TABLE + Counter(MatMulNBits=9),
    "int8-zp": PACKED + TABLE + Counter(MatMulNBits=9),
    "w8a8": PACKED + TABLE + Counter(DynamicQuantizeMatMul=8, MatMulNBits=1),
    "w8a8-token": PACKED
    + TABLE
    + Counter(DynamicQuantizeMatMul=8, MatMulNBits=1, Abs=8, ReduceMax=8, Max=8, Div=8, Mul=8),
    "none,head=w8a8-token": PACKED
    + Counter(FusedMatMul=8, DynamicQuantizeMatMul=1, Abs=1, ReduceMax=1, Max=1, Div=1, Mul=1)
    + TABLE,
    "w8a8,head=w8a8": PACKED + TABLE + Counter(DynamicQuantizeMatMul=9),
    "int4,embed=none": PACKED + Counter(MatMulNBits=9, Gather=1),
    "int4,qkv=w8a8,down=int8,head=none": PACKED
    + Counter(MatMulNBits=6, DynamicQuantizeMatMul=2, FusedMatMul=1, Gather=1),
    "none,k=int8,head=int4": PACKED + TABLE + Counter(FusedMatMul=10, MatMulNBits=3),
    "int4,up=int8": FUSED + TABLE + Counter(MatMulNBits=11),
}


@pytest.mark.parametrize(("recipe", "expected"), RECIPES.items(), ids=RECIPES.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_the_graph_of_a_recipe(recipe: str, expected: Counter[str], tied: bool, plan_tiny: Callable[..., Any]) -> None:
    plan = plan_tiny(recipe, tied=tied)
    assert operators(plan.model) == expected
    names = [node.name for node in plan.model.graph]
    assert len(set(names)) == len(names)
    for name, value in plan.model.graph.initializers.items():
        assert value.uses(), f"{name} is written and not read"


@pytest.mark.parametrize("recipe", ["int4", "w8a8"])
def test_fusing_leaves_quantized_numbers_alone(
    recipe: str, bound: Callable[..., ir.Model], logits: Callable[..., np.ndarray]
) -> None:
    model = bound()
    *quantize, pack, fuse, _ = pipeline(Recipe.parse(recipe))
    for step in quantize:
        step(model)
    before = logits(model)
    assert pack(model).modified
    assert fuse(model).modified
    near(logits(model), before, 0.02)  # a last bit of a norm may turn an activation's rounding


# --- what stands in the file


def read(artifact: Artifact) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    proto = onnx.load(artifact.graph)
    return proto, {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers of one byte row; of 4 bits the first is in the low half of a byte (MatMulNBits)."""
    if bits == 8:
        return codes.astype(np.float64)
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).astype(np.float64)


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


def test_evidence_is_used(bound: Callable[..., ir.Model]) -> None:
    """Errors of the outputs fall when it is known which inputs go together."""
    name, size = "model.layers.1.mlp.up_proj", 32
    mixing = np.random.default_rng(0).normal(0, 1, (size, 4)) @ np.random.default_rng(1).normal(0, 1, (4, size))
    x = np.random.default_rng(2).normal(0, 1, (512, size)) @ (mixing + 0.1 * np.eye(size))
    gram = torch.from_numpy((x.T @ x / len(x)).astype(np.float32))
    statistics = InputStatistics(torch.zeros(size), torch.zeros(size), gram)

    def output_error(model: ir.Model, known: bool) -> float:
        NormalizeLinears()(model)
        weight = model.graph.initializers[f"{name}.weight"].const_value.numpy().astype(np.float64)
        QuantizeLinears(Recipe.parse("int4"), (lambda _: statistics) if known else None)(model)
        stored = [model.graph.initializers[f"{name}.weight.int4.{part}"] for part in ("codes", "scales")]
        codes, scales = (value.const_value.numpy() for value in stored)
        found = (scales[..., None] * (unpack(codes, 4) - 8)).reshape(64, size)
        return float(((x @ (found - weight).T) ** 2).sum())

    model = bound(intermediate_size=64)
    # The other linears are not read here, so it does no harm that their inputs have another width.
    assert output_error(model.clone(), True) < 0.5 * output_error(model, False)
