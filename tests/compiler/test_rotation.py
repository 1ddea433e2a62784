"""Rotated values change no function, and spread what stands out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.rotation import rotate, rotation
from dsopt.compiler.rounding import dynamic
from dsopt.compiler.sensitivity import Observed
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.quality import session_scorer
from dsopt.runtime.session import Session

IDS = np.random.default_rng(0).integers(0, 320, 20)
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ALL_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 48}  # 48: no power of two
OUTPUTS = frozenset(f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1))


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128])
def test_a_rotation_is_orthogonal_and_spreads_a_channel(size: int) -> None:
    matrix = rotation(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    assert np.abs(matrix).max() <= 0.25 + 1e-6  # blocks of 16 at least


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("heads", [GROUPED, ALL_HEADS], ids=["grouped", "48 wide"])
def test_the_function_stays(
    family: str, heads: dict[str, int], tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama_dir(model_type=family, **heads)))
    smoothing = {
        "model.layers.1.self_attn.o_proj": torch.linspace(0.2, 4, heads["num_key_value_heads"] * heads["head_dim"])
    }

    def built(name: str, **options: Any) -> tuple[np.ndarray, Any]:
        plan = build.plan(checkpoint, Recipe.parse("none"), **options)
        build.write(plan, tmp_path / name)
        logits = session_scorer(Session(open_artifact(tmp_path / name), threads=1))(IDS, len(IDS))
        return logits, plan.model.graph.initializers

    before, stored = built("plain")
    for name, options in (("rotated", {}), ("smoothed too", {"smoothing": smoothing})):
        after, rotated = built(name, rotated=OUTPUTS, **options)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(np.abs(before).max()))
        changed = [n for n in stored if (numbers(stored, n) != numbers(rotated, n)).any()]
        assert len([n for n in changed if "o_proj" in n]) == 2  # it is not merely ignored
        assert len([n for n in changed if "o_proj" not in n]) == 2  # the values', alone or packed


def numbers(initializers: Any, name: str) -> np.ndarray:
    return np.asarray(initializers[name].const_value.numpy())


@pytest.mark.parametrize("width", [32, 96, 48])  # in blocks of 32, 32 and 16
def test_inputs_and_weights_meet_in_the_same_basis(width: int, compile_tiny: Callable[..., Path]) -> None:
    """A model rotated at run time is off by what 8 bits lose, and no more."""

    def logits(recipe: str) -> np.ndarray:
        made = open_artifact(compile_tiny(recipe, hidden_size=width))
        return session_scorer(Session(made, threads=1))(IDS, len(IDS))

    exact = logits("none")
    plain = np.abs(logits("w8a8") - exact).mean()
    assert 0 < plain < 0.1 * np.abs(exact).mean()
    for recipe in ("w8a8-rot", "w8a8-token-rot", "w7a8-rot,down=w7a8-token-rot", "none,head=w8a8-rot"):
        error = np.abs(logits(recipe) - exact).mean()
        assert 0 < error < (2.5 if "w7" in recipe else 1.2) * plain, recipe


def test_rotations_of_no_layer_are_a_bug(tiny_llama_dir: Callable[..., Path], exported_once: None) -> None:
    checkpoint = open_checkpoint(str(tiny_llama_dir()))
    with pytest.raises(AssertionError, match="not there"):
        build.plan(checkpoint, Recipe.parse("none"), rotated=frozenset(["model.layers.7.self_attn.o_proj"]))


def test_a_view_is_read_by_rows(tiny_llama_dir: Callable[..., Path]) -> None:
    tensors = open_checkpoint(str(tiny_llama_dir(**GROUPED))).tensors
    values, output = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "vo")
    turn = np.kron(np.eye(2), rotation(16))
    view = rotate(values, 16, 0)
    assert (view.name, view.shape) == (values.name, values.shape)
    np.testing.assert_allclose(view.read(), turn.T @ values.read(), atol=1e-6)
    np.testing.assert_allclose(view.read(5, 19), view.read()[5:19], atol=1e-6)
    turn = np.kron(np.eye(4), rotation(16))
    np.testing.assert_allclose(rotate(output, 16, 1).read(3, 9), (output.read() @ turn)[3:9], atol=1e-6)


def test_what_stands_out_costs_less_in_another_basis() -> None:
    """An outlier in one channel is shared out among many, and rounding does less harm."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(size, generator=generator) for size in ((64, 64), (32, 64), (64, 32)))
    x[:, 5] *= 40
    linears = [Observed(x, w, x @ w.T, g)]
    for form in map(Format.parse, ("w8a8", "w8a8-token", "w7a8")):
        plain, rotated = (dynamic(linears, torch.ones(64), form, head) for head in (None, 32))
        assert 0 < rotated < 0.5 * plain
