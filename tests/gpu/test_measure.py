"""The measuring script runs from end to end where there is no card: what it would do there is then known to work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsopt.compiler.kernel_table import KernelTable

SCRIPT = Path(__file__).parent / "measure.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=os.environ
    )


def test_it_measures_a_tiny_model_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run("--tiny", "--device", "cpu", "-o", str(out), "--kernels", str(tmp_path / "kernels"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert json.loads(out.read_text()) == rows
    assert {(row["what"], row.get("test"), row.get("batch")) for row in rows[1:]} == {
        *(("dsopt", test, None) for test in ("pp32", "verify 8")),
        *((who, f"tg4 @ d{d}", b) for who in ("dsopt", "transformers") for d in (0, 24) for b in (1, 2)),
        ("transformers", "pp32", None),
    }
    assert all(row["tokens_per_second"] > 0 for row in rows if "tokens_per_second" in row)
    kernels = json.loads((tmp_path / "kernels" / "tiny-fp32.json").read_text())
    assert KernelTable.from_json(kernels["profile"]).time(512, 128, "int4", 8) > 0


def test_after_its_time_no_case_is_begun() -> None:
    done = run("--tiny", "--device", "cpu", "--no-peer", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["what"] for line in done.stdout.splitlines()] == ["copy"]
    assert "tiny int4: left out" in done.stderr


def test_the_plan_needs_no_card() -> None:
    done = run("--plan", "--models", "smollm2-135m", "--recipes", "none,dtype=bf16;int4")
    assert done.returncode == 0, done.stderr
    half, four = (json.loads(line) for line in done.stdout.splitlines())
    assert (half["recipe"], four["recipe"]) == ("none,dtype=bf16", "int4,dtype=fp16")
    weights = 2 * 134_515_008
    assert half["artifact_bytes"] == pytest.approx(weights, rel=0.05)  # rotary tables beside them
    assert half["step_bytes"]["batch 1 @ d0"] == pytest.approx(weights, rel=0.02)
    cache = half["step_bytes"]["batch 32 @ d4096"] - half["step_bytes"]["batch 32 @ d0"]
    assert cache == 32 * 4096 * 2 * 2 * 30 * 3 * 64
    assert four["step_bytes"]["batch 1 @ d0"] < 0.3 * weights


def test_without_a_card_it_says_so() -> None:
    from dsopt.runtime.devices import missing_provider

    if missing_provider("CUDAExecutionProvider") is None:
        pytest.skip("there is a card")
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no card" in done.stderr
