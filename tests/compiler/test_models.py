"""The eager families against transformers, on random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dsopt.compiler.models import families, find_family, llama
from dsopt.runtime.errors import DsoptError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "one key head for each query head": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "groups of two": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "groups of four, heads wider than the model": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "heads narrower than the model": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "untied": {"tied": False},
    "llama3 scaling": {"rope_scaling": LLAMA3},
    "linear scaling, old spelling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "theta among the rope parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    },
    "large epsilon": {"rms_norm_eps": 0.1},
}
IDS = torch.tensor([[1, 300, 7, 7, 42, 0, 319, 5, 6, 250, 99, 3], [8, 9, 10, 11, 2, 2, 2, 77, 201, 4, 17, 100]])


def load(folder: Path) -> llama.Model:
    model = llama.Model(llama.Config.from_dict(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_llama_is_transformers_llama(options: dict[str, Any], tiny_llama_dir: Callable[..., Path]) -> None:
    folder = tiny_llama_dir(**options)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits, _ = load(folder)(IDS)
    assert logits.std() > 0.1  # else the comparison would say nothing
    torch.testing.assert_close(logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [(1,) * 12, (5, 7), (3, 1, 8)])
@torch.no_grad()
def test_steps_with_a_past_are_the_whole(splits: tuple[int, ...], tiny_llama_dir: Callable[..., Path]) -> None:
    model = load(tiny_llama_dir(num_attention_heads=4, num_key_value_heads=2))
    whole, _ = model(IDS)
    past, rows = None, []
    for part in IDS.split(splits, 1):
        logits, past = model(part, past)
        rows.append(logits)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_row_sees_no_later_token(tiny_llama_dir: Callable[..., Path]) -> None:
    model = load(tiny_llama_dir())
    changed = IDS.clone()
    changed[:, -1] = 13
    torch.testing.assert_close(model(IDS)[0][:, :-1], model(changed)[0][:, :-1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "wide"}, "malformed"),
        ({"num_attention_heads": 0}, "malformed|zero"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 attention heads"),
        ({"head_dim": 24}, "head_dim 24"),
        ({"num_hidden_layers": -1}, "zero or negative"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
    ],
)
def test_a_config_that_cannot_be_run_is_one_clear_line(
    change: dict[str, Any], what: str, tiny_llama_dir: Callable[..., Path]
) -> None:
    config = json.loads((tiny_llama_dir() / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(DsoptError, match=what) as caught:
        llama.Config.from_dict(config)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_names_the_known_ones() -> None:
    assert families() == ["gemma4_text", "gemma4_unified_text", "llama", "qwen3"]
    for odd in ("mamba", "layers", None, ["llama"]):
        with pytest.raises(DsoptError, match="supported: gemma4_text, gemma4_unified_text, llama, qwen3"):
            find_family(odd)
