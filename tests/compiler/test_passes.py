"""Each rewrite by the graph it makes, and that the numbers stay."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs_tiny import close, near, run, unpack

from dsopt.compiler import build, package
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.models import llama
from dsopt.compiler.passes import pipeline
from dsopt.compiler.passes.fuse_skip_norms import FuseSkipNorms
from dsopt.compiler.passes.normalize_linears import NormalizeLinears
from dsopt.compiler.passes.pack_projections import PackProjections
from dsopt.compiler.passes.prepare_rows import PrepareRows
from dsopt.compiler.passes.quantize_embedding import QuantizeEmbedding
from dsopt.compiler.passes.quantize_linears import QuantizeLinears
from dsopt.compiler.passes.tie_embeddings import TieEmbeddings
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.rotation import rotation
from dsopt.compiler.weights import Weight
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.session import Session

# What a decoder of two layers always has: mask arithmetic, attention, SiLU, the choice of rows.
FRAME = Counter(ReduceSum=1, Sub=1, Cast=2, Shape=1, Squeeze=1, GroupQueryAttention=2, Sigmoid=2, Mul=4, Slice=1)
FUSED = FRAME + Counter(RMSNormalization=2, SkipSimplifiedLayerNormalization=3, Add=1)
TABLE = Counter(Unsqueeze=1, GatherBlockQuantized=1, Reshape=1)
CODES = Counter(Gather=2, DequantizeLinear=1, Unsqueeze=1, Mul=1)  # a table in w8a8, which a tied head reads transposed


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


@pytest.fixture
def logits(tmp_path: Path) -> Callable[[ir.Model], np.ndarray]:
    def compute(model: ir.Model) -> np.ndarray:
        package.write_graph(model, tmp_path)
        return run(tmp_path / "model.onnx")

    return compute


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
    "none,o=w8a8-token": PACKED
    + Counter(Gather=1, FusedMatMul=7, DynamicQuantizeMatMul=2, Abs=2, ReduceMax=2, Max=2, Div=2, Mul=2),
    "none,head=w7a8-rot": PACKED + CODES + Counter(FusedMatMul=8, DynamicQuantizeMatMul=1, MatMul=2, Reshape=4),
    "int8,embed=w8a8-rot": PACKED + CODES + Counter(MatMulNBits=9, MatMul=1, Reshape=2),
    "w8a8-rot,down=w8a8-token-rot,o=w8a8": PACKED
    + TABLE
    + Counter(DynamicQuantizeMatMul=8, MatMulNBits=1, MatMul=6, Reshape=12, SimplifiedLayerNormalization=2, Div=2),
    "w8a8,head=w8a8": PACKED + CODES + Counter(DynamicQuantizeMatMul=9),
    "w8a8,head=w8a8,embed=int8": PACKED + TABLE + Counter(DynamicQuantizeMatMul=9),
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
    is_one_table = tied and recipe.endswith(("head=w8a8", "head=w7a8-rot"))
    assert operators(plan.model) == expected + Counter(Transpose=int(is_one_table))
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


def test_evidence_is_used(bound: Callable[..., ir.Model]) -> None:
    """Errors of the outputs fall when it is known which inputs go together."""
    name, size = "model.layers.1.mlp.up_proj", 32
    mixing = np.random.default_rng(0).normal(0, 1, (size, 4)) @ np.random.default_rng(1).normal(0, 1, (4, size))
    x = np.random.default_rng(2).normal(0, 1, (512, size)) @ (mixing + 0.1 * np.eye(size))
    gram = torch.from_numpy((x.T @ x / len(x)).astype(np.float32))

    def output_error(model: ir.Model, known: bool) -> float:
        NormalizeLinears()(model)
        weight = model.graph.initializers[f"{name}.weight"].const_value.numpy().astype(np.float64)
        QuantizeLinears(Recipe.parse("int4"), (lambda _: gram) if known else None)(model)
        stored = [model.graph.initializers[f"{name}.weight.int4.{part}"] for part in ("codes", "scales")]
        codes, scales = (value.const_value.numpy() for value in stored)
        found = (scales[..., None] * (unpack(codes, 4) - 8)).reshape(64, size)
        return float(((x @ (found - weight).T) ** 2).sum())

    model = bound(intermediate_size=64)
    # The other linears are not read here, so it does no harm that their inputs have another width.
    assert output_error(model.clone(), True) < 0.5 * output_error(model, False)


@pytest.mark.parametrize("form", ["w8a8", "w7a8", "w8a8-rot", "w7a8-rot"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_in_8_bits_is_read_by_token(
    form: str, tied: bool, bound: Callable[..., ir.Model], logits: Callable[..., np.ndarray]
) -> None:
    """What is gathered is the weight within half a step, and what the head multiplies are the same codes."""
    model, recipe = bound(tied=tied), Recipe.parse(f"none,head={form}")
    NormalizeLinears()(model)
    table = model.graph.initializers["model.embed_tokens.weight"].const_value.numpy()
    before = logits(model)
    for step in (QuantizeLinears(recipe), QuantizeEmbedding(recipe), PrepareRows()):
        step(model)
    after = logits(model)
    assert 0 < np.abs(after - before).mean() < (0.1 if "7" in form else 0.05) * np.abs(before).mean()
    stored = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if form in name}
    assert len([name for name in stored if name.endswith(".codes")]) == (0 if tied else 1)  # the head's own
    (codes,) = (array for name, array in stored.items() if name.endswith(".by_token"))
    steps = stored[f"model.embed_tokens.weight.{form}.scales"]
    assert codes.shape == table.shape
    rows = (codes.astype(np.float32) - (0 if "7" in form else 128)) * steps[:, None]
    turned = table @ rotation(32) if "rot" in form else table
    assert (np.abs(rows - turned) <= 0.5001 * steps[:, None]).all()


def test_a_head_in_8_bits_for_no_rows(compile_tiny: Callable[..., Path]) -> None:
    """It reads no row of a prompt's first chunks."""
    for form in ("w8a8", "w8a8-rot", "w7a8-rot"):
        session = Session(open_artifact(compile_tiny(f"int8,head={form}")), threads=1)
        binding = session.bind(session.new_cache())
        binding.run(np.arange(5), 0)
        assert np.isfinite(binding.run(np.arange(3), 1)).all()
