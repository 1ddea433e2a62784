"""Graphs for a target: float types, kernels, and what is refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.passes.check_kernels import CheckKernels
from dsopt.compiler.passes.lower_precision import FLOATS
from dsopt.compiler.probe import probed
from dsopt.compiler.quantizers import quantize_fp8
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.setting import Setting
from dsopt.compiler.targets import TARGETS
from dsopt.runtime.errors import DsoptError, UsageError

Plan = Callable[..., Any]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [("none", "FusedMatMul"), ("int4", "MatMulNBits"), ("int8-zp", "MatMulNBits"),
     ("fp8", "MatMulBlockQuantizedFp8Weight")],
)  # fmt: skip
def test_a_cuda_graph_is_of_one_float_type(plan_tiny: Plan, recipe: str, kernel: str, dtype: str) -> None:
    made = plan_tiny(f"{recipe},dtype={dtype}", target="cuda", hidden_size=128, head_dim=64)
    graph, kind = made.model.graph, FLOATS[dtype]
    assert made.manifest.target == "cuda"
    assert Counter(node.op_type for node in graph)[kernel] == 2 * 4 + 1
    assert {v.dtype for v in graph.inputs if "past" in v.name} == {kind}
    assert {v.dtype for v in graph.outputs if "present" in v.name} == {kind}
    floats = {v.dtype for v in graph.initializers.values() if v.dtype in FLOATS.values()}
    assert floats == ({kind, ir.DataType.FLOAT} if recipe == "fp8" else {kind})
    logits = graph.outputs[0]
    assert (logits.name, logits.dtype) == ("logits", ir.DataType.FLOAT)
    assert [value.name for value in graph.outputs[-2:]] == ["candidates.logits", "candidates.tokens"]
    for attention in (node for node in graph if node.op_type == "GroupQueryAttention"):
        assert len([value for value in attention.inputs if value is not None]) == 7  # no bias: XQA and Flash refuse it


def test_norms_of_q_and_k_go_into_attention(plan_tiny: Plan) -> None:
    counts = {}
    for target in ("cpu", "cuda"):
        graph = plan_tiny("none", target=target, model_type="qwen3", rms_norm_eps=1e-6).model.graph
        counts[target] = Counter(node.op_type for node in graph)
    assert counts["cpu"] - counts["cuda"] >= Counter(RMSNormalization=4, Reshape=8, Split=2)
    for index, attention in enumerate(node for node in graph if node.op_type == "GroupQueryAttention"):
        packed, key, value = attention.inputs[:3]
        assert (key, value) == (None, None)
        assert packed.producer().op_type == "FusedMatMul"
        names = [f"model.layers.{index}.self_attn.{part}_norm.weight" for part in "qk"]
        assert [norm.name for norm in attention.inputs[14:16]] == names
        assert attention.attributes["qk_norm_epsilon"].as_float() == pytest.approx(1e-6)


def test_lowered_weights_are_the_rounded_ones(build_tiny: Callable[..., Any], tiny_llama_dir: Any) -> None:
    source = tiny_llama_dir("one")
    for dtype, kind in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        artifact = build_tiny(f"none,dtype={dtype}", source=source, target="cuda")
        graph = ir.load(artifact.graph).graph
        found = graph.initializers["model.layers.0.self_attn.o_proj.weight"].const_value
        wanted = load_file(source / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].astype(kind)
        np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize(
    ("recipe", "target", "message"),
    [
        ("w8a8", "cuda", "cuda has no kernel for w8a8 with fp16"),
        ("int8,down=w8a8-token-rot", "cuda", "cuda has no kernel for w8a8-token-rot with fp16"),
        ("int4-min", "cuda", "AveragePool, which formats with -min need; int4-zp"),
        ("fp8", "cpu", "cpu has no kernel for fp8 with fp32"),
        ("none,dtype=bf16", "cpu", "--dtype bf16: cpu has kernels for fp32"),
        ("none,dtype=fp32", "cuda", "--dtype fp32: cuda has kernels for fp16, bf16"),
    ],
)
def test_what_has_no_kernel_is_refused(plan_tiny: Plan, recipe: str, target: str, message: str) -> None:
    with pytest.raises(DsoptError, match=message):
        plan_tiny(recipe, target=target)


def test_a_plain_product_is_a_linear_layer_that_no_pass_knew(plan_tiny: Plan) -> None:
    model = plan_tiny("w8a8-rot").model
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert len(products) == 8
    products[3].replace_input_with(1, model.graph.inputs[0])
    with pytest.raises(DsoptError, match="cpu has no kernel for MatMul"):
        CheckKernels(TARGETS["cpu"])(model)


def test_an_operator_that_the_target_lacks_is_named(plan_tiny: Plan) -> None:
    model = plan_tiny("none", target="cuda").model
    last = list(model.graph)[-1]
    model.graph.append(ir.node("Mamba2Verify", [last.outputs[0]], domain="com.microsoft", name="odd"))
    with pytest.raises(DsoptError, match="odd: cuda has no kernel for Mamba2Verify"):
        CheckKernels(TARGETS["cuda"])(model)


def test_heads_too_wide_for_the_target(plan_tiny: Plan) -> None:
    with pytest.raises(DsoptError, match="at most 256, not 272"):
        plan_tiny("none", target="cuda", head_dim=272)


def test_weights_beyond_float16(build_tiny: Callable[..., Any], tiny_llama_dir: Any) -> None:
    source: Path = tiny_llama_dir("large")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(DsoptError, match=r"layers\.1\.mlp\..*beyond float16; compile with --dtype bf16"):
        build_tiny("none", source=source, target="cuda")
    build_tiny("none,dtype=bf16", source=source, target="cuda")


@pytest.mark.parametrize("recipe", ["none", "int4-zp-b64", "fp8"])
def test_the_manifest_counts_the_bytes_that_are_stored(plan_tiny: Plan, recipe: str) -> None:
    made = plan_tiny(recipe, target="cuda", hidden_size=128, head_dim=64, intermediate_size=256, tied=False)
    stored = sum(v.const_value.nbytes for n, v in made.model.graph.initializers.items() if "proj" in n and ".w" in n)
    split = 2 * 16  # the widths of gate and up are of 2 integers a layer
    counted = sum(node["bytes"] for node in made.manifest.nodes if node["layer"] is not None)
    assert stored - split == counted


def test_the_float_type_is_part_of_the_recipe() -> None:
    recipe = Recipe.parse("int4,head=int8")
    assert recipe.with_dtype("fp32") == recipe
    assert recipe.with_dtype("fp16").text == "int4,head=int8,dtype=fp16"
    assert Recipe.parse("int4,head=int8,dtype=fp16") == recipe.with_dtype("fp16")
    with pytest.raises(UsageError, match="--dtype is fp16, --quant says dtype=bf16"):
        Recipe.parse("int4,dtype=bf16").with_dtype("fp16")
    with pytest.raises(UsageError, match="fp64"):
        Recipe.parse("int4,dtype=fp64")
    with pytest.raises(UsageError, match="embed"):
        Recipe.parse("fp8,embed=fp8")


def test_onnxruntime_genai_is_told_the_provider(build_tiny: Callable[..., Any]) -> None:
    config = json.loads(build_tiny("int4", target="cuda").text("genai_config.json"))
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]


def test_the_cpu_has_the_kernels_on_record() -> None:
    assert {d: set(f) for d, f in probed("cpu").linears.items()} == {
        d: set(f) for d, f in TARGETS["cpu"].linears.items()
    }


@pytest.mark.cuda
def test_the_gpu_has_the_kernels_on_record() -> None:
    assert {d: set(f) for d, f in probed("cuda").linears.items()} == {
        d: set(f) for d, f in TARGETS["cuda"].linears.items()
    }


def test_fp8_blocks_are_within_half_a_step() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (5, 300)).astype(np.float32))
    x[2] = 0
    codes, scales = quantize_fp8(x)
    assert codes.shape == (5, 300)
    assert scales.shape == (5, 3)
    wide = scales.double().repeat_interleave(128, 1)[:, :300]
    back = codes.double() * wide
    # e4m3 has 3 bits of mantissa: half a step is 1/16 of the power of two below; subnormal steps are 2^-9.
    bound = torch.maximum(x.double().abs() / 16, wide * 2**-10) * 1.0001
    assert bool(((back - x.double()).abs() <= bound).all())
    assert float(codes.float().abs().max()) == 448


@pytest.mark.parametrize("adds", [True, False])
def test_seven_bits_are_for_processors_that_add_in_sixteen(
    adds: bool, tiny_llama_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsopt.compiler.setting.adds_in_16_bits", lambda: adds)
    setting = Setting.open(open_checkpoint(str(tiny_llama_dir())), "cpu", None, None)
    assert {"w8a8", "w8a8-token-rot"} < (formats := set(map(str, setting.arithmetic.formats)))
    assert ({"w7a8", "w7a8-token-rot"} < formats) == adds
    assert any("w7" in form for form in formats) == adds
