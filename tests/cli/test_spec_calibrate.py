"""dsopt bench --spec --calibrate: fitted on real rounds, kept with the drafter, used from then on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsopt.cli.main import app
from dsopt.runtime import load
from dsopt.runtime.drafters.choice import open_drafter
from dsopt.runtime.drafters.model import ModelDrafter
from dsopt.runtime.drafters.temperatures import CALIBRATION
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.sampling import Sampling

WORDS = ["a b c a b c", "hello", "x y x y x y", "the cat the cat"]
DRAWN = Sampling(temperature=1.0, seed=1)


@pytest.fixture
def calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"category": "c", "prompt": word}) + "\n" for word in WORDS))

    def run(model: Path, draft: object, *options: str, tokens: int = 80) -> tuple[str, str]:
        words = ["bench", model, "--spec", draft, "--calibrate", "--prompts", prompts, "-n", tokens, *options]
        app([str(word) for word in words], standalone_mode=False)
        return capsys.readouterr()

    return run


def fitted(rows: list[dict[str, Any]], mode: str) -> list[float]:
    return [row["temperature"] for row in rows if row["mode"] == mode]


def test_a_draft_model_is_calibrated_for_a_model(
    calibrate: Callable[..., tuple[str, str]], compile_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A 4-bit copy of a random model: unsure of tokens that are mostly right."""
    target, other = compile_tiny("none"), compile_tiny("none", seed=1)
    draft = shutil.copytree(compile_tiny("int4"), tmp_path / "draft")
    assert open_drafter(str(draft), load(target), Sampling())._confidence._temperatures == (1.0,)
    out, _ = calibrate(target, draft, "--temp", "1", "-o", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["mode"], row["position"]) for row in rows] == [
        (mode, position) for mode in ("greedy", "sampled") for position in range(8)
    ]
    greedy, sampled = fitted(rows, "greedy"), fitted(rows, "sampled")
    assert greedy != [1.0] * 8
    assert greedy != sampled
    assert rows[0]["rounds"] >= 30
    assert 0 < rows[0]["accepted"] <= 1
    assert rows[0]["ece_after"] < rows[0]["ece_before"]
    assert rows[0]["brier_after"] < rows[0]["brier_before"]
    model = load(target)
    for sampling, values in ((Sampling(), greedy), (DRAWN, sampled)):
        assert open_drafter(str(draft), model, sampling)._confidence._temperatures == tuple(values)
    assert open_drafter(str(draft), load(other), Sampling())._confidence._temperatures == (1.0,)
    again, _ = calibrate(target, draft, "-o", "json")  # one mode more leaves the others
    assert fitted(json.loads(again), "greedy") == pytest.approx(greedy, rel=0.5)
    assert open_drafter(str(draft), model, DRAWN)._confidence._temperatures == tuple(sampled)


@pytest.mark.parametrize("name", ["vanilla", "dflash"])
def test_a_drafter_with_taps_is_calibrated_by_its_manifest(
    name: str, calibrate: Callable[..., tuple[str, str]], compile_pair: Callable[..., Any], tmp_path: Path
) -> None:
    """An untrained one is never right, and learns not to be sure of it."""
    artifact = shutil.copytree(compile_pair(name).artifact, tmp_path / "copy")
    (draft,) = artifact.glob("draft-*")
    out, _ = calibrate(artifact, "auto")
    head, _, *lines = out.splitlines()
    assert "ece before" in head
    assert "ece after" in head
    assert [line.split("|")[2].strip() for line in lines] == ["greedy"] * 4
    stored = json.loads((draft / "draft.json").read_text())["temperatures"]
    assert list(stored) == ["greedy"]
    assert len(stored["greedy"]) == 4
    assert stored["greedy"] != [1.0] * 4
    opened = open_drafter(str(draft), load(artifact), Sampling())
    assert opened._temperatures.tolist() == stored["greedy"]
    assert [f"{value:.3f}" for value in stored["greedy"]] == [line.split("|")[6].strip() for line in lines]


def test_too_few_rounds_are_told(calibrate: Callable[..., tuple[str, str]], tiny_artifact: Path) -> None:
    with pytest.raises(DsoptError, match=r"rounds were drafted \(greedy\); 30 say something") as caught:
        calibrate(tiny_artifact, tiny_artifact, tokens=4)
    assert "\n" not in str(caught.value)
    with pytest.raises(DsoptError, match="no drafter was compiled with"):
        calibrate(tiny_artifact, "auto")


def test_a_damaged_calibration_is_one_line(compile_tiny: Callable[..., Path], tmp_path: Path) -> None:
    draft = shutil.copytree(compile_tiny("int4"), tmp_path / "draft")
    model = load(compile_tiny("none"))
    for damage in ("{", "[]", '{"x": {"greedy": []}}', '{"x": {"odd": [1.0]}}', '{"x": {"greedy": [0.0]}}'):
        (draft / CALIBRATION).write_text(damage)
        with pytest.raises(DsoptError, match="no temperatures by model and mode"):
            open_drafter(str(draft), model, Sampling())


@pytest.mark.parametrize("temperature", [5.0, 0.5])
def test_temperatures_divide_the_logit_of_a_token(temperature: float, tiny_artifact: Path) -> None:
    model, survival = load(tiny_artifact), []
    for temperatures in ([], [1.0, temperature]):  # the last one goes on
        drafter = ModelDrafter(model, model.session.vocab_size, Sampling(), temperatures)
        drafter.worth = 0.0
        drafter.accept([65, 66], None)
        survival.append(np.array(drafter.draft(67, 4).survival))
    logits = np.log(survival[0] / (1 - survival[0]))
    np.testing.assert_allclose(survival[1], 1 / (1 + np.exp(-logits / [1, *[temperature] * 3])))
