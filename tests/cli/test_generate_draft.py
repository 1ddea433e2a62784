"""dsopt generate --draft with a compiled pair, over saved states: the text of plain decoding, turn by turn."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsopt.cli.main import app
from dsopt.runtime import load
from dsopt.runtime.drafters import curve as draft_costs
from dsopt.runtime.drafters.choice import open_speculation
from dsopt.runtime.drafters.curve import DraftCurve
from dsopt.runtime.files import cache_dir

DSOPT = str(Path(sys.executable).with_name("dsopt"))
TURNS = ["a b c a b c a b c", " x y", "", " and so on and on"]  # the third goes on with the answer
RICH = {"won": 1e9, "started": 1000.0, "gained": 1e9, "answered": 1000.0, "ended": 0.0}


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """In this process: what `--json` prints."""

    def run(*words: object) -> dict[str, Any]:
        with Path(os.devnull).open() as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            app(["generate", "--raw", "--threads", "1", "--json", *map(str, words)], standalone_mode=False)
        return dict(json.loads(capfd.readouterr().out))

    return run


def promise(artifact: Path, draft: str) -> Path:
    """What earlier answers won with the drafter, told in its file: it begins at once."""
    model = load(artifact)
    speculation = open_speculation(model, draft)
    assert speculation is not None
    assert speculation.scheduler.reader is not None
    path = speculation.scheduler.reader.experience.path
    assert path is not None
    assert path.parent.parent == cache_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(RICH))
    return path


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("exact", ["--exact", "--no-exact"])
def test_saved_turns_with_a_drafter_are_those_without(
    name: str,
    rich: bool,
    exact: str,
    compile_pair: Callable[..., Any],
    generate: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rich:  # whether a drafter begins is not to depend on how busy the machine is: so much is staked on reading
        ample = DraftCurve((1, 4, 16), (5e-5, 1e-4, 3e-4), (32, 128), (1e-3, 2e-3))
        monkeypatch.setattr(draft_costs, "measure_draft_curve", lambda drafter, model: ample)
    artifact = compile_pair(name).artifact
    (folder,) = artifact.glob("draft-*")
    for draft in (str(folder), "auto"):
        texts, began = {"none": list[str](), draft: list[str]()}, list[bool]()
        for kind in texts:
            state = tmp_path / Path(kind).name
            state.unlink(missing_ok=True)
            for turn, prompt in enumerate(TURNS):
                if rich and kind != "none":
                    promise(artifact, draft)
                saved = ["--load-state", state] if turn else []
                words = ["-m", artifact, "-n", 30, "--draft", kind, exact, *saved, "--save-state", state]
                told = generate(prompt, *words) if prompt else generate(*words)
                texts[kind].append(told["text"])
                stats = told["stats"]
                if kind == "none":
                    continue
                assert stats["speculation"]["exact"] == (exact == "--exact")
                if not turn:
                    assert stats["cached_tokens"] == 0
                elif rich and exact == "--no-exact":
                    assert stats["cached_tokens"] == 0  # computed again
                else:
                    assert stats["cached_tokens"] > 20
                began.append(stats["speculation"]["started_after"] is not None)
        assert texts[draft] == texts["none"]
        # Beside one that copies it may not be asked.
        assert any(began) or draft == "auto" or not rich


def test_a_process_a_turn(compile_pair: Callable[..., Any], tmp_path: Path) -> None:
    artifact = compile_pair("vanilla").artifact
    made: dict[str, list[str]] = {"none": [], "auto": []}
    for kind in made:
        state = tmp_path / kind
        for turn, (prompt, limit) in enumerate([("a b c a b c", 30), (" x y", 0), (" z", 30)]):
            words = ["-m", artifact, "--raw", "-n", limit, "--threads", "1", "--draft", kind, "--save-state", state]
            words += ["--load-state", state] if turn else []
            if turn and kind == "auto":
                promise(artifact, kind)
            command = [DSOPT, "generate", prompt, *map(str, words)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            assert (done.returncode, done.stderr) == (0, b"")
            made[kind].append(done.stdout.decode())
    assert made["auto"] == made["none"]
