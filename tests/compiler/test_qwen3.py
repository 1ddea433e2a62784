"""Qwen3: the eager family against transformers, the graph and its quantized forms against the eager family."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from dsopt.compiler.models import qwen3
from dsopt.compiler.roles import find_linears
from dsopt.runtime.artifact import Artifact
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.session import Session

# Heads wider than the model, as in Qwen3-0.6B.
QWEN: dict[str, Any] = {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
IDS = np.random.default_rng(0).integers(0, 320, 40)


def eager(folder: Path) -> qwen3.Model:
    model = qwen3.Model(qwen3.Config.from_dict(json.loads((folder / "config.json").read_text())))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@torch.no_grad()
def logits_of(artifact: Artifact, ids: np.ndarray, parts: list[int]) -> np.ndarray:
    """Logits of all rows, computed in pieces."""
    session = Session(artifact, threads=1)
    binding = session.bind(session.new_cache())
    return np.concatenate([binding.run(part, len(part)).copy() for part in np.split(ids, parts)])


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": False}, {"head_dim": 32, "num_key_value_heads": 4}, {"rope_theta": None,
     "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}],
    ids=["tied", "untied", "wide heads", "rope parameters"],
)  # fmt: skip
@torch.no_grad()
def test_qwen3_is_transformers_qwen3(options: dict[str, Any], tiny_llama_dir: Callable[..., Path]) -> None:
    folder = tiny_llama_dir(**QWEN | options)
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.from_numpy(IDS)[None]
    logits, _ = eager(folder)(ids)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, reference(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_graph_is_the_eager_model(
    tied: bool, tiny_llama_dir: Callable[..., Path], build_tiny: Callable[..., Artifact]
) -> None:
    folder = tiny_llama_dir(**QWEN, tied=tied)
    artifact = build_tiny("none", source=folder)
    expected = eager(folder)(torch.from_numpy(IDS)[None])[0][0].numpy()
    np.testing.assert_allclose(logits_of(artifact, IDS, [20, 21, 25]), expected, rtol=1e-4, atol=1e-4)
    assert artifact.manifest.family == "qwen3"
    assert json.loads((artifact.directory / "genai_config.json").read_text())["model"]["type"] == "qwen3"


def test_roles_are_proved_through_the_head_norms(plan_tiny: Callable[..., Any], monkeypatch: Any) -> None:
    from dsopt.compiler import build, passes

    seen: list[list[tuple[str, str]]] = []

    class Look(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            seen.append([(one.role, one.name.rpartition(".")[2]) for one in find_linears(model.graph)])
            return ir.passes.PassResult(model, modified=False)

    monkeypatch.setattr(build, "pipeline", lambda *_: [*passes.CLEAN, Look()])
    plan_tiny("none", **QWEN, tied=False)
    parts = ["q", "k", "v", "o", "gate", "up", "down"]
    expected = Counter({(part, f"{part}_proj"): 2 for part in parts}) + Counter([("head", "lm_head")])
    assert Counter(seen[0]) == expected


@pytest.mark.parametrize(
    ("recipe", "close"), [("int8", 0.05), ("int4", 0.6), ("w8a8", 0.2), ("int8,q=int4,k=none", 0.3)]
)
def test_quantized_recipes(
    recipe: str, close: float, tiny_llama_dir: Callable[..., Path], build_tiny: Callable[..., Artifact]
) -> None:
    folder = tiny_llama_dir(**QWEN, tied=False)
    exact, rough = (logits_of(build_tiny(one, source=folder), IDS, [20]) for one in ("none", recipe))
    error = np.sqrt(np.mean((exact - rough) ** 2)) / exact.std()
    assert 0 < error < close


def test_projections_are_packed_and_split_where_heads_are_normed(plan_tiny: Callable[..., Any]) -> None:
    counts = Counter(node.op_type for node in plan_tiny("int8", **QWEN).model.graph)
    assert counts["MatMulNBits"] == 2 * 4 + 1  # qkv, o, gate and up, down; the head
    assert counts["Split"] == 2 * 2
    assert counts["RMSNormalization"] == 2 * 2 + 2  # two heads' norms a layer; the first and the last norm (one fused)
    assert counts["Shape"] == 1  # of the mask: reshapes copy their dimensions


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"attention_bias": True}, "attention_bias = true is not supported for qwen3"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_a_config_that_cannot_be_run(change: dict[str, Any], what: str, tiny_llama_dir: Callable[..., Path]) -> None:
    config = json.loads((tiny_llama_dir(**QWEN) / "config.json").read_text())
    with pytest.raises(DsoptError, match=what):
        qwen3.Config.from_dict(config | change)


def test_the_head_width_is_not_taken_from_the_model(tiny_llama_dir: Callable[..., Path]) -> None:
    config = json.loads((tiny_llama_dir(**QWEN) / "config.json").read_text())
    del config["head_dim"]
    assert qwen3.Config.from_dict(config).head_dim == 128
