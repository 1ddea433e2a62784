"""The graph: its contract, and its numbers through ONNX Runtime against the eager family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from dsopt.compiler import build
from dsopt.compiler.checkpoint import Tensor, open_checkpoint
from dsopt.compiler.models import llama
from dsopt.runtime.artifact import Artifact
from dsopt.runtime.session import Session

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Three traces for the whole file: each takes seconds.
BASE: dict[str, Any] = {}
LONG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
    "rope_scaling": LLAMA3,
    "tied": False,
}
NARROW: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def eager(source: Path) -> Callable[..., np.ndarray]:
    """The torch model over the checkpoint's weights, as float32: token ids [n] -> logits [n, vocab]."""
    model = llama.Model(llama.Config.from_dict(json.loads((source / "config.json").read_text())))
    weights = {name: w.float() for file in source.glob("*.safetensors") for name, w in load_file(file).items()}
    model.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def run(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)[None])[0][0].numpy()

    return run


@pytest.fixture
def graph(plan_tiny: Callable[..., Any], tiny_llama_dir: Callable[..., Path]) -> ir.Graph:
    """The exported graph before any pass."""
    config = json.loads((tiny_llama_dir() / "config.json").read_text())
    return build.export(llama.Model, llama.Config.from_dict(config)).graph


@pytest.fixture
def compiled(build_tiny: Callable[..., Artifact], tiny_llama_dir: Callable[..., Path]) -> Callable[..., Any]:
    """A checkpoint's eager model and the artifact of recipe none."""

    def make(**options: Any) -> tuple[Callable[..., np.ndarray], Artifact]:
        source = tiny_llama_dir(**options)
        return eager(source), build_tiny("none", source=source)

    return make


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 320, count)


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def describe(values: Any) -> dict[str, tuple[str, list[Any]]]:
    return {v.name: (v.dtype.name, [d if isinstance(d, int) else d.value for d in v.shape]) for v in values}


def test_inputs_and_outputs_are_the_contract(graph: ir.Graph) -> None:
    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert describe(graph.inputs) == {
        "input_ids": ("INT64", ["batch", "sequence"]),
        "attention_mask": ("INT64", ["batch", "total_length"]),
        **{f"past_key_values.{name}": ("FLOAT", ["batch", 1, "past_length", 16]) for name in cache},
        "logits_start": ("INT64", [1]),
    }
    assert describe(graph.outputs) == {
        "logits": ("FLOAT", ["batch", "logits_length", 320]),
        **{f"present.{name}": ("FLOAT", ["batch", 1, "total_length", 16]) for name in cache},
    }


def test_logits_start_is_an_input_with_a_default(graph: ir.Graph) -> None:
    default = graph.initializers["logits_start"]
    assert default is graph.inputs[-1]
    assert default.const_value is not None
    assert default.const_value.numpy().tolist() == [0]


def test_operators_are_of_an_opset_that_can_be_run(graph: ir.Graph) -> None:
    assert graph.opset_imports[""] <= 23
    assert {node.domain for node in graph} <= {"", "com.microsoft"}
    assert set(graph.opset_imports) == {"", "com.microsoft"}


def test_weights_are_named_as_in_the_checkpoint_and_have_no_content(
    graph: ir.Graph, tiny_llama_dir: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama_dir("untied", tied=False)))
    empty = {name for name, value in graph.initializers.items() if value.const_value is None}
    assert empty == set(checkpoint.tensors)
    held = {name: v.const_value.nbytes for name, v in graph.initializers.items() if v.const_value is not None}
    tables = 256 * 8 * 4  # positions, half a head, float32
    assert held.pop("rotary.cos") == held.pop("rotary.sin") == tables
    assert sum(held.values()) <= 64


def test_names_are_those_of_the_modules(graph: ir.Graph) -> None:
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    for layer in range(2):
        assert f"model.layers.{layer}.self_attn/GroupQueryAttention" in names
        assert f"model.layers.{layer}.mlp.down_proj/MatMul" in names


@pytest.mark.parametrize("recipe", ["none", "int4-zp,head=int8", "w8a8"])
def test_planning_reads_no_weight(recipe: str, plan_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Tensor, "read", refuse)
    assert plan_tiny(recipe).nbytes > 0


def test_exporting_is_quiet(capfd: pytest.CaptureFixture[str], tiny_llama_dir: Callable[..., Path]) -> None:
    from dsopt.compiler.export import export

    config = llama.Config.from_dict(json.loads((tiny_llama_dir() / "config.json").read_text()))
    export(llama.Model, config)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("recipe", ["none", "int4", "int8-zp", "w8a8"])
def test_the_written_file_passes_onnx_own_checker(recipe: str, build_tiny: Callable[..., Artifact]) -> None:
    artifact = build_tiny(recipe)
    onnx.checker.check_model(artifact.graph, check_custom_domain=False)
    assert onnx.load(artifact.graph, load_external_data=False).opset_import[0].version <= 23


@pytest.mark.parametrize("options", [BASE, LONG, NARROW], ids=["base", "long", "narrow"])
def test_all_rows_are_the_eager_model(options: dict[str, Any], compiled: Callable[..., Any]) -> None:
    reference, artifact = compiled(**options)
    session = Session(artifact, threads=1)
    ids = tokens(40)
    same(session.bind(session.new_cache()).run(ids, rows=40), reference(ids))


@pytest.mark.parametrize("options", [{"dtype": "BF16"}, {"dtype": "F16", "shards": 3}, {"shards": 2, "tied": False}])
def test_every_storage_gives_the_same_numbers(options: dict[str, Any], compiled: Callable[..., Any]) -> None:
    reference, artifact = compiled(**options)
    session = Session(artifact, threads=1)
    same(session.bind(session.new_cache()).run(tokens(20), rows=20), reference(tokens(20)))


def test_fewer_rows_are_the_last_ones(compiled: Callable[..., Any]) -> None:
    reference, artifact = compiled()
    session = Session(artifact, threads=1)
    expected = reference(tokens(30))
    for rows in (1, 2, 29):
        logits = session.bind(session.new_cache()).run(tokens(30), rows=rows)
        assert logits.shape == (rows, 320)
        same(logits, expected[-rows:])


def test_steps_over_a_growing_cache_are_the_whole(compiled: Callable[..., Any]) -> None:
    reference, artifact = compiled(**LONG)
    session = Session(artifact, threads=1)
    binding = session.bind(session.new_cache())
    ids, rows = tokens(300), []
    for part in np.split(ids, [250, 251, 252, 253, 258, 259, 299]):  # the first buffers hold 256 positions
        rows.append(binding.run(part, rows=len(part)).copy())
    assert binding.cache.capacity > 256
    same(np.concatenate(rows), reference(ids))


def test_after_going_back_the_forgotten_tokens_have_no_effect(compiled: Callable[..., Any]) -> None:
    reference, artifact = compiled()
    session = Session(artifact, threads=1)
    binding = session.bind(session.new_cache())
    binding.run(tokens(50))
    binding.cache.trim(20)
    other = tokens(9, seed=1)
    same(binding.run(other, rows=9), reference(np.concatenate([tokens(50)[:20], other]))[20:])
    binding.cache.trim(0)
    same(binding.run(other, rows=9), reference(other))


def test_plain_onnxruntime_runs_it_as_onnxruntime_genai_would(compiled: Callable[..., Any]) -> None:
    """A batch of two, an empty past, `logits_start` left alone; one more token with the present as past."""
    reference, artifact = compiled()
    options = ort.SessionOptions()
    options.use_per_session_threads = Session._pool_threads is None  # a process has one kind of pool or the other
    session = ort.InferenceSession(artifact.graph, options, providers=["CPUExecutionProvider"])
    ids = np.stack([tokens(12), tokens(12, seed=1)])
    past = {i.name: np.zeros((2, 1, 0, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    feeds = {"input_ids": ids[:, :11], "attention_mask": np.ones((2, 11), np.int64), **past}
    logits, *present = session.run(None, feeds)
    for row, sequence in zip(logits, ids, strict=True):
        same(row, reference(sequence[:11]))
    past = dict(zip(past, present, strict=True))
    feeds = {"input_ids": ids[:, 11:], "attention_mask": np.ones((2, 12), np.int64), **past}
    for row, sequence in zip(session.run(["logits"], feeds)[0], ids, strict=True):
        same(row[0], reference(sequence)[-1])
