"""dsopt compile --prune and --draft: artifacts that differ do not meet, and a drafter inside is an artifact."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dsopt.cli.compile import compile_model
from dsopt.cli.main import app
from dsopt.cli.order import Order
from dsopt.compiler import corpus
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.quality import session_scorer
from dsopt.runtime.session import Session


def test_what_is_pruned_is_part_of_what_an_artifact_is(
    tiny_llama_dir: Callable[..., Path], exported_once: None
) -> None:
    source = str(tiny_llama_dir())
    plain, pruned = (compile_model(source, order=Order("none", prune=prune)) for prune in ("none", "layers=1"))
    assert plain != pruned
    made = open_artifact(pruned).manifest
    assert (made.recipe, made.model["layers"]) == ("none prune layers=1", 1)
    written = (pruned / "dsopt.json").stat().st_mtime_ns
    assert compile_model(source, order=Order("none", prune="layers=1")) == pruned
    assert (pruned / "dsopt.json").stat().st_mtime_ns == written
    with pytest.raises(DsoptError, match="exists already"):
        compile_model(source, plain, Order("none", prune="layers=1"))


def test_two_spellings_of_a_recipe_are_one_artifact(tiny_llama_dir: Callable[..., Path], exported_once: None) -> None:
    source = str(tiny_llama_dir())
    one = compile_model(source, order=Order("int4,head=int8,down=int8"))
    written = (one / "dsopt.json").stat().st_mtime_ns
    assert compile_model(source, one, Order("int4-b32,down=int8,head=int8", dtype="fp32")) == one
    assert compile_model(source, order=Order("int4,down=int8,head=int8,dtype=fp32")) == one
    assert (one / "dsopt.json").stat().st_mtime_ns == written


def test_the_text_of_a_pruning_is_part_of_what_an_artifact_is(
    tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path
) -> None:
    source, text, out = str(tiny_llama_dir(max_position_embeddings=32)), tmp_path / "text", tmp_path / "out"
    text.write_text("".join(f"{n:06} " for n in range(1000)))
    order = Order("none", prune="layers=1", calib=text)
    assert compile_model(source, out, order) == out
    assert compile_model(source, out, order) == out
    with pytest.raises(DsoptError, match="exists already"):
        compile_model(source, out, Order("none", prune="layers=1"))


def test_a_smaller_vocabulary_has_a_drafter_too(
    tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path
) -> None:
    """The drafter's head is chosen by text in the tokens that are left."""
    source, text, out = str(tiny_llama_dir(num_hidden_layers=3)), tmp_path / "text", tmp_path / "out"
    text.write_text("only a few letters " * 40)
    compile_model(source, out, Order("none", prune=f"vocab={text}", draft="self"))
    artifact, draft = open_artifact(out).manifest, open_artifact(out / "draft-self").manifest
    assert draft.model["vocab_size"] == artifact.model["vocab_size"] < 320


def test_a_drafter_of_its_own(tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path) -> None:
    source, out = str(tiny_llama_dir(num_hidden_layers=3)), tmp_path / "out"
    compile_model(source, out, Order("none", draft="self"))
    artifact, draft = open_artifact(out), open_artifact(out / "draft-self")
    assert artifact.manifest.drafters == ("draft-self",)
    assert draft.manifest.recipe == "int4 prune ffn=25%,layers=1,head=0.25"
    assert draft.manifest.model["layers"] == 2
    assert draft.manifest.model["vocab_size"] == artifact.manifest.model["vocab_size"]
    assert np.isfinite(session_scorer(Session(draft, threads=1))(np.arange(9), 9)).all()
    compile_model(source, out, Order("none"), force=True)  # a drafter is the model's own: it goes with it
    assert not (out / "draft-self").exists()


@pytest.mark.parametrize(("quant", "prune"), [("none", "none"), ("auto", "none"), ("none", "vocab")])
def test_a_drafter_is_pruned_by_the_text_given(
    quant: str,
    prune: str,
    tiny_llama_dir: Callable[..., Path],
    exported_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corpus, "self_windows", None)  # the model writes none
    source, text = str(tiny_llama_dir(num_hidden_layers=3, max_position_embeddings=32)), tmp_path / "text"
    text.write_text("".join(f"{n:06} " for n in range(1000)))
    prune = f"vocab={text}" if prune == "vocab" else prune
    out = compile_model(source, order=Order(quant, prune=prune, draft="self", calib=text))
    written = (out / "dsopt.json").stat().st_mtime_ns
    assert open_artifact(out).manifest.drafters == ("draft-self",)
    assert " calib=" in open_artifact(out).manifest.recipe
    said = set(np.flatnonzero(logits_of(out / "draft-self") > -1e8))
    assert {ord(digit) - ord("!") for digit in "0123456789"} <= said  # ids of bytes, in the tokenizer's order
    assert compile_model(source, order=Order(quant, prune=prune, draft="self", calib=text)) == out
    assert (out / "dsopt.json").stat().st_mtime_ns == written
    text.write_text("".join(f"{n:06} " for n in range(2000)))
    assert compile_model(source, order=Order(quant, prune=prune, draft="self", calib=text)) != out


def logits_of(directory: Path) -> np.ndarray:
    """For what follows some token."""
    return session_scorer(Session(open_artifact(directory), threads=1))(np.arange(9), 1)[0]


def test_the_plan_says_what_would_go(tiny_llama_dir: Callable[..., Path], exported_once: None) -> None:
    command = ["compile", str(tiny_llama_dir()), "--quant", "int4", "--prune", "blocks=1", "--plan"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    (step,) = plan["pruning"]["steps"]
    assert step["kind"] == "blocks"
    assert len(step["removed"]) == 1
    assert plan["recipe"] == "int4 prune blocks=1"


@pytest.mark.parametrize("options", [["--prune", "heads=1"], ["--draft", "other"]])
def test_wrong_calls(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["compile", *options]).exception is not None
