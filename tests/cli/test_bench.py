"""dsopt bench: llama-bench's rows and fields in all four forms, and what it refuses."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from dsopt.cli.bench import _numbers
from dsopt.cli.main import app
from dsopt.runtime.errors import DsoptError, UsageError

Run = Callable[..., str]
LLAMA_BENCH = [
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends"),
    *("model_filename", "model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads"),
    *("type_k", "type_v", "n_gpu_layers", "flash_attn", "devices", "use_mmap", "embeddings"),
    *("n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts"),
]


@pytest.fixture
def bench(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`bench("-p", 8, ...)`: what it prints on stdout."""

    def run(*options: object) -> str:
        app(["bench", str(tiny_artifact), *map(str, options)], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_rows_are_the_product_in_llama_bench_order(bench: Run) -> None:
    lines = bench("-p", "8,4", "-n", 2, "-pg", "4,2", "-d", "0,16", "-r", 2, "-o", "jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    shapes = [(8, 0), (4, 0), (0, 2), (4, 2)]
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [(p, n, d) for d in (0, 16) for p, n in shapes]
    for row in rows:
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([1e9 * tokens / ns for ns in row["samples_ns"]])
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert row["stddev_ts"] == pytest.approx(abs(row["samples_ts"][0] - row["samples_ts"][1]) / 2**0.5)
        assert (row["dsopt_ttft_ms"] is None) == (row["n_prompt"] == 0)
        assert (row["dsopt_itl_ms_p50"] is None) == (row["dsopt_itl_ms_p95"] is None) == (row["n_gen"] == 0)


def test_fields_are_those_of_llama_bench_and_of_dsopt(bench: Run, tiny_artifact: Path) -> None:
    (row,) = json.loads(bench("-p", 8, "-n", 0, "-r", 1, "-o", "json"))
    fields = [name for name in row if not name.startswith("dsopt_")]
    assert fields == [*LLAMA_BENCH, "samples_ns", "samples_ts"]
    manifest = json.loads((tiny_artifact / "dsopt.json").read_text())
    assert row["model_filename"] == str(tiny_artifact)
    assert row["model_n_params"] == manifest["model"]["parameters"]
    assert row["model_size"] == sum((tiny_artifact / f).stat().st_size for f in ("model.onnx", "model.onnx.data"))
    assert row["model_type"] == "llama 28.8K none"
    assert (row["stddev_ns"], row["stddev_ts"]) == (0, 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["test_time"])
    assert abs(datetime.fromisoformat(row["test_time"]).timestamp() - datetime.now().timestamp()) < 60
    assert row["dsopt_recipe"] == "none"
    assert row["dsopt_peak_rss"] > 10_000_000


def test_csv_has_a_header_and_no_lists(bench: Run) -> None:
    text = bench("-p", 8, "-n", 2, "-r", 1, "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(r["n_prompt"], r["n_gen"]) for r in rows] == [("8", "0"), ("0", "2")]
    assert [name for name in rows[0] if not name.startswith("dsopt_")] == LLAMA_BENCH
    assert text.splitlines()[0].startswith('"build_commit","build_number",')
    assert rows[0]["dsopt_itl_ms_p50"] == ""


def test_the_markdown_table_is_aligned(bench: Run) -> None:
    head, rule, *rows, empty, build = bench("-p", 8, "-n", 2, "-d", "0,16", "-r", 3).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == (
        ["model", "size", "params", "backend", "threads", "test", "t/s"]
    )
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[5] for row in cells] == ["pp8", "tg2", "pp8 @ d16", "tg2 @ d16"]
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[6]) for row in cells)
    assert (empty, build.split()[:2]) == ("", ["build:", "dsopt"])


def test_few_repetitions_are_marked(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for repetitions, marked in ((2, True), (3, False)):
        app(["bench", str(tiny_artifact), "-p", "4", "-n", "0", "-r", str(repetitions)], standalone_mode=False)
        assert ("-r 3 or more" in capsys.readouterr().err) == marked


def test_the_model_may_stand_behind_m(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["bench", "-m", str(tiny_artifact), "-p", "4", "-n", "0", "-r", "3"], standalone_mode=False)
    assert "pp4" in capsys.readouterr().out
    with pytest.raises(UsageError, match="two models"):
        app(["bench", "elsewhere", "-m", str(tiny_artifact)], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["-p", "-8"], "-p is '-8'", 2),
        (["-p", "many"], "-p is 'many'", 2),
        (["-n", "9-3"], "does not rise", 2),
        (["-n", "3-9*1"], "does not rise", 2),
        (["-p", "1-1000000000"], "-p is '1-1000000000': more than 10000 values", 2),
        (["-p", "1-200", "-d", "1-200"], "make 40200 tests", 2),
        (["-pg", "512"], "-pg is '512'", 2),
        (["-p", "0", "-n", "0"], "nothing to measure", 2),
        (["-r", "0"], "-r is 0", 2),
        (["--threads", "0"], "--threads is 0", 2),
        (["-p", "4", "-n", "0", "--threads", "99999"], "--threads is 99999; this machine has", 2),
        (["-p", "257"], "pp257: 257 positions are needed; this model has 256", 1),
        (["-p", "8", "-n", "8", "-d", "250"], "pp8 @ d250: 258 positions are needed", 1),
    ],
)
def test_bad_values_are_one_line(bench: Run, options: list[str], words: str, code: int) -> None:
    with pytest.raises(DsoptError) as caught:
        bench(*options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("512", [512]),
        ("0,16,4", [0, 16, 4]),
        ("3-5", [3, 4, 5]),
        ("10-25+5", [10, 15, 20, 25]),
        ("10-24+5", [10, 15, 20]),
        ("8-64*2,7", [8, 16, 32, 64, 7]),
    ],
)
def test_ranges(text: str, numbers: list[int]) -> None:
    assert _numbers("-p", [text]) == numbers


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_on_a_terminal_leaves_the_pipe_alone(tiny_artifact: Path) -> None:
    import pty

    terminal, side = pty.openpty()
    command = "import sys; from dsopt.cli.main import main; main()"
    options = ["bench", str(tiny_artifact), "-p", "4", "-n", "2", "-r", "3", "-o", "jsonl"]
    done = subprocess.run([sys.executable, "-c", command, *options], stdout=subprocess.PIPE, stderr=side, check=True)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    os.close(side)
    assert [json.loads(line)["dsopt_test"] for line in done.stdout.splitlines()] == ["pp4", "tg2"]
    assert "pp4" in shown
    assert "3/3" in shown
