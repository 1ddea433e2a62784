"""Blocks of GGUF repacked: the same numbers as the gguf package's, and the same function in a graph."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from dsopt.compiler import build
from dsopt.compiler.checkpoint import Checkpoint, open_checkpoint
from dsopt.compiler.gguf import GgufTensor
from dsopt.compiler.gguf_blocks import counterpart, repack
from dsopt.compiler.passes.quantize_linears import is_exact
from dsopt.compiler.quantizers import Blocks, quantize_blocks, quantize_minima
from dsopt.compiler.recipe import Format, Recipe
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.session import Session

# Bytes of a block that are halves: any other bytes may be anything.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q6_K": (208,), "Q4_K": (0, 2)}


def random_blocks(dtype: str, rows: int, width: int) -> np.ndarray:
    """Any bytes, but halves that are numbers of about 1: uint8 [rows, bytes of a row]."""
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows * width // block, nbytes), np.uint8)
    for at in HALVES[dtype]:
        raw[:, at : at + 2] = rng.normal(0, 1, len(raw)).astype(np.float16)[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


def gguf_tensor(path: Path, dtype: str, shape: tuple[int, int], raw: np.ndarray, head_dim: int | None = None) -> Any:
    path.write_bytes(b"skip" + raw.tobytes())
    return GgufTensor(path.name, shape, dtype, raw.nbytes, path, 4, head_dim)


def values(made: Blocks) -> np.ndarray:
    """[N, K] in float64."""
    found = made.scales.double()[..., None] * (made.codes.double() - made.zero_points.double()[..., None])
    return (found if made.rest is None else found + made.rest.double()[..., None]).flatten(1).numpy()


@pytest.mark.parametrize("dtype", HALVES)
def test_no_weight_is_rounded(dtype: str, tmp_path: Path) -> None:
    raw = random_blocks(dtype, 24, 512)
    expected = dequantize(raw, GGMLQuantizationType[dtype]).astype(np.float64)
    made = repack(gguf_tensor(tmp_path / "w", dtype, (24, 512), raw), 3, 24)
    form = counterpart(dtype)
    assert form is not None
    assert made.codes.shape == (21, 512 // form.block, form.block)
    assert int(made.codes.max()) < 2**form.bits
    assert int(made.zero_points.max()) < 2**form.bits
    if form.minima:  # scale * code + minimum, whose sum is in float32
        np.testing.assert_allclose(values(made), expected[3:], rtol=0, atol=4e-7 * np.abs(expected).max())
    else:
        assert made.rest is None
        assert form.zero_points or set(made.zero_points.unique().tolist()) == {2 ** (form.bits - 1)}
        np.testing.assert_array_equal(values(made).astype(np.float32), expected[3:].astype(np.float32))


def test_rows_in_the_order_of_llama_cpp_come_in_the_order_of_the_graph(tmp_path: Path) -> None:
    tensor = gguf_tensor(tmp_path / "w", "Q4_0", (32, 64), random_blocks("Q4_0", 32, 64), head_dim=16)
    np.testing.assert_array_equal(values(repack(tensor, 5, 20)), tensor.read(5, 20))


@pytest.mark.parametrize("dtype", ["F32", "Q5_1", "Q2_K", "Q5_K"])
def test_types_without_a_counterpart(dtype: str, tmp_path: Path) -> None:
    assert counterpart(dtype) is None
    tensor = GgufTensor("w", (2, 32), dtype, 2, tmp_path / "w", 0)
    assert not is_exact(tensor, Format.parse("int4-min"))


def test_minima_find_the_grid_that_is_there() -> None:
    """Weights that are on a grid of 4 bits already, with both its ends in use."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (8, 3, 32))
    codes[..., 0], codes[..., 9] = 0, 15
    scales, minima = rng.uniform(0.1, 1, (8, 3, 1)), rng.normal(0, 3, (8, 3, 1))
    x = (scales * codes + minima).astype(np.float32).reshape(8, 96)
    made = quantize_minima(torch.from_numpy(x), 4, 32)
    np.testing.assert_array_equal(made.codes.numpy(), codes)
    np.testing.assert_allclose(values(made), x, atol=1e-5)


def test_minima_lie_closer_than_zero_points() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (64, 96)).astype(np.float32))
    mine, zeros = quantize_minima(x, 4, 32), quantize_blocks(x, 4, 32, zero_points=True)
    assert ((values(mine) - x.numpy()) ** 2).sum() < 0.98 * ((values(zeros) - x.numpy()) ** 2).sum()
    constant = torch.full((2, 32), 0.7)
    np.testing.assert_allclose(values(quantize_minima(constant, 4, 32)), constant, rtol=1e-6)


# --- in a graph

IDS = np.random.default_rng(0).integers(0, 320, 24)


def run(graph: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.use_per_session_threads = Session._pool_threads is None  # a process has one kind of pool or the other
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs() if i.name.startswith("past")}  # fmt: skip
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS)), np.int64), **past}
    return session.run(["logits"], feeds)[0][0]


def lifelike_blocks(dtype: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Of weights around zero. Q4_K cannot be quantized by the package: random codes, minima some steps below zero."""
    rng = np.random.default_rng(seed)
    if dtype == "Q4_1":
        return quantize(rng.normal(0, 0.1, shape).astype(np.float32), GGMLQuantizationType.Q4_1)
    raw = rng.integers(0, 256, (shape[0], shape[1] // 256, 144), np.uint8)
    raw[..., 8:12] = raw[..., 4:8]  # a minimum is its scale's number, in about 7.5 times its unit
    raw[..., 12:16] = 17 * (raw[..., 12:16] & 15)
    units = np.stack([np.full(raw.shape[:2], 7e-4), rng.uniform(4.5e-3, 6e-3, raw.shape[:2])], -1)
    raw[..., :4] = units.astype(np.float16).view(np.uint8)
    return raw.reshape(shape[0], -1)


def quantized(source: Path, folder: Path, dtype: str) -> Checkpoint:
    """The checkpoint with every linear layer of its blocks stored as a GGUF type."""
    checkpoint = open_checkpoint(str(source))
    tensors = dict(checkpoint.tensors)
    for seed, (name, tensor) in enumerate(checkpoint.tensors.items()):
        if "_proj" in name:
            raw = lifelike_blocks(dtype, tensor.shape, seed)  # type: ignore[arg-type]
            tensors[name] = dataclasses.replace(gguf_tensor(folder / name, dtype, tensor.shape, raw), name=name)
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("dtype", ["Q4_1", "Q4_K"])
def test_a_graph_with_minima_is_the_float_graph(
    dtype: str, tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path
) -> None:
    source = tiny_llama_dir(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=16)
    checkpoint = quantized(source, tmp_path, dtype)

    def logits(recipe: str) -> np.ndarray:
        out = tmp_path / recipe
        build.write(build.plan(checkpoint, Recipe.parse(f"{recipe},head=none")), out)
        proto = onnx.load(out / "model.onnx")
        for node in proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0  # float activations: what is looked at are the weights
        onnx.save(proto, out / "float.onnx")
        return run(out / "float.onnx")

    expected = logits("none")
    off = {recipe: np.square(logits(recipe) - expected).mean() for recipe in ("int4-min", "int4-zp")}
    assert off["int4-zp"] > 0
    assert off["int4-min"] < 0.01 * off["int4-zp"]


def test_block_means_are_computed_once_for_all_that_read_an_input(plan_tiny: Callable[..., Any]) -> None:
    plan = plan_tiny("int4-min,head=int8")
    counts = Counter(node.op_type for node in plan.model.graph)
    assert counts["AveragePool"] == counts["Concat"] == 2 * 4  # before qkv, o, gate and up, down
    assert counts["MatMulNBits"] == 2 * 4 + 1
    said = {node["name"]: node for node in plan.manifest.nodes}["model.layers.0.mlp.down_proj"]
    assert said["format"] == "int4-min"
    assert said["bytes"] == 32 * (3 * 16 + 3 * 4 + 2)  # two blocks of weights and one of means


def test_minima_need_whole_blocks(plan_tiny: Callable[..., Any]) -> None:
    with pytest.raises(DsoptError, match="rows of 32 are not whole blocks of 64"):
        plan_tiny("int4-min-b64,head=int8")
    with pytest.raises(UsageError, match="no gather reads int4-min"):
        Recipe.parse("int8,embed=int4-min")
