"""The kernel table: what is measured, kept and told between the measured points."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest

from dsopt.compiler import chains, profile
from dsopt.compiler.chains import Body
from dsopt.compiler.kernel_table import KernelTable
from dsopt.compiler.recipe import Format
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.files import cache_dir


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that fit the cache: what is tested here is not the speed."""
    monkeypatch.setattr(profile, "_TRAFFIC", 1 << 16)
    monkeypatch.setattr(chains, "_POOL_BYTES", 1 << 20)
    chains.forget_pools()


def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats for which chains are built from now on."""
    built: list[str] = []
    original = profile.linear_chain

    def spy(form: Format, *args: Any) -> Any:
        built.append(str(form))
        return original(form, *args)

    monkeypatch.setattr(profile, "linear_chain", spy)
    return built


def test_every_format_is_timed_and_kept(few_bytes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = ("none", "int4-zp", "int8-b64", "w8a8")
    table = profile.measure([(64, 96)], (1, 4), formats, body=Body(64, 96, 4, 2, 16), budget=0.1)
    assert set(table.cells) == {(64, 96, form, rows) for form in formats for rows in (1, 4)}
    assert all(0 < seconds < 1 for seconds in table.cells.values())
    assert table.other(1) > 0
    built = made(monkeypatch)
    again = profile.measure([(64, 96)], (1, 4), [*formats, Format("nbits", 4, 32)], budget=0.1)
    # Times of two runs do not compare: what else the machine does differs.
    assert set(built) == {"none", "int4-zp", "int8-b64", "w8a8", "int4"}
    assert again.cells.keys() > table.cells.keys()
    built.clear()
    assert profile.measure([(64, 96)], (1, 4), formats, budget=0.1).cells.items() <= again.cells.items()
    assert built == []  # all known, of one run
    profile.measure([(64, 96)], (1, 4), ("int4", "int4-b64"), budget=0.1)
    assert set(built) == {"int4", "int4-b64"}
    built.clear()
    profile.measure([(64, 96)], (1, 4), ("int4", "w8a8"), budget=0.1)
    assert set(built) == {"int4", "w8a8"}  # both known, of two runs


def test_what_slows_a_round_slows_no_format_of_it() -> None:
    bases = {"none": 9.0, "int4": 2.0, "int4-zp": 2.5, "int8": 3.0, "w8a8": 5.0}
    times = {(64, 96, form, rows): base * rows for form, base in bases.items() for rows in (1, 4)}
    noise = [1.5, 1.1, 1.3, 2.0, 1.2]
    rounds = [{cell: seconds * slow for cell, seconds in times.items()} for slow in noise]
    for cell, seconds in profile.settled(rounds).items():
        assert seconds == pytest.approx(1.1 * times[cell])
    rounds[0][64, 96, "w8a8", 4] /= 3  # a moment that the others did not have
    assert profile.settled(rounds)[64, 96, "w8a8", 4] == pytest.approx(1.1 * 20.0)
    alone = [{(64, 96, "int4", 1): seconds} for seconds in (3.0, 2.0, 4.0)]
    assert profile.settled(alone) == {(64, 96, "int4", 1): 2.0}


def test_tables_of_other_settings_are_not_mixed(few_bytes: None) -> None:
    profile.measure([(32, 32)], (1,), ("none",), budget=0.1)
    (path,) = (cache_dir() / "kernels").iterdir()
    data = json.loads(path.read_bytes())
    assert data["machine"].keys() == {"device", "target", "dtype", "threads", "onnxruntime"}
    data["machine"]["onnxruntime"] = "0.0"
    other = profile._Store(data["machine"])
    assert not other.has([(32, 32, "none", 1)])
    assert profile._Store({**data["machine"], "onnxruntime": ort.__version__}).has([(32, 32, "none", 1)])


def test_a_damaged_cache_is_measured_anew(few_bytes: None) -> None:
    profile.measure([(32, 32)], (1,), ("none",), budget=0.1)
    (path,) = (cache_dir() / "kernels").iterdir()
    Path(path).write_text("{")
    assert profile.measure([(32, 32)], (1,), ("none",), budget=0.1).time(32, 32, "none", 1) > 0


def test_an_unknown_target_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="npu"):
        profile.measure([(32, 32)], target="npu")


def table() -> KernelTable:
    cells = {(10, 10, "int4", 1): 2e-6, (10, 10, "int4", 4): 5e-6, (10, 10, "int4", 8): 13e-6}
    return KernelTable({"device": "x"}, {**cells, (20, 30, "int4", 1): 12e-6}, {1: 3e-6, 5: 7e-6})


@pytest.mark.parametrize(("rows", "micros"), [(1, 2), (2, 3), (4, 5), (6, 9), (10, 17)])
def test_times_between_and_beyond_measured_rows(rows: int, micros: float) -> None:
    assert table().time(10, 10, "int4-b32", rows) == pytest.approx(1e-6 * micros)


def test_an_unmeasured_shape_has_a_fixed_cost_and_a_cost_a_weight() -> None:
    # 100 weights 2 us, 600 weights 12 us: 0.02 us a weight and nothing fixed.
    assert table().time(10, 20, "int4", 1) == pytest.approx(4e-6)


def test_what_was_not_measured_is_an_error() -> None:
    with pytest.raises(DsoptError, match="int8"):
        table().time(10, 10, "int8", 1)
    with pytest.raises(DsoptError, match="body"):
        KernelTable({}, table().cells).other(1)


def test_a_table_survives_the_manifest() -> None:
    back = KernelTable.from_json(json.loads(json.dumps(table().to_json())))
    assert back.time(20, 30, "int4", 1) == pytest.approx(12e-6)
    assert back.other(3) == pytest.approx(5e-6)
    assert back.narrow_bodies == {}
    with pytest.raises(DsoptError, match="body"):
        back.other(1, "int8")
    narrow = dataclasses.replace(table(), narrow_bodies={1: 2e-6, 5: 4e-6})
    assert KernelTable.from_json(json.loads(json.dumps(narrow.to_json()))).other(3, "int8") == pytest.approx(3e-6)
    assert back.machine == table().machine
    with pytest.raises(DsoptError, match="kernel table"):
        KernelTable.from_json({"machine": {}, "microseconds": {"10by10": {}}})


def test_a_chain_runs_the_operator_that_the_pass_emits(plan_tiny: Any) -> None:
    nodes = {node.name: node for node in plan_tiny("int8-b64").model.graph}
    emitted = nodes["model.layers.0.self_attn.o_proj/MatMulNBits"]
    timed = chains.linear_node(Format.parse("int8-b64"), ir.val("x"), [], 32, 32)
    assert {k: v.value for k, v in timed.attributes.items()} == {k: v.value for k, v in emitted.attributes.items()}
