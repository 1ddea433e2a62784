"""Checkpoints in float8 with a scale a square: kept on CUDA, read as floats elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import tiny_weights
from safetensors.torch import load_file, save_file

from dsopt.cli.compile import compile_model
from dsopt.cli.order import Order
from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.fp8 import Fp8Tensor
from dsopt.compiler.recipe import Recipe
from dsopt.runtime import devices
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError

SIZES = {
    "hidden_size": 160,
    "head_dim": 64,
    "intermediate_size": 288,
}  # more than a square, and no whole number of them
SQUARES = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def fp8_dir(tiny_llama_dir: Callable[..., Path]) -> Callable[..., Path]:
    """A tiny Llama whose projections are codes and scales; `**changes` of its quantization_config."""

    def make(**changes: Any) -> Path:
        folder = tiny_llama_dir("fp8", **SIZES, tied=False, quantization_config={**SQUARES, **changes})
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if "_proj" in name]:
            tensors[name], tensors[f"{name}_scale_inv"] = coded(tensors[name])
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def coded(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = w.shape
    scales = torch.empty(-(-n // 128), -(-k // 128))
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = w[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            scales[i, j] = part.abs().max() / 448
            codes[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] = (part / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def by_hand(folder: Path, name: str) -> np.ndarray:
    """The weight in float64."""
    stored = load_file(folder / "model.safetensors")
    codes, scales = stored[name].double().numpy(), stored[f"{name}_scale_inv"].double().numpy()
    wide = np.kron(scales, np.ones((128, 128)))[: codes.shape[0], : codes.shape[1]]
    return codes * wide


def test_weights_are_read_as_codes_times_scales(fp8_dir: Callable[..., Path]) -> None:
    folder = fp8_dir()
    checkpoint = open_checkpoint(str(folder))
    tensor = checkpoint.tensors[UP]
    assert isinstance(tensor, Fp8Tensor)
    assert tensor.nbytes == 288 * 160 + 4 * 3 * 2
    wanted = by_hand(folder, UP)
    np.testing.assert_array_equal(tensor.read(), wanted.astype(np.float32))
    np.testing.assert_array_equal(tensor.read(100, 150), wanted[100:150].astype(np.float32))
    np.testing.assert_allclose(tensor.read(), tiny_weights(checkpoint.config)[UP], atol=0.05)
    assert not any(name.endswith("_scale_inv") for name in checkpoint.tensors)


def test_a_graph_for_cuda_keeps_codes_and_scales(
    fp8_dir: Callable[..., Path], exported_once: None, tmp_path: Path
) -> None:
    folder, lines = fp8_dir(), list[str]()
    recipe = Recipe.parse("fp8,head=none")
    build.write(build.plan(open_checkpoint(str(folder)), recipe, target="cuda", report=lines.append), tmp_path / "out")
    assert lines == []
    weights = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    codes, scales = (weights[f"{name}.{part}"].const_value for part in ("codes", "scales"))
    assert codes is not None
    assert scales is not None
    assert codes.dtype == ir.DataType.FLOAT8E4M3FN
    np.testing.assert_array_equal(codes.numpy().view(np.uint8), stored[name].view(torch.uint8).numpy())
    rows = stored[f"{name}_scale_inv"].numpy()[[0] * 128 + [1] * 32]
    np.testing.assert_array_equal(scales.numpy(), rows)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("none", "14 weights stored as F8_E4M3 become floats; --target cuda --quant fp8 keeps them"),
        ("int8", "14 weights stored as F8_E4M3 are rounded again to int8"),
    ],
)
def test_the_cpu_reads_them_as_floats_and_says_so(
    recipe: str, says: str, fp8_dir: Callable[..., Path], exported_once: None, tmp_path: Path
) -> None:
    folder, lines = fp8_dir(), list[str]()
    build.write(build.plan(open_checkpoint(str(folder)), Recipe.parse(recipe), report=lines.append), tmp_path / "out")
    assert [line.startswith(says) for line in lines] == [True]
    if recipe == "none":
        weights = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
        found = weights["model.layers.0.mlp.down_proj.weight"].const_value
        assert found is not None
        np.testing.assert_array_equal(
            found.numpy(), by_hand(folder, "model.layers.0.mlp.down_proj.weight").astype(np.float32)
        )


def test_auto_for_a_card_that_is_not_here_keeps_them(
    fp8_dir: Callable[..., Path], exported_once: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "missing_provider", lambda provider: "libx.so.1 is missing")
    out = compile_model(str(fp8_dir()), tmp_path / "out", Order(target="cuda", dtype="bf16"))
    manifest = open_artifact(out).manifest
    assert manifest.recipe == "fp8,head=none,dtype=bf16"
    assert {node["role"]: node["format"] for node in manifest.nodes}["head"] == "none"


def test_a_code_that_is_no_number(fp8_dir: Callable[..., Path], exported_once: None, tmp_path: Path) -> None:
    folder = fp8_dir()
    stored = load_file(folder / "model.safetensors")
    stored[UP].view(torch.uint8)[3, 5] = np.array(np.nan, ml_dtypes.float8_e4m3fn).view(np.uint8).item()
    save_file(stored, folder / "model.safetensors")
    plan = build.plan(open_checkpoint(str(folder)), Recipe.parse("fp8,head=none"), target="cuda")
    with pytest.raises(DsoptError, match=f"{UP} has NaN"):
        build.write(plan, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight_block_size": None}, "fp8 of another kind .weight_block_size None"),
        ({"weight_block_size": [128]}, "fp8 of another kind"),
        ({"weight_block_size": [128, 0]}, "fp8 of another kind"),
        ({"fmt": "e5m2"}, "fmt e5m2"),
        ({"activation_scheme": "static"}, "activation_scheme static"),
        ({"weight_block_size": [64, 128]}, r"_scale_inv is \[2, 3\]; .* needs \[3, 3\]"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
    ],
)
def test_other_kinds_are_refused(fp8_dir: Callable[..., Path], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DsoptError, match=says):
        open_checkpoint(str(fp8_dir(**changes)))


def test_codes_without_scales_or_without_a_word(fp8_dir: Callable[..., Path]) -> None:
    folder = fp8_dir()
    stored = load_file(folder / "model.safetensors")
    del stored[f"{UP}_scale_inv"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(DsoptError, match=f"{UP}_scale_inv is missing"):
        open_checkpoint(str(folder))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DsoptError, match="is stored as F8_E4M3; only"):
        open_checkpoint(str(folder))
