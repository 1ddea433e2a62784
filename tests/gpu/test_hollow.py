"""Graphs for CUDA in ONNX Runtime's own CUDA provider, without a card: see hollow.py."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsopt.compiler.targets import TARGETS
from dsopt.runtime.devices import missing_provider

HERE = Path(__file__).parent
RECIPES = (
    *("none", "int4", "int8-zp", "none,dtype=bf16", "int4,head=none,dtype=bf16", "fp8,dtype=bf16"),
    *("int4,cache=fp8", "int8,dtype=bf16,cache=fp8", "int4,cache=int8"),
    "int4,dtype=bf16",  # of Qwen3, with its norms inside attention
)
SIZES = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 1}


def hollow() -> Any:
    spec = importlib.util.spec_from_file_location("hollow", HERE / "hollow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ran(compile_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What the run reports, and what ONNX Runtime printed of its attention kernels."""
    if missing_provider("CUDAExecutionProvider") is None:
        pytest.skip("there is a card: the tests marked cuda use it")
    if list(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libcudart.so*")):
        pytest.skip("torch brought the real CUDA runtime, which would be loaded in place of the hollow one")
    if missing := hollow().missing_tool():
        pytest.skip(missing)
    stubs = hollow().make(tmp_path_factory.mktemp("hollow") / "lib")
    artifacts = [compile_tiny(recipe, "cuda", **SIZES) for recipe in RECIPES[:-1]]
    artifacts.append(compile_tiny(RECIPES[-1], "cuda", model_type="qwen3", **SIZES))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs), "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    command = [sys.executable, str(HERE / "hollow_run.py"), *map(str, artifacts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(artifacts[0].with_suffix(".json").read_text()), done.stdout


def test_the_record_of_kernels_is_what_this_onnxruntime_has(ran: tuple[dict[str, Any], str]) -> None:
    assert {dtype: set(formats) for dtype, formats in ran[0]["probe"].items()} == {
        dtype: set(formats) for dtype, formats in TARGETS["cuda"].linears.items()
    }


def test_all_but_the_length_is_on_the_card(ran: tuple[dict[str, Any], str]) -> None:
    """CUDA graphs allow nothing else: only the scalar that attention reads on the host is computed there."""
    for recipe, report in zip(RECIPES, ran[0]["artifacts"], strict=True):
        placed = report["placed"]
        assert set(placed) == {"CPUExecutionProvider", "CUDAExecutionProvider"}, recipe
        assert sorted(placed["CPUExecutionProvider"]) == ["attention_mask.length/Squeeze", "total_length/Cast"], recipe


def test_attention_takes_its_fast_kernels_and_replays(ran: tuple[dict[str, Any], str]) -> None:
    """The first step of a width runs, warms up and is captured; those after it do not come back to the host."""
    steps: list[tuple[int, list[str]]] = []
    for line in ran[1].splitlines():
        if step := re.match(r"step (\d+)", line):
            steps.append((int(step[1]), []))
        if found := re.search(r"layers\.0\.self_attn/.* SdpaKernel=(\w+)", line):
            steps[-1][1].append(found[1])
    flash = ["FLASH_ATTENTION"] * 3
    one = [(20, flash[:1]), (1, ["XQA"] * 3), *[(1, [])] * 3, (4, flash), *[(4, [])] * 2]
    one += [(4, flash), (4, [])] * 2  # candidates, and more of them, are graphs of their own
    assert steps == one * len(RECIPES)
