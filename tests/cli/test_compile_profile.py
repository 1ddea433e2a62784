"""dsopt compile --profile: a search by the kernel times of another machine, and for a card."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from search_tiny import made_up

from dsopt.cli.compile import compile_model
from dsopt.cli.order import Order
from dsopt.compiler import probe, setting
from dsopt.compiler import study as studying
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.recipe import Format
from dsopt.runtime import devices
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError


@pytest.fixture
def source(tiny_llama_dir: Callable[..., Path], exported_once: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(studying, "measure", made_up)
    return str(tiny_llama_dir("tiny", max_position_embeddings=32))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(60)))
    return path


CUDA_SPEEDS = {"none": 4, "fp8": 2, "int8": 2.5, "int4": 1, "int4-zp": 1.5}


def profile_of_a_card(path: Path, **changes: str) -> Path:
    """A dsopt.json, as far as --profile reads it, with times of a card that this machine has not."""
    cells = {(64, 64, form, m): 1e-7 * m**0.5 * speed for form, speed in CUDA_SPEEDS.items() for m in (1, 4, 512)}
    table = KernelTable({"device": "H0", "target": "cuda", "dtype": "fp16", **changes}, cells, {1: 1e-6})
    path.write_text(json.dumps({"profile": table.to_json()}))
    return path


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(provider: str) -> str | None:
        return "libx.so.1 is missing" if provider.startswith("CUDA") else None

    for module in (devices, setting, probe):
        monkeypatch.setattr(module, "missing_provider", missing)


def test_a_search_for_a_card_without_one_needs_its_times(
    source: str, text: Path, tmp_path: Path, no_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DsoptError, match=r"and libx.so.1 is missing; give --profile .* --quant int8"):
        compile_model(source, order=Order(loss="0.5", calib=text, target="cuda"))
    profile = profile_of_a_card(tmp_path / "dsopt.json")
    monkeypatch.setattr(studying, "measure", None)  # nothing is timed here
    out = compile_model(source, order=Order(loss="0.02", calib=text, target="cuda", profile=tmp_path))
    manifest = open_artifact(out).manifest
    assert manifest.target == "cuda"
    assert manifest.recipe.endswith(",dtype=fp16")
    assert ",profile=" in manifest.recipe
    assert manifest.profile is not None
    assert manifest.profile["machine"]["device"] == "H0"
    assert manifest.quality is not None
    assert manifest.quality["kld_mean"] <= 0.02
    assert manifest.search is not None
    # What the card has and the CPU, which judges, can run; no activation is rounded in their prices.
    assert {"none", "int8", "int4"} <= set(manifest.search["uniform"]) <= {"none", "int8", "int4", "int4-zp"}
    assert manifest.search["uniform"]["none"]["loss"] < 1e-4 < manifest.search["uniform"]["int4"]["loss"]
    assert {node["format"] for node in manifest.nodes} <= set(CUDA_SPEEDS)
    assert compile_model(source, order=Order(loss="0.02", calib=text, target="cuda", profile=profile)) == out


@pytest.mark.parametrize(
    ("changes", "order", "says"),
    [
        ({"dtype": "bf16"}, {}, "--profile: has times of cuda in bf16, wanted are those of cuda in fp16"),
        ({"target": "cpu"}, {}, "--profile: has times of cpu in fp16"),
        ({"dtype": "bf16"}, {"dtype": "bf16"}, "the CPU cannot stand in, it has no bfloat16 kernels"),
    ],
)
def test_times_that_will_not_do(
    source: str, changes: dict[str, str], order: dict[str, str], says: str, tmp_path: Path, no_card: None
) -> None:
    profile = profile_of_a_card(tmp_path / "dsopt.json", **changes)
    with pytest.raises(DsoptError, match=says):
        compile_model(source, order=Order(target="cuda", profile=profile, **order))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ('{"profile": null}', "has no kernel times"),
        ('{"profile": {"machine": {}}}', "not a kernel table"),
    ],
)
def test_a_profile_that_is_none(source: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "dsopt.json").write_text(content)
    with pytest.raises(DsoptError, match=says):
        compile_model(source, order=Order(target="cpu", profile=tmp_path))
    with pytest.raises(DsoptError, match="could not be read"):
        compile_model(source, order=Order(target="cpu", profile=tmp_path / "gone.json"))


def test_a_card_that_is_here_is_searched(source: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed as it is asked for, and judged on it."""
    for module in (devices, setting):
        monkeypatch.setattr(module, "missing_provider", lambda provider: None)
    asked: dict[str, Any] = {}

    def measured(shapes: Mapping[Any, Sequence[Format]], rows: Sequence[int], **options: Any) -> KernelTable:
        asked.update(options, rows=list(rows), forms={str(form) for forms in shapes.values() for form in forms})
        raise InterruptedError

    monkeypatch.setattr(studying, "measure", measured)
    with pytest.raises(InterruptedError):
        compile_model(source, order=Order(calib=text, dtype="bf16"))
    assert (asked["target"], asked["dtype"]) == ("cuda", "bf16")
    assert asked["caches"] == ("float",)
    assert 512 in asked["rows"]  # a prompt is one run there
    assert {"none", "fp8", "int8", "int4"} <= asked["forms"]
    assert not asked["forms"] & {"w8a8", "int4-min"}
