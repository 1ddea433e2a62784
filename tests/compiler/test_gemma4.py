"""Gemma 4: the eager family against transformers, the graph and its quantized forms against the eager family."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from gemma_tiny import GEMMA
from safetensors.numpy import load_file, save_file
from transformers import Gemma4ForCausalLM

from dsopt.compiler import build, passes
from dsopt.compiler.calibrate import SAMPLE, calibrate
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.head_site import price_head
from dsopt.compiler.models import gemma4_text
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.reference import Reference
from dsopt.compiler.roles import find_linears
from dsopt.compiler.sensitivity import sweep_back
from dsopt.compiler.sites import CPU, Choice, Pricer
from dsopt.compiler.stream import BlockStream
from dsopt.runtime.artifact import Artifact, open_artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.model import Model
from dsopt.runtime.session import Session

IDS = np.random.default_rng(0).integers(0, 320, 40)  # five windows
NEWER = {"per_layer_config": {"2": {"head_dim": 32, "num_key_value_heads": 1}}}


def logits_of(artifact: Artifact, ids: np.ndarray, parts: list[int]) -> np.ndarray:
    """Logits of all rows, computed in pieces."""
    session = Session(artifact, threads=1)
    binding = session.bind(session.new_cache())
    return np.concatenate([binding.run(part, len(part)).copy() for part in np.split(ids, parts)])


def reference(folder: Path) -> Any:
    return Gemma4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": False, "final_logit_softcapping": None}, {"attention_k_eq_v": False}, NEWER],
    ids=["as the 12B", "untied, no cap", "values of their own", "newer config"],
)
@torch.no_grad()
def test_gemma4_is_transformers_gemma4(options: dict[str, Any], tiny_llama_dir: Callable[..., Path]) -> None:
    folder = tiny_llama_dir(**GEMMA | options)
    logits = Reference(open_checkpoint(str(folder)))(IDS, len(IDS))
    expected = reference(folder)(torch.from_numpy(IDS)[None]).logits[0].numpy()
    assert logits.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@torch.no_grad()
def test_the_graph_is_the_eager_model_and_says_what_transformers_says(
    tiny_llama_dir: Callable[..., Path], build_tiny: Callable[..., Artifact]
) -> None:
    folder = tiny_llama_dir(**GEMMA)
    artifact = build_tiny("none", source=folder)
    expected = Reference(open_checkpoint(str(folder)))(IDS, len(IDS))
    for parts in ([3, 20, 21, 25], [12], list(range(1, 40))):  # within a window, beyond it, token by token
        np.testing.assert_allclose(logits_of(artifact, IDS, parts), expected, rtol=1e-4, atol=1e-4)
    assert artifact.manifest.family == "gemma4_text"
    assert artifact.manifest.model["caches"] == [[2, 16], [2, 16], [1, 32]]
    prompt = IDS[:12].tolist()
    said = reference(folder).generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=257)
    pieces = Model(artifact, threads=1).stream(prompt, limit=16)
    assert [piece.step.token for piece in pieces] == said[0, len(prompt) :].tolist()


def test_roles_are_proved_and_projections_packed(plan_tiny: Callable[..., Any], monkeypatch: Any) -> None:
    seen: list[list[str]] = []

    class Look(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            seen.append([one.role for one in find_linears(model.graph)])
            return ir.passes.PassResult(model, modified=False)

    with monkeypatch.context() as patch:
        patch.setattr(build, "pipeline", lambda *_: [*passes.CLEAN, Look()])
        plan_tiny("none", **GEMMA)
    every = Counter(dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 3))
    assert Counter(seen[0]) == every - Counter("v") + Counter(["head"])
    graph = plan_tiny("int8", **GEMMA).model.graph
    counts = Counter(node.op_type for node in graph)
    assert counts["MatMulNBits"] == 3 * 4 + 1  # qkv or qk, o, gate and up, down; the head
    assert counts["ConstantOfShape"] == 0
    assert counts["Shape"] == 1  # of the mask
    windows = [
        node.attributes["local_window_size"].as_int() if "local_window_size" in node.attributes else None
        for node in graph
        if node.op_type == "GroupQueryAttention"
    ]
    assert windows == [8, 8, None]


@pytest.mark.parametrize(
    ("recipe", "close"), [("int8", 0.1), ("int4", 0.8), ("w8a8", 0.2), ("int8,k=int4,o=none,cache=int8", 0.4)]
)
def test_quantized_recipes(
    recipe: str, close: float, tiny_llama_dir: Callable[..., Path], build_tiny: Callable[..., Artifact]
) -> None:
    folder = tiny_llama_dir(**GEMMA)
    exact, rough = (logits_of(build_tiny(one, source=folder), IDS, [20]) for one in ("none", recipe))
    error = np.sqrt(np.mean((exact - rough) ** 2)) / exact.std()
    assert 0 < error < close


def test_the_scale_of_the_embedding_is_rounded_to_the_type_of_the_weights(
    tiny_llama_dir: Callable[..., Path], plan_tiny: Callable[..., Any]
) -> None:
    wide = {**json.loads((tiny_llama_dir(**GEMMA) / "config.json").read_text()), "hidden_size": 3840}
    assert gemma4_text.Config.from_dict({**wide, "dtype": "bfloat16"}).embedding_scale == 62.0
    assert gemma4_text.Config.from_dict(wide).embedding_scale == pytest.approx(61.9677, abs=1e-4)
    source = tiny_llama_dir("stored", dtype="BF16", **GEMMA, torch_dtype="float32")  # the weights have the last word
    graph = plan_tiny("none", source=source).model.graph
    (scale,) = (node for node in graph if node.name == "model.embed_tokens/Constant")
    assert scale.attributes["value"].as_tensor().numpy() == np.float32(32**0.5).astype(ml_dtypes.bfloat16)


def test_the_text_decoder_of_a_model_that_sees(
    tiny_llama_dir: Callable[..., Path], plan_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    folder, whole = tiny_llama_dir(**GEMMA), tmp_path / "whole"
    shutil.copytree(folder, whole)
    config = json.loads((folder / "config.json").read_text())
    text = {**config, "model_type": "gemma4_unified_text", "eos_token_id": 1}
    above = {"model_type": "gemma4_unified", "text_config": text, "vision_config": {}, "eos_token_id": [257, 5]}
    (whole / "config.json").write_text(json.dumps(above))
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): weight for name, weight in weights.items()}
    renamed |= {"model.embed_vision.patch_dense.weight": np.ones((4, 4), np.float32)}
    renamed |= {"model.vision_tower.norm.weight": np.ones(4, np.float32)}
    save_file(renamed, whole / "model.safetensors")
    said: list[str] = []
    checkpoint = open_checkpoint(str(whole), said.append)
    assert said == ["text only: 2 tensors of embed_vision, vision_tower are left out"]
    np.testing.assert_array_equal(Reference(checkpoint)(IDS, 3), Reference(open_checkpoint(str(folder)))(IDS, 3))
    manifest = plan_tiny("none", source=whole).manifest
    assert (manifest.family, manifest.eos) == ("gemma4_text", (257, 5))
    (whole / "config.json").write_text(json.dumps({**above, "text_config": None}))
    with pytest.raises(DsoptError, match="text_config"):
        open_checkpoint(str(whole))


def test_a_search_prices_what_the_model_is(tiny_llama_dir: Callable[..., Path]) -> None:
    """The head with its cap, the table with its scale; what reads normed values is offered no smoothing."""
    checkpoint = open_checkpoint(str(tiny_llama_dir(**GEMMA)))
    stream = BlockStream(checkpoint)
    windows = np.random.default_rng(1).integers(0, 320, (SAMPLE + 2, 24))
    statistics = calibrate(stream, windows, 1)
    last = torch.from_numpy(Reference(checkpoint)(windows[0], 24))
    with torch.no_grad():
        torch.testing.assert_close(stream.head()(statistics.hidden(3))[0], last, rtol=1e-4, atol=1e-4)
    pricer = Pricer(checkpoint, statistics, None)
    gradient = sweep_back(stream, statistics.hidden, pricer)
    with torch.no_grad():
        head = price_head(checkpoint, stream.head(), statistics, CPU, gradient, stream.head_weight)
    assert 0 < head.prices[Choice(Format.parse("int8"))] < 0.1 * head.prices[Choice(Format.parse("int4-zp"))] < 1
    for site in pricer.sites:
        assert bool(site.scales) != site.name.endswith("o_proj")
        assert len(site.modules) == {"q": 2 if site.layer == 2 else 3, "g": 2}.get(site.name.split(".")[-1][0], 1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256: embeddings for each layer"),
        ({"num_kv_shared_layers": 2}, "layers that share a cache"),
        ({"enable_moe_block": True}, "experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"hidden_activation": "relu"}, "'relu'"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types must be 3"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "the last"),
        ({"layer_types": "all"}, "layer_types"),
        ({"global_head_dim": 24}, "head_dim 24"),
        ({"num_global_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"sliding_window": None}, "malformed"),
        ({"sliding_window": 0}, "sliding_window 0"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional"}}}, "malformed"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1e4}}}, "yarn"),
        ({"per_layer_config": {"2": {"head_dim": 24}}}, "head_dim 24"),
        ({"per_layer_config": [1]}, "malformed"),
    ],
)
def test_a_config_that_cannot_be_run_is_one_clear_line(
    change: dict[str, Any], what: str, tiny_llama_dir: Callable[..., Path]
) -> None:
    config = json.loads((tiny_llama_dir(**GEMMA) / "config.json").read_text()) | change
    with pytest.raises(DsoptError, match=what) as caught:
        gemma4_text.Config.from_dict({key: value for key, value in config.items() if value is not None})
    assert "\n" not in str(caught.value)


def test_what_is_not_there_yet_is_refused(tiny_llama_dir: Callable[..., Path], plan_tiny: Callable[..., Any]) -> None:
    checkpoint = open_checkpoint(str(tiny_llama_dir(**GEMMA)))
    with pytest.raises(DsoptError, match=r"--prune: layers of gemma4_text .*vocab=FILE works"):
        build.plan(checkpoint, Recipe.parse("none"), Pruning(blocks=1))
    with pytest.raises(DsoptError, match="gemma4 models run on the cpu alone so far"):
        plan_tiny("none", target="cuda", **GEMMA)


def test_caches_of_several_shapes_are_checked(build_tiny: Callable[..., Artifact]) -> None:
    artifact = build_tiny("none", **GEMMA)
    path = artifact.directory / "dsopt.json"
    raw = json.loads(path.read_text())
    for odd in ([[2, 16]], [[2, 16], [2, 16], [1]], [[2, 16], [2, 16], 32], 3):
        raw["model"]["caches"] = odd
        path.write_text(json.dumps(raw))
        with pytest.raises(DsoptError, match="caches"):
            open_artifact(artifact.directory)
