"""The measuring script runs from end to end where there is no card: what it would do there is then known to work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "measure.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=os.environ
    )


def test_it_measures_a_tiny_model_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run("--tiny", "--device", "cpu", "-o", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert json.loads(out.read_text()) == rows
    assert {(row["what"], row.get("test"), row.get("batch")) for row in rows[1:]} == {
        *(("dsopt", test, None) for test in ("pp32", "verify 8")),
        *((who, f"tg4 @ d{d}", b) for who in ("dsopt", "transformers") for d in (0, 24) for b in (1, 2)),
        ("transformers", "pp32", None),
    }
    assert all(row["tokens_per_second"] > 0 for row in rows if "tokens_per_second" in row)


def test_without_a_card_it_says_so() -> None:
    from dsopt.runtime.devices import missing_provider

    if missing_provider("CUDAExecutionProvider") is None:
        pytest.skip("there is a card")
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no card" in done.stderr
