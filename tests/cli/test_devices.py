"""--target, --dtype and --device from the shell's side."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsopt.cli.main import app
from dsopt.runtime import devices
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError

REASON = "libx.so.1 is missing"


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "missing_provider", lambda provider: REASON)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`call("compile", ...)`: what it prints on stdout and stderr."""

    def run(*arguments: object) -> Any:
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capfd.readouterr()

    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield run


def test_compiling_for_a_card_needs_none(
    call: Callable[..., Any], tiny_llama_dir: Callable[..., Path], exported_once: None, no_card: None, tmp_path: Path
) -> None:
    source = tiny_llama_dir()
    done = call("compile", source, "-o", tmp_path / "a", "--target", "cuda", "--dtype", "bf16", "--quant", "int4")
    assert done.out == f"{tmp_path / 'a'}\n"
    manifest = open_artifact(tmp_path / "a").manifest
    assert (manifest.target, manifest.recipe) == ("cuda", "int4,dtype=bf16")
    call("compile", source, "-o", tmp_path / "b", "--quant", "int4")
    assert open_artifact(tmp_path / "b").manifest.target == "cpu"  # what this machine has
    plan = json.loads(call("compile", source, "--target", "cuda", "--plan").out)
    assert (plan["target"], plan["recipe"]) == ("cuda", "int8,dtype=fp16")


@pytest.mark.parametrize("command", ["generate hi --raw -n 2", "bench -p 4 -n 0 -r 3"])
def test_auto_falls_back_on_stderr(
    call: Callable[..., Any], command: str, compile_tiny: Callable[..., Path], no_card: None
) -> None:
    words = [*command.split(), "-m", compile_tiny("int4", "cuda")]
    said = call(*words).err.splitlines()
    assert said == [f"dsopt: running on the CPU, slowly for a model compiled for CUDA: {REASON}"]
    with pytest.raises(DsoptError, match=f"^--device cuda: {REASON}$"):
        call(*words, "--device", "cuda")


@pytest.mark.parametrize("words", [["--draft", "ngram"], ["--exact"], ["--draft", "DRAFT"]])
def test_a_model_for_a_card_speculates_on_the_cpu(
    call: Callable[..., Any], words: list[str], compile_tiny: Callable[..., Path], no_card: None
) -> None:
    half = compile_tiny("int4", "cuda")
    words = [str(half) if word == "DRAFT" else word for word in words]
    told = json.loads(call("generate", "a b a b a b", "--raw", "-n", 8, "-m", half, "--json", *words).out)
    assert told["stats"]["speculation"]["rounds"] > 0


def test_a_drafter_that_the_cpu_cannot_run_is_named(
    call: Callable[..., Any], tiny_artifact: Path, compile_tiny: Callable[..., Path]
) -> None:
    draft = compile_tiny("int4,dtype=bf16", "cuda")
    with pytest.raises(DsoptError, match="the CPU has no bfloat16 kernels"):
        call("generate", "a", "--raw", "-m", tiny_artifact, "--draft", draft)


def test_bench_spec_runs_where_it_is_told(
    call: Callable[..., Any], tiny_artifact: Path, compile_tiny: Callable[..., Path], no_card: None
) -> None:
    words = ["--spec", "ngram", "--synthetic-accept", 0.5]
    with pytest.raises(DsoptError, match=r"^--device cuda: .* was compiled for the CPU"):
        call("bench", tiny_artifact, *words, "--device", "cuda")
    half = compile_tiny("int4", "cuda")
    with pytest.raises(DsoptError, match=f"^--device cuda: {REASON}$"):
        call("bench", half, *words, "--device", "cuda")
    done = call("bench", half, *words)
    assert "break-even" in done.out
    assert done.err == f"dsopt: running on the CPU, slowly for a model compiled for CUDA: {REASON}\n"


def test_bench_says_what_type_the_cache_is_of(
    call: Callable[..., Any], compile_tiny: Callable[..., Path], no_card: None
) -> None:
    (row,) = json.loads(call("bench", "-m", compile_tiny("int4", "cuda"), "-p", 4, "-n", 0, "-o", "json").out)
    assert (row["type_k"], row["backends"], row["devices"]) == ("f16", "ORT-CPU", "CPU")
