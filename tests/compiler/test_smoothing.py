"""Smoothing changes no function: scales folded in on one side come out on the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gemma_tiny import GEMMA
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.gguf import GgufTensor
from dsopt.compiler.passes.quantize_linears import _repacked, is_exact
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.smoothing import column_maxima, repeat_channels, scale, shared_channels, smoothing_scales
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.quality import session_scorer
from dsopt.runtime.session import Session

IDS = np.random.default_rng(0).integers(0, 320, 20)
SITES = {"self_attn.q_proj": 32, "self_attn.o_proj": 32, "mlp.gate_proj": 32, "mlp.down_proj": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # the context is of 2 x 16 values


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma4_text"])
def test_the_function_stays(
    family: str, tied: bool, tiny_llama_dir: Callable[..., Path], exported_once: None, tmp_path: Path
) -> None:
    gemma = family.startswith("gemma")
    options = {**GEMMA, "num_hidden_layers": 2, "layer_types": GEMMA["layer_types"][1:]} if gemma else HEADS
    checkpoint = open_checkpoint(str(tiny_llama_dir(**options | {"model_type": family, "tied": tied})))
    generator = torch.Generator().manual_seed(0)
    scales = {
        f"model.layers.{layer}.{name}": torch.randn(size, generator=generator).mul(1.5).exp()
        for layer in (0, 1)
        for name, size in SITES.items()
        if not (gemma and "o_proj" in name)  # its values are normed by heads
    }
    scales["lm_head"] = torch.randn(32, generator=generator).mul(1.5).exp()

    def logits(smoothing: Any) -> np.ndarray:
        out = tmp_path / str(bool(smoothing))
        build.write(build.plan(checkpoint, Recipe.parse("none"), smoothing=smoothing), out)
        return session_scorer(Session(open_artifact(out), threads=1))(IDS, len(IDS))

    before = logits(None)
    np.testing.assert_allclose(logits(scales), before, rtol=0, atol=1e-5 * float(np.abs(before).max()))
    stored = [
        build.plan(checkpoint, Recipe.parse("none"), smoothing=smoothing).model.graph.initializers
        for smoothing in (None, scales)
    ]
    changed = [n for n in stored[0] if (weight(stored[0], n) != weight(stored[1], n)).any()]
    assert len([n for n in changed if "down" in n]) == 2  # the scales are not merely ignored
    assert ("model.embed_tokens.weight" if tied else "lm_head.weight") in changed


def test_values_that_are_normed_cannot_be_smoothed(tiny_llama_dir: Callable[..., Path], exported_once: None) -> None:
    checkpoint = open_checkpoint(str(tiny_llama_dir(**GEMMA)))
    with pytest.raises(AssertionError, match="normed"):
        build.plan(checkpoint, Recipe.parse("none"), smoothing={"model.layers.0.self_attn.o_proj": torch.ones(32)})


def weight(initializers: Any, name: str) -> np.ndarray:
    return np.asarray(initializers[name].const_value.numpy())


def test_scales_of_no_layer_are_a_bug(tiny_llama_dir: Callable[..., Path], exported_once: None) -> None:
    checkpoint = open_checkpoint(str(tiny_llama_dir()))
    with pytest.raises(AssertionError, match="not there"):
        build.plan(checkpoint, Recipe.parse("none"), smoothing={"model.layers.7.mlp.down_proj": torch.ones(64)})


def test_views_of_views_multiply(tiny_llama_dir: Callable[..., Path]) -> None:
    tensors = open_checkpoint(str(tiny_llama_dir())).tensors
    source = tensors["model.layers.0.mlp.up_proj.weight"]
    rng = np.random.default_rng(0)
    rows, more, columns = (rng.uniform(0.5, 2, n).astype(np.float32) for n in (64, 64, 32))
    view = scale(scale(scale(source, rows=rows), columns=columns), rows=more)
    assert view.source is source
    assert (view.name, view.shape) == (source.name, source.shape)
    whole = source.read() * (rows * more)[:, None] * columns
    np.testing.assert_allclose(view.read(), whole, rtol=1e-6)
    np.testing.assert_allclose(view.read(5, 9), whole[5:9], rtol=1e-6)
    norm = tensors["model.norm.weight"]
    np.testing.assert_array_equal(scale(norm, rows=columns).read(), norm.read() * columns)


@pytest.mark.parametrize(("dtype", "form"), [("Q4_0", "int4"), ("Q4_1", "int4-min"), ("Q8_0", "int8")])
def test_multiplied_rows_are_not_rounded_again(dtype: str, form: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[dtype]
    raw = quantize(np.random.default_rng(0).normal(0, 1, (8, 64)).astype(np.float32), kind)
    path = tmp_path / "w"
    path.write_bytes(raw.tobytes())
    tensor = GgufTensor("w", (8, 64), dtype, raw.nbytes, path, 0)
    rows = np.linspace(0.1, 3, 8).astype(np.float32)
    view = scale(tensor, rows=rows)
    assert is_exact(view, Format.parse(form))
    assert not is_exact(view, Format.parse("int4-zp"))
    assert not is_exact(scale(view, columns=np.ones(64, np.float32)), Format.parse(form))
    made = _repacked(view, 2, 7)
    found = made.scales[..., None] * (made.codes.float() - made.zero_points.float()[..., None])
    found = (found if made.rest is None else found + made.rest[..., None]).flatten(1)
    np.testing.assert_allclose(found, (dequantize(raw, kind) * rows[:, None])[2:7], rtol=1e-5, atol=1e-6)


def test_scales_even_out_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    absmax = torch.rand(64, generator=generator) + 0.1
    absmax[[3, 40]] = torch.tensor([90.0, 0.0])  # an outlier, and a channel that never spoke
    weights = column_maxima([torch.randn(16, 64, generator=generator), torch.randn(8, 64, generator=generator)])
    scales = smoothing_scales(absmax, weights, 0.5)
    assert bool((scales > 0).all())
    assert float(scales.log().mean()) == pytest.approx(0, abs=1e-5)

    def spread(x: torch.Tensor) -> float:
        return float(x[x > 0].max() / x[x > 0].min())

    assert spread(absmax / scales) < 0.2 * spread(absmax)
    # At 1/2 both sides are the same up to a constant: what is taken from inputs is given to weights.
    ratio = (absmax / scales / (weights * scales))[absmax > 0]
    np.testing.assert_allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)


def test_heads_share_the_scales_of_their_values() -> None:
    x = torch.arange(12.0)  # 6 heads of 2 values, 3 share one key-value head
    shared = shared_channels(x, 6, 2)
    assert shared.tolist() == [4, 5, 10, 11]
    assert repeat_channels(shared, 6, 2).tolist() == [4, 5, 4, 5, 4, 5, 10, 11, 10, 11, 10, 11]
