"""Drafters as they are recognised, refused, compiled and stored beside their target."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from deepspec_tiny import DRAFTERS, TARGET, write_drafter
from gemma_tiny import GEMMA
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.drafters import dspark, eagle3
from dsopt.compiler.drafters.checkpoint import open_drafter
from dsopt.compiler.drafters.config import DraftConfig, check_layout
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.recipe import Recipe
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.drafters.deepspec import open_deepspec
from dsopt.runtime.drafters.manifest import open_draft
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.sampling import Sampling
from dsopt.runtime.session import Session

FIELDS: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 256,
    "num_target_layers": 4, **TARGET, **DRAFTERS["vanilla"][1],
}  # fmt: skip
NORMS = {"layers.0.self_attn.q_norm.weight"}


def config_of(**changes: Any) -> DraftConfig:
    fields = {name: value for name, value in (FIELDS | changes).items() if value is not None}
    check_layout(fields, {})
    return DraftConfig.from_dict(fields, NORMS)


def test_kinds_are_told_apart_by_fields_under_one_class_name() -> None:
    assert config_of().kind == "dspark"
    assert config_of(markov_rank=0, enable_confidence_head=False).kind == "dflash"
    assert config_of(markov_rank=0, confidence_head_with_markov=False).kind == "dspark"  # the confidence head alone
    eagle = config_of(block_size=None, ttt_length=7, num_hidden_layers=1, architectures=["Qwen3DSparkModel"])
    assert (eagle.kind, eagle.steps) == ("eagle3", 7)
    assert config_of().head_norms
    assert not DraftConfig.from_dict(FIELDS, set()).head_norms


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dflash_config": {"mask_token_id": 1}}, "z-lab"),
        ({"sample_from_anchor": False}, "speculators"),
        ({"speculators_config": {}}, "speculators"),
        ({"draft_vocab_size": 100}, "reduced vocabulary"),
        ({"dspark_block_size": 5}, "DeepSeek-V4"),
        ({"target_layer_ids": None}, "no target_layer_ids"),
        ({"block_size": None}, "neither block_size nor ttt_length"),
        (
            {"model_type": "gemma3_text"},
            "'gemma3_text' model, a family that dsopt does not compile yet; .* llama, qwen3, gemma4_text",
        ),
        ({**GEMMA, "num_hidden_layers": 2, "layer_types": GEMMA["layer_types"][1:]}, "must all be the same"),
        ({"target_layer_ids": [2, 0]}, "must rise"),
        ({"target_layer_ids": [0, 3]}, "at most 2"),
        ({"target_layer_ids": [-2, 0]}, "from -1"),
        ({"target_layer_ids": []}, "must rise"),
        ({"target_layer_ids": ["0"]}, "malformed"),
        ({"block_size": 0}, "0 proposals"),
        ({"block_size": 100}, "100 proposals"),
        ({"mask_token_id": 320}, "mask_token_id 320"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"markov_head_type": "lstm"}, "'lstm'"),
        ({"markov_rank": -1}, "markov_rank -1"),
        ({"markov_rank": 0}, "does not fit"),  # the confidence head wants its embedding
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_refused_and_why(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DsoptError, match=reason) as caught:
        config_of(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["d2t", "t2d", "mtp.0.fc.weight"])
def test_tensors_of_other_layouts_are_refused(name: str) -> None:
    with pytest.raises(DsoptError, match=f"the tensor {name}"):
        check_layout(FIELDS, {name: None})


@pytest.fixture
def pair(tiny_llama_dir: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    target = tiny_llama_dir(**TARGET)
    return target, write_drafter(tmp_path / "drafter", target, DRAFTERS["vanilla"][1])


def plan_pair(target: Path, drafter: Path, recipe: str = "none") -> Any:
    return build.plan(open_checkpoint(str(target)), Recipe.parse(recipe), draft=open_drafter(str(drafter)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_target_layers": 6}, "a number of layers of 6; this one has 4"),
        ({"hidden_size": 64}, "a width of 64; this one has 32"),
        ({"vocab_size": 400}, "a vocabulary of 400; this one has 320"),
    ],
)
def test_a_drafter_of_another_target_is_refused(
    change: dict[str, Any], reason: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    drafter = write_drafter(tmp_path / "other", pair[0], DRAFTERS["vanilla"][1], **change)
    with pytest.raises(DsoptError, match=reason):
        plan_pair(pair[0], drafter)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"target": "cuda"}, "on the cpu alone"), ({"pruning": Pruning(layers=1)}, "pruned by layers=1")],
)
def test_targets_that_a_drafter_cannot_follow(
    options: dict[str, Any], reason: str, pair: tuple[Path, Path], exported_once: None
) -> None:
    target, drafter = open_checkpoint(str(pair[0])), open_drafter(str(pair[1]))
    with pytest.raises(DsoptError, match=reason):
        build.plan(target, Recipe.parse("none"), draft=drafter, **options)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: w.pop("fc.weight"), "tensor fc.weight is missing"),
        (lambda w: w.update({"extra.weight": np.zeros(3, np.float32)}), "does not have: extra.weight"),
        (lambda w: w.update({"norm.weight": np.ones(16, np.float32)}), r"norm.weight is \[16\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    spoil: Callable[[dict[str, Any]], Any], reason: str, pair: tuple[Path, Path], exported_once: None
) -> None:
    target, drafter = pair
    weights = load_file(drafter / "model.safetensors")
    spoil(weights)
    save_file(weights, drafter / "model.safetensors")
    with pytest.raises(DsoptError, match=reason):
        plan_pair(target, drafter)


def test_a_drafter_for_gemma4(compile_pair: Callable[..., Any], tmp_path: Path) -> None:
    """Its scale of the embedding is in the type of its weights, and its rotary tables are those of the target's layers
    that see all."""
    pair = compile_pair("gemma-vanilla")
    weights_file = open_artifact(pair.artifact).manifest.files["model.onnx.data"]
    manifest = open_draft(pair.artifact / "draft-dspark", weights_file["sha256"])
    assert set(manifest.borrowed["block.onnx"]) == {"model.embed_tokens.weight", "rotary.1.cos", "rotary.1.sin"}
    assert (manifest.model["kv_heads"], manifest.model["head_dim"]) == (1, 32)
    folder = shutil.copytree(pair.drafter, tmp_path / "bf16")
    weights = load_file(folder / "model.safetensors")
    save_file({n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()}, folder / "model.safetensors")
    decoders: list[Any] = [open_drafter(str(one)).config.decoder for one in (pair.drafter, folder)]
    assert [decoder.embedding_scale for decoder in decoders] == [np.float32(32**0.5), 5.65625]


def test_no_drafter_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "nowhere"), str(tmp_path / "file"), "a b"):
        with pytest.raises(DsoptError, match="no drafter"):
            open_drafter(name)


@pytest.mark.parametrize("recipe", ["none", "int8", "int4-zp,head=int8-zp"])
def test_embedding_and_head_are_stored_once(recipe: str, compile_pair: Callable[..., Any]) -> None:
    made = compile_pair("vanilla", recipe)
    draft = made.artifact / "draft-dspark"
    manifest = json.loads((draft / "draft.json").read_text())
    borrowed = {name.partition(".int")[0] for name in manifest["borrowed"]["block.onnx"]}
    assert borrowed == {"model.embed_tokens.weight", "rotary.cos", "rotary.sin"}
    tables = (made.artifact / "model.onnx.data").read_bytes()
    for name, place in manifest["borrowed"]["block.onnx"].items():
        size = int(np.prod(place["shape"])) * np.dtype(place["dtype"]).itemsize
        stored = next(t for t in onnx.load(made.artifact / "model.onnx", load_external_data=False).graph.initializer
                      if t.name == name)  # fmt: skip
        assert {e.key: e.value for e in stored.external_data}["offset"] == str(place["offset"])
        assert place["offset"] + size <= len(tables)
    own = [t.name for t in onnx.load(draft / "block.onnx", load_external_data=False).graph.initializer]
    assert not [name for name in own if name.startswith("drafter.embed") or name.startswith("drafter.lm_head")]
    assert not [name for name in manifest["borrowed"]["context.onnx"] if "embed" in name]
    plan_bytes = build.plan(
        open_checkpoint(str(made.target)), Recipe.parse(recipe), draft=open_drafter(str(made.drafter))
    ).drafter.nbytes  # fmt: skip
    files = sum(path.stat().st_size for path in draft.glob("*.data"))
    assert abs(plan_bytes - files) < 8192 * 4  # small tensors stay in the graph, large ones are padded to pages


def test_an_embedding_of_its_own_is_kept(
    pair: tuple[Path, Path], tmp_path: Path, exported_once: None, compile_pair: Callable[..., Any]
) -> None:
    """The same drafter with another embedding drafts other tokens: what is read is its own."""
    target, drafter = pair
    weights = load_file(drafter / "model.safetensors")
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][::-1].copy()
    save_file(weights, drafter / "model.safetensors")
    build.write(plan_pair(target, drafter), tmp_path / "artifact")
    manifest = json.loads((tmp_path / "artifact/draft-dspark/draft.json").read_text())
    assert set(manifest["borrowed"]["block.onnx"]) == {"model.embed_tokens.weight", "rotary.cos", "rotary.sin"}  # head
    initializers = onnx.load(tmp_path / "artifact/draft-dspark/block.onnx", load_external_data=False).graph.initializer
    assert "drafter.embed_tokens.weight" in {tensor.name for tensor in initializers}
    shared = compile_pair("vanilla")
    assert len({draft_of(a).tokens for a in (tmp_path / "artifact", shared.artifact)}) == 2


def draft_of(artifact: Path) -> Any:
    session = Session(open_artifact(artifact), threads=1)
    (name,) = session.artifact.manifest.drafters
    drafter = open_deepspec(artifact / name, session, Sampling(temperature=1.0, seed=3))
    drafter.accept(list(range(20)), np.random.default_rng(1).normal(size=(20, 2, 32)).astype(np.float32))
    return drafter.draft(5, 4)


@pytest.mark.parametrize("name", ["vanilla", "rnn", "dflash", "eagle3"])
@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [("int8", "MatMulNBits"), ("int4-zp", "MatMulNBits"), ("w8a8", "DynamicQuantizeMatMul")],
)
def test_a_drafter_is_quantized_by_the_recipe(
    name: str, recipe: str, kernel: str, compile_pair: Callable[..., Any]
) -> None:
    exact, made = compile_pair(name), compile_pair(name, recipe)
    (folder,) = made.artifact.glob("draft-*")
    counts: Counter[str] = Counter()
    for file in folder.glob("*.onnx"):
        counts.update(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
    assert counts[kernel] >= 5
    assert counts["FusedMatMul"] == 0
    assert counts["GatherBlockQuantized"] == (1 + 4 + 1 if name in ("vanilla", "rnn") else 1)
    first, second = (draft_of(one.artifact).distributions[0] for one in (exact, made))
    overlap = np.minimum(first, second).sum()
    assert {"int8": 0.9, "int4-zp": 0.2, "w8a8": 0.7}[recipe] < overlap < 1


@pytest.mark.parametrize("recipe", ["none", "int8"])
@torch.no_grad()
def test_taps_are_the_hidden_states_behind_the_layers(
    recipe: str, tiny_llama_dir: Callable[..., Path], tmp_path: Path, exported_once: None
) -> None:
    """Index k + 1 of what transformers calls hidden states; -1 is the embedding. Fusing norms does not move them."""
    target = tiny_llama_dir(**TARGET)
    fields = DRAFTERS["vanilla"][1] | {"target_layer_ids": [-1, 2]}
    plan = plan_pair(target, write_drafter(tmp_path / "drafter", target, fields), recipe)
    assert Counter(node.op_type for node in plan.model.graph)["SkipSimplifiedLayerNormalization"] == 2 * 4 - 1
    build.write(plan, tmp_path / "artifact")
    session = Session(open_artifact(tmp_path / "artifact"), threads=1)
    assert session.artifact.manifest.taps == (-1, 2)
    ids = np.random.default_rng(0).integers(0, 320, (1, 12))
    past = {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session._session.get_inputs() if "past" in i.name}
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, 12), np.int64), **past}
    taps = session._session.run([f"tap.{layer}" for layer in (-1, 2)], feeds)
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    hidden = reference(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    for tap, expected in zip(taps, (hidden[0], hidden[3]), strict=True):
        error = np.abs(tap - expected.numpy()).max() / expected.std().item()
        assert error < (1e-4 if recipe == "none" else 0.2)
        assert recipe == "none" or error > 1e-4


def test_a_model_without_a_drafter_has_no_taps(build_tiny: Callable[..., Any]) -> None:
    artifact = build_tiny("none")
    assert artifact.manifest.taps == ()
    assert artifact.manifest.drafters == ()
    assert not [o for o in onnx.load(artifact.graph, load_external_data=False).graph.output if "tap" in o.name]


@torch.no_grad()
def test_the_modules_run_eagerly_as_their_graphs(compile_pair: Callable[..., Any]) -> None:
    made = compile_pair("rnn")
    checkpoint = open_drafter(str(made.drafter))
    drafter = dspark.Drafter(checkpoint.config)
    drafter.load_state_dict({name: torch.from_numpy(t.read()) for name, t in checkpoint.tensors.items()})
    hidden = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 20, 64)).astype(np.float32))
    cos, sin = checkpoint.config.decoder.rotary(64)
    past = dspark.Context(drafter)(hidden, torch.tensor([0]), cos, sin)
    ids = torch.tensor([[5, 300, 300, 300]])
    lengths, total = torch.tensor([23], dtype=torch.int32), torch.tensor(24, dtype=torch.int32)
    tokens, candidates, logits, *_ = dspark.Block(drafter)(ids, torch.zeros(4, 64), lengths, total, cos, sin, *past)
    first = draft_of(made.artifact).distributions[0][candidates[0]]
    np.testing.assert_allclose(first, logits[0].double().softmax(0), rtol=1e-3, atol=1e-5)
    assert tokens[0] == candidates[0][logits[0].argmax()]


@torch.no_grad()
def test_eagle3_runs_eagerly_as_its_graph(compile_pair: Callable[..., Any]) -> None:
    made = compile_pair("eagle3")
    checkpoint = open_drafter(str(made.drafter))
    drafter = eagle3.Drafter(checkpoint.config)
    drafter.load_state_dict({name: torch.from_numpy(t.read()) for name, t in checkpoint.tensors.items()})
    hidden = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 20, 64)).astype(np.float32))
    (context,) = eagle3.Context(drafter)(hidden)
    empty, tables = torch.empty(1, 2, 0, 16), checkpoint.config.decoder.rotary(64)
    lengths, total = torch.tensor([19], dtype=torch.int32), torch.tensor(20, dtype=torch.int32)
    ids = torch.tensor([[*range(1, 20), 5]])
    _, candidates, logits, *_ = eagle3.Step(drafter)(context, ids, lengths, total, *tables, empty, empty)
    first = draft_of(made.artifact).distributions[0][candidates[0]]
    np.testing.assert_allclose(first, logits[0].double().softmax(0), rtol=1e-3, atol=1e-5)


def test_a_drafter_that_was_changed_or_moved_is_refused(compile_pair: Callable[..., Any], tmp_path: Path) -> None:
    artifact = shutil.copytree(compile_pair("vanilla").artifact, tmp_path / "copy")
    draft, weights = artifact / "draft-dspark", open_artifact(artifact).manifest.files["model.onnx.data"]["sha256"]
    assert open_draft(draft, weights).taps == (0, 2)
    with pytest.raises(DsoptError, match="another model"):
        open_draft(draft, "0" * 64)
    text = (draft / "draft.json").read_text()
    for old, new in (('"kind": "dspark"', '"kind": "odd"'), ('"steps": 4', '"steps": "4"'), ('"taps"', '"tops"'),
                     ('"temperatures": {}', '"temperatures": {"greedy": [1.0]}')):  # fmt: skip
        assert old in text
        (draft / "draft.json").write_text(text.replace(old, new))
        with pytest.raises(DsoptError, match="again"):
            open_draft(draft, weights)
    (draft / "draft.json").write_text(text)
    with (draft / "block.onnx.data").open("r+b") as file:
        (first,) = file.read(1)
        file.seek(0)
        file.write(bytes([first ^ 1]))
    with pytest.raises(DsoptError, match=r"block\.onnx\.data: missing or changed"):
        open_draft(draft, weights)
