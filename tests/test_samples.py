"""Every file of samples/ runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "samples"


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a sample with the environment's own dsopt and python first on the PATH."""

    def call(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done

    return call


def test_every_sample_has_a_test() -> None:
    told = Path(__file__).read_text()
    assert [path.name for path in SAMPLES.iterdir() if path.is_file() and path.name not in told] == []


@pytest.mark.skipif(not (ROOT / ".venv" / ".made-from-test").exists(), reason="makes .venv; tests/run.sh has made it")
def test_quickstart(run: Callable[..., subprocess.CompletedProcess[str]], smollm2_gguf: Path, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    (models / smollm2_gguf.name).symlink_to(smollm2_gguf)
    cache = {"DSOPT_CACHE": str(tmp_path / "cache")}
    first = run("sh", SAMPLES / "quickstart.sh", "Why is the sky blue?", **cache)
    assert "scatter" in first.stdout
    assert run("sh", SAMPLES / "quickstart.sh", "Why is the sky blue?", **cache).stdout == first.stdout


def test_pipeline(run: Callable[..., subprocess.CompletedProcess[str]], tiny_artifact: Path) -> None:
    lines = run("sh", SAMPLES / "pipeline.sh", tiny_artifact).stdout.splitlines()
    assert lines[0].startswith("answer: ")
    assert lines[-2].startswith("finished by: ")
    assert lines[-1] == "without a prompt: exit code 2"


def test_batch(run: Callable[..., subprocess.CompletedProcess[str]], tiny_artifact: Path) -> None:
    done = run("sh", SAMPLES / "batch.sh", SAMPLES / "prompts.txt", tiny_artifact)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == (SAMPLES / "prompts.txt").read_text().splitlines()


def test_stream(run: Callable[..., subprocess.CompletedProcess[str]], tiny_artifact: Path) -> None:
    assert "of the prompt from the cache" in run(sys.executable, SAMPLES / "stream.py", tiny_artifact).stdout


def test_custom_pass(
    run: Callable[..., subprocess.CompletedProcess[str]], tiny_llama_dir: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "scaled"
    done = run(sys.executable, SAMPLES / "custom_pass.py", tiny_llama_dir(), out)
    before, after = (int(word) for word in done.stdout.split() if word.isdigit())
    assert after == before + 1
    run("dsopt", "generate", "-m", out, "--raw", "a", "-n", "3")


def test_editing_prompts_are_what_bench_reads() -> None:
    lines = [json.loads(line) for line in (SAMPLES / "editing.jsonl").read_text().splitlines()]
    assert len(lines) >= 8
    assert all(set(line) == {"category", "prompt"} and len(line["prompt"].split()) > 100 for line in lines)
