"""Keys and values in int8: scales that fit, codes that are the rounded values, and a model that runs on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from dsopt.compiler import build
from dsopt.compiler.cache_reach import measure_reach, reach_of, states_through
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.models.layers import rotary_tables
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.stream import BlockStream
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.errors import DsoptError, UsageError
from dsopt.runtime.session import Session

IDS = np.random.default_rng(1).integers(0, 250, 60)


@pytest.fixture(scope="module")
def sessions(compile_tiny: Callable[..., Path]) -> tuple[Session, Session]:
    """The same weights with a cache in int8 and in float32."""
    return Session(open_artifact(compile_tiny("none,cache=int8"))), Session(open_artifact(compile_tiny("none")))


def test_a_pair_of_channels_stays_within_reach_at_any_position(tiny_llama_dir: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_llama_dir()))
    first, second = measure_reach(checkpoint)
    assert first.key.shape == first.value.shape == (16,)
    np.testing.assert_array_equal(first.key[:8], first.key[8:])  # i and i + d / 2 turn into each other
    cos, sin = (table.numpy() for table in rotary_tables(16, 200, 1e4))
    turned = first.key[:8] * cos - first.key[8:] * sin, first.key[8:] * cos + first.key[:8] * sin
    assert max(np.abs(part).max() for part in turned) < 1.5 * first.key.max()
    assert not np.array_equal(first.value, second.value)


def test_the_model_can_be_run_through_such_a_cache_before_it_is_built(
    sessions: tuple[Session, Session], tiny_llama_dir: Callable[..., Path]
) -> None:
    """What rounding keys and values does to the logits is what the artifact does."""
    checkpoint = open_checkpoint(str(tiny_llama_dir()))
    stream = BlockStream(checkpoint)
    reach = measure_reach(checkpoint)
    head = stream.head()
    with torch.inference_mode():
        exact, rounded = (head(states)[0].numpy() for states in (
            stream.run(IDS[None]), states_through(stream, reach, IDS[None])))  # fmt: skip
    coded = sessions[0].bind(sessions[0].new_cache()).run(IDS, 60)
    lost = np.abs(rounded - exact).max()
    assert lost > 0
    assert np.abs(coded - rounded).max() < 0.2 * lost
    for narrow, wide in zip(reach_of(stream, IDS[None, :20]), reach_of(stream, IDS[None]), strict=True):
        assert (narrow.key <= wide.key).all()
        assert (narrow.value < wide.value).any()


def test_codes_are_the_rounded_values(sessions: tuple[Session, Session]) -> None:
    coded, plain = (session.new_cache() for session in sessions)
    for session, cache in zip(sessions, (coded, plain), strict=True):
        session.bind(cache).run(IDS, 60)
    graph = ir.load(sessions[0].artifact.graph).graph
    for part in ("key", "value"):
        scales = graph.initializers[f"cache.0.{part}.scale"].const_value
        assert scales is not None
        steps = scales.numpy().reshape(1, 1, 1, 16)
        codes, exact = coded.buffers[f"0.{part}"][:, :, :60], plain.buffers[f"0.{part}"][:, :, :60]
        assert codes.dtype == np.int8
        inside = np.abs(exact / steps) < 127  # what is further out is clipped
        assert inside.mean() > 0.99
        assert np.abs(codes * steps - exact)[inside].max() <= 0.5001 * steps.max()


def test_the_model_runs_on_them(sessions: tuple[Session, Session]) -> None:
    coded, plain = (session.bind(session.new_cache()) for session in sessions)
    wanted = plain.run(IDS, 60).copy()
    whole = coded.run(IDS, 60).copy()
    assert 0 < np.abs(whole - wanted).mean() < 0.1  # of logits of deviation 2
    coded.cache.trim(20)
    rows = np.concatenate([coded.run(IDS[start : start + 4], 4).copy() for start in range(20, 60, 4)])
    assert np.abs(rows - whole[20:]).mean() < 0.02  # a rounding that fell to the other side, here and there
    assert sessions[0].cache_type == "i8"


def test_a_saved_cache_comes_back(sessions: tuple[Session, Session]) -> None:
    session = sessions[0]
    one, other = (session.bind(session.new_cache()) for _ in range(2))
    one.run(IDS[:40])
    other.cache.restore(one.cache.valid(), 40)  # type: ignore[arg-type]
    np.testing.assert_array_equal(other.run(IDS[40:44], 4), one.run(IDS[40:44], 4))


def test_for_a_card_scales_stay_float32(plan_tiny: Callable[..., Any]) -> None:
    graph = plan_tiny("int4,cache=int8,dtype=bf16", target="cuda").model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2
    for node in nodes:
        assert {node.inputs[index].dtype for index in (3, 4)} == {ir.DataType.INT8}
        assert {node.inputs[index].dtype for index in (12, 13)} == {ir.DataType.FLOAT}
        assert node.attributes["k_quant_type"].as_string() == "PER_CHANNEL"


def test_what_is_refused(plan_tiny: Callable[..., Any], tiny_llama_dir: Callable[..., Path]) -> None:
    with pytest.raises(DsoptError, match="cpu has no kernel for cache=fp8"):
        plan_tiny("int4,cache=fp8")
    with pytest.raises(UsageError, match="cache=int4 is unknown; cache=float or cache=int8 or cache=fp8"):
        Recipe.parse("int4,cache=int4")
    checkpoint = open_checkpoint(str(tiny_llama_dir()))
    with pytest.raises(DsoptError, match="not one pruned by layers=1"):
        build.plan(checkpoint, Recipe.parse("int8,cache=int8"), Pruning(layers=1))
