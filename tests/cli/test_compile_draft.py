"""dsopt compile --draft: a drafter beside its model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dsopt.cli.compile import compile_model
from dsopt.cli.main import app
from dsopt.cli.order import Order
from dsopt.runtime.artifact import open_artifact


@pytest.fixture
def dsopt(exported_once: None) -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, ["compile", *map(str, arguments)])


def test_a_pair_is_compiled_once(
    dsopt: Callable[..., Result], compile_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = compile_pair("vanilla")
    first = dsopt(pair.target, "--draft", pair.drafter, "--quant", "none")
    assert first.exit_code == 0, first.output
    made = Path(first.stdout.strip())
    artifact = open_artifact(made)
    assert (artifact.manifest.drafters, artifact.manifest.taps) == (("draft-dspark",), (0, 2))
    from dsopt.compiler import build

    monkeypatch.setattr(build, "plan", lambda *_, **__: pytest.fail("compiled again"))
    again = compile_model(str(pair.target), order=Order("none", draft=str(pair.drafter)))
    assert again == made


def test_another_drafter_or_none_is_another_model(
    dsopt: Callable[..., Result], compile_pair: Callable[..., Any], tmp_path: Path
) -> None:
    pair, other, out = compile_pair("vanilla"), compile_pair("eagle3"), tmp_path / "out"
    base = [pair.target, "--quant", "none"]
    assert dsopt(*base, "--draft", pair.drafter, "-o", out).exit_code == 0
    for rest in ([], ["--draft", other.drafter]):
        refused = dsopt(*base, *rest, "-o", out)
        assert refused.exit_code != 0
        assert not refused.stdout
    replaced = dsopt(*base, "--draft", other.drafter, "-o", out, "--force")
    assert replaced.exit_code == 0, replaced.output
    assert sorted(path.name for path in out.glob("draft-*")) == ["draft-eagle3"]


def test_the_plan_counts_the_drafter(dsopt: Callable[..., Result], compile_pair: Callable[..., Any]) -> None:
    pair = compile_pair("vanilla")
    base = [pair.target, "--quant", "int8", "--plan"]
    alone, both = (json.loads(dsopt(*base, *rest).stdout) for rest in ([], ["--draft", pair.drafter]))
    (drafter,) = both["drafters"]
    assert drafter["name"] == "draft-dspark"
    assert alone["drafters"] == []
    assert both["bytes"] == alone["bytes"] + drafter["bytes"]


@pytest.mark.parametrize(("name", "split"), [("vanilla", True), ("eagle3", False)])
def test_bench_splits_the_cost_of_a_block(name: str, split: bool, compile_pair: Callable[..., Any]) -> None:
    artifact = compile_pair(name).artifact
    (drafter,) = artifact.glob("draft-*")
    options = ["--spec", str(drafter), "--synthetic-accept", "0.8"]
    done = CliRunner().invoke(app, ["bench", str(artifact), *options, "-o", "jsonl", "--threads", "1"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["draft_ms"] > 0 and row["verify_ms"] > 0 and row["break_even_length"] > 0 for row in rows)
    assert [row["drafted"] for row in rows] == [1, 2, 3, 4]  # as many as the drafter proposes
    assert {"ingest_ms", "block_ms", "chain_ms"} <= set(rows[0]) if split else "ingest_ms" not in rows[0]
    table = CliRunner().invoke(app, ["bench", str(artifact), *options, "--threads", "1"]).stdout
    assert ("chain ms" in table) == split
