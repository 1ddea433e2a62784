"""A head that says some tokens: their logits are what they were, the others never win."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.passes.widen_logits import NEVER
from dsopt.compiler.pruning.head import choose_head
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.recipe import Recipe
from dsopt.runtime.artifact import Artifact, open_artifact
from dsopt.runtime.session import Session

IDS = np.random.default_rng(0).integers(0, 256, 24)
WINDOWS = [np.random.default_rng(1).integers(0, 300, 64) for _ in range(2)]


@pytest.fixture
def compile_head(exported_once: None, tiny_llama_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Artifact]:
    def run(pruning: Pruning, recipe: str, **config: Any) -> Artifact:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        checkpoint = open_checkpoint(str(tiny_llama_dir(f"{out.name}-source", **config)))
        build.write(build.plan(checkpoint, Recipe.parse(recipe), pruning, calibrate=lambda _: WINDOWS), out)
        return open_artifact(out)

    return run


def logits(artifact: Artifact) -> np.ndarray:
    session = Session(artifact, threads=1)
    return session.bind(session.new_cache()).run(IDS, rows=len(IDS))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", ["none", "int8", "int4"])
def test_the_tokens_it_says_have_the_logits_they_had(
    recipe: str, tied: bool, compile_head: Callable[..., Artifact]
) -> None:
    whole, short = (compile_head(pruning, recipe, tied=tied) for pruning in (Pruning(), Pruning(head=0.25)))
    said = choose_head(WINDOWS, 80, 320, [257])
    before, after = logits(whole), logits(short)
    assert after.shape == before.shape
    np.testing.assert_allclose(after[:, said], before[:, said], rtol=1e-5, atol=1e-5)
    others = np.setdiff1d(np.arange(320), said)
    assert (after[:, others] == NEVER).all()
    head, embedding = short.manifest.nodes[-2:]
    assert (head["shape"], embedding["shape"]) == ([80, 32], [320, 32])
    assert embedding["bytes"] > 0
    (step,) = short.manifest.pruning["steps"]  # type: ignore[index]
    assert (step["kind"], step["tokens"], step["of"]) == ("head", 80, 320)
    assert 0 < step["freed"] < 1
    kinds = [node.op_type for node in onnx.load(short.graph, load_external_data=False).graph.node]
    assert kinds[-2:] == ["Pad", "Gather"]


def test_the_end_is_said_then_what_was_met_then_what_was_learnt_first() -> None:
    windows = [np.array([7, 7, 9]), np.array([7, 9, 8])]
    assert choose_head(windows, 2, 20, [19]).tolist() == [7, 19]
    assert choose_head(windows, 4, 20, [19]).tolist() == [7, 8, 9, 19]
    assert choose_head(windows, 6, 20, [19]).tolist() == [0, 1, 7, 8, 9, 19]
    assert choose_head(windows, 99, 20).tolist() == list(range(20))
