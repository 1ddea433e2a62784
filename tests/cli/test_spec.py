"""Speculation on the command line: generate --draft, bench --spec."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsopt.cli.main import app
from dsopt.cli.spec_bench import read_prompts
from dsopt.cli.writers import speculation_record, stats_line
from dsopt.runtime.curve import VerifyCurve
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.scheduler import Scheduler
from dsopt.runtime.speculate import Speculation

DSOPT = str(Path(sys.executable).with_name("dsopt"))
COLUMNS = [
    *("category", "prompts", "draft", "base_avg_pred_ts", "spec_avg_pred_ts", "decode_speedup", "latency_speedup"),
    *("accept_rate", "mean_accepted_length", "accept_per_position", "read_share", "draft_share", "verify_share"),
    *("overhead_share", "identical_share", "near_ties"),
]
LOOP = ["a b c a b c a b c a b c", "--raw", "-n", "60"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [("edit", "a b c a b c a b c"), ("chat", "hello"), ("edit", "x y x y x y")]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"category": c, "prompt": p}) + "\n\n" for c, p in lines))
    return path


@pytest.fixture
def bench(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*options: object) -> str:
        app(["bench", str(tiny_artifact), *map(str, options)], standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def generate(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """In this process: stdout and stderr."""
    monkeypatch.setenv("DSOPT_MODEL", str(tiny_artifact))

    def run(*words: str) -> tuple[str, str]:
        with Path(os.devnull).open() as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            app(["generate", *LOOP, *words], standalone_mode=False)
        return tuple(capfd.readouterr())  # type: ignore[return-value]

    return run


def dsopt(*words: str | Path) -> tuple[int, str, str]:
    done = subprocess.run([DSOPT, "generate", *words], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_drafts_change_the_answer_in_nothing_but_its_speed(
    generate: Callable[..., tuple[str, str]], tiny_artifact: Path
) -> None:
    plain, _ = generate()
    for words in (["--draft", "ngram"], ["--draft", "auto"], ["--exact"], ["--exact", "--draft", "ngram"]):
        assert generate(*words) == (plain, "")  # float32
    assert dsopt("-m", tiny_artifact, *LOOP, "--draft", tiny_artifact) == (0, plain, "")


def test_stats_tell_what_was_accepted_and_gained(generate: Callable[..., tuple[str, str]], tiny_artifact: Path) -> None:
    out, err = generate("--draft", str(tiny_artifact), "--json", "--stats", "--no-exact")
    told = json.loads(out)["stats"]["speculation"]
    assert (told["draft"], told["exact"], told["exact_cost"]) == (str(tiny_artifact), False, None)
    assert told["rounds"] + told["accepted_tokens"] == 59
    assert told["near_ties"] >= 0
    assert "gain " in err
    assert "near ties " in err
    if told["proposed_tokens"]:
        assert f"draft {told['accepted_tokens']}/{told['proposed_tokens']} accepted (" in err
    if told["started_after"] is None:
        assert "drafter did not begin" in err
    else:
        assert f"drafter began after {told['started_after']} tokens and read {told['read_tokens']} in " in err

    out, err = generate("--exact", "--json", "--stats")
    told = json.loads(out)["stats"]["speculation"]
    assert (told["draft"], told["exact"], told["proposed_tokens"], told["rounds"]) == ("none", True, 0, 59)
    assert "exact, which makes a step " in err
    assert "speculation" not in json.loads(generate("--json")[0])["stats"]


def test_stats_tell_what_was_computed_again() -> None:
    speculation = Speculation(NgramDrafter(), Scheduler(VerifyCurve((1, 2), 1, (1.0, 1.5), 2, (1.0, 1.5), (2,))))
    speculation.tally.propose(1)
    stats: dict[str, Any] = dict.fromkeys(("prompt_tokens", "answer_tokens", "cached_tokens", "threads"), 1)
    for what in ("prompt", "answer"):
        stats |= {f"{what}_seconds": 1.0, f"{what}_tokens_per_second": 1.0}
    for count, said in ((0, False), (280, True)):
        speculation.tally.reread_tokens = count
        stats |= {"first_token_seconds": None, "speculation": speculation_record(speculation)}
        assert stats["speculation"]["reread_tokens"] == count
        line = stats_line({"stats": stats, "seed": 0})
        assert ("280 cached tokens computed again for the drafter" in line) == said
        assert ("computed again" in line) == said


def test_drafted_tokens_are_marked(generate: Callable[..., tuple[str, str]]) -> None:
    *tokens, done = map(json.loads, generate("--draft", "ngram", "--jsonl")[0].splitlines())
    marked = sum(token["from_draft"] for token in tokens)
    assert marked == done["stats"]["speculation"]["accepted_tokens"]


def test_an_unknown_drafter_is_one_line(tiny_artifact: Path) -> None:
    code, out, err = dsopt("-m", tiny_artifact, "a", "--draft", "no-such")
    assert (code, out) == (1, "")
    assert err.startswith("dsopt: --draft is no-such; it must be none, ngram, auto or the directory")
    assert err.count("\n") == 1


def test_a_row_for_each_category_and_one_for_all(bench: Callable[..., str], prompts: Path) -> None:
    rows = [
        json.loads(line)
        for line in bench("--spec", "ngram", "--prompts", prompts, "-n", 40, "-o", "jsonl").split("\n")[:-1]
    ]
    assert [(row["category"], row["prompts"]) for row in rows] == [("edit", 2), ("chat", 1), ("overall", 3)]
    for row in rows:
        assert [key for key in row if key in COLUMNS] == COLUMNS
        assert row["decode_speedup"] == pytest.approx(row["spec_avg_pred_ts"] / row["base_avg_pred_ts"])
        assert row["draft_share"] + row["verify_share"] + row["overhead_share"] == pytest.approx(1)
        assert row["identical_share"] == 1  # float32
        assert row["latency_speedup"] > 0
        assert row["base_tokens"] == row["spec_tokens"]
        if row["proposed_tokens"]:
            assert row["accept_rate"] == pytest.approx(row["accepted_tokens"] / row["proposed_tokens"])
    for key in ("rounds", "proposed_tokens", "accepted_tokens", "base_tokens", "near_ties"):
        assert rows[2][key] == rows[0][key] + rows[1][key]


def test_rows_tell_what_a_drafter_read(bench: Callable[..., str], tiny_artifact: Path, prompts: Path) -> None:
    rows = json.loads(bench("--spec", tiny_artifact, "--prompts", prompts, "-n", 60, "-o", "json"))
    for row in rows:
        assert sum(row[f"{what}_share"] for what in ("read", "draft", "verify", "overhead")) == pytest.approx(1)
        assert (row["started_after"] is None) == (row["started_answers"] == 0)
        assert (row["read_tokens"] > 0) == (row["read_share"] > 0)
        assert row["identical_share"] == 1


def test_exact_mode_is_compared_with_its_own_reference(bench: Callable[..., str], prompts: Path) -> None:
    rows = json.loads(bench("--spec", "ngram", "--prompts", prompts, "-n", 30, "-o", "json", "--exact"))
    assert all(row["exact"] and row["identical_share"] == 1 and row["exact_avg_pred_ts"] > 0 for row in rows)


def test_the_other_forms_have_the_same_rows(bench: Callable[..., str], prompts: Path) -> None:
    options = ("--spec", "ngram", "--prompts", prompts, "-n", 20)
    rows = list(csv.DictReader(io.StringIO(bench(*options, "-o", "csv"))))
    assert [row["category"] for row in rows] == ["edit", "chat", "overall"]
    assert [key for key in rows[0] if key in COLUMNS] == COLUMNS
    head, rule, *lines = bench(*options).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["edit", "chat", "overall"]
    assert len(head) == len(rule)


def test_a_made_up_acceptance_shows_where_it_pays(bench: Callable[..., str], tiny_artifact: Path) -> None:
    rows = json.loads(bench("--spec", "ngram", "--synthetic-accept", 0.5, "-o", "json"))
    assert [row["drafted"] for row in rows][:3] == [1, 2, 3]
    for row in rows:
        assert row["expected_length"] == pytest.approx(2 - 0.5 ** row["drafted"])
        assert row["speedup"] == pytest.approx(row["expected_length"] / row["break_even_length"])
    slower = json.loads(bench("--spec", tiny_artifact, "--synthetic-accept", 0.5, "-o", "json"))
    assert slower[3]["draft_ms"] > 3 * rows[3]["draft_ms"]
    assert "break-even tokens" in bench("--spec", "ngram", "--synthetic-accept", 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--spec", "ngram"], "--spec needs --prompts FILE.jsonl"),
        (["--spec", "ngram", "--prompts", "x", "--synthetic-accept", "1"], "--spec needs --prompts FILE.jsonl"),
        (["--spec", "ngram", "--synthetic-accept", "1.5"], "--synthetic-accept is 1.5"),
        (["--spec", "ngram", "--synthetic-accept", "0.5", "--exact"], "--exact and --no-exact need --prompts"),
        (["--prompts", "x"], "need --spec KIND"),
        (["--spec", "ngram", "--prompts", "x", "-p", "8"], "-p, -pg, -d and -r are of llama-bench's tests"),
        (["--spec", "ngram", "--prompts", "x", "-n", "8,9"], "-n is '8,9'; one number with --spec"),
        (["--spec", "ngram", "--prompts", "x", "-n", "1"], "-n is 1; --spec needs 2 or more"),
        (["--spec", "ngram", "--prompts", "/nowhere"], "/nowhere: cannot be read"),
        (["--spec", "none", "--prompts", "PROMPTS"], "--spec none compares nothing"),
        (["--spec", "none", "--synthetic-accept", "0.5"], "--spec none compares nothing"),
        (["--spec", "none", "--calibrate", "--prompts", "PROMPTS"], "--spec none compares nothing"),
        (["--spec", "ngram", "--synthetic-accept", "0.5", "-n", "64"], "-n needs --prompts"),
        (["--spec", "ngram", "--calibrate", "--prompts", "PROMPTS"], "--spec ngram has nothing to calibrate"),
        (["--spec", "auto", "--calibrate"], "--calibrate needs --prompts"),
        (["--spec", "auto", "--calibrate", "--synthetic-accept", "0.5"], "--calibrate needs --prompts"),
        (
            ["--spec", "auto", "--calibrate", "--prompts", "PROMPTS", "--exact"],
            "--calibrate verifies every draft whole",
        ),
        (["--spec", "auto", "--calibrate", "--prompts", "PROMPTS", "--temp", "-1"], "--temp is -1.0"),
        (["--spec", "ngram", "--prompts", "PROMPTS", "--temp", "1"], "--temp needs --calibrate"),
        (["--calibrate"], "need --spec KIND"),
        (["--spec", "ngram", "--prompts", "PROMPTS", "-n", "250"], "does not fit a context of 256"),
    ],
)
def test_bad_values_are_one_line(bench: Callable[..., str], prompts: Path, options: list[str], words: str) -> None:
    with pytest.raises(DsoptError) as caught:
        bench(*[str(prompts) if option == "PROMPTS" else option for option in options])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError) == ("nowhere" not in words and "fit" not in words)


def test_broken_prompt_files_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = json.dumps({"category": "a", "prompt": "b"})
    for line, words in (
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"prompt": "x"}', "line 2 must be"),
        ("3", "line 2 must be"),
        (json.dumps({"category": "\ud800", "prompt": "x"}), "line 2 has half a surrogate pair"),
    ):
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(DsoptError, match=words):
            read_prompts(path)
    path.write_bytes('{"category": "a", "prompt": "b\u2028c"}\r\n'.encode())
    assert read_prompts(path) == [("a", "b\u2028c")]
    path.write_text("\n")
    with pytest.raises(DsoptError, match="no prompts"):
        read_prompts(path)
