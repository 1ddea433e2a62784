"""The real SmolLM2 from its GGUF: the logits of transformers, and an answer."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from toy import Forced
from transformers import LlamaConfig, LlamaForCausalLM

from dsopt.compiler import build
from dsopt.compiler.checkpoint import Checkpoint, open_checkpoint
from dsopt.compiler.recipe import Recipe
from dsopt.runtime.artifact import open_artifact
from dsopt.runtime.decoder import decode
from dsopt.runtime.drafters.ngram import NgramDrafter
from dsopt.runtime.model import Model
from dsopt.runtime.speculate import Speculation

# Its first token leads by 1.5 logits; asked more shortly, this small model nearly answers in French.
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
REPEAT = [{"role": "user", "content": "Repeat: the cat sat on the mat, the cat sat on the mat, the cat sat"}]
NAMES = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"},
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Checkpoint:
    return open_checkpoint(str(smollm2_gguf))


def compiled(checkpoint: Checkpoint, recipe: str, out: Path) -> Model:
    build.write(build.plan(checkpoint, Recipe.parse(recipe)), out)
    return Model(open_artifact(out))


def transformers_model(path: Path, config: dict[str, Any]) -> LlamaForCausalLM:
    """transformers' model with the weights of the GGUF, read by the `gguf` library and renamed here."""
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})).eval()
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["token_embd", _]:
                weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = array
            case ["output_norm", _]:
                weights["model.norm.weight"] = array
            case ["blk", layer, name, _]:
                if name in ("attn_q", "attn_k"):  # stored with the halves of each head interleaved
                    array = array.reshape(-1, 32, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
                weights[f"model.layers.{layer}.{NAMES[name]}.weight"] = array
    model.load_state_dict({name: torch.from_numpy(np.array(w, np.float32)) for name, w in weights.items()})
    return model


@torch.no_grad()
def test_float_logits_are_those_of_transformers(
    smollm2: Checkpoint, smollm2_gguf: Path, tmp_path: Path, exported_once: None
) -> None:
    model = compiled(smollm2, "none", tmp_path / "none")
    text = "The capital of France is Paris. In 1889, it had 2,500,000 inhabitants; def f(x): return x"
    ids = np.array(model.encode(text), np.int64)
    logits = model.session.bind(model.session.new_cache()).run(ids, rows=len(ids))
    reference = transformers_model(smollm2_gguf, dict(smollm2.config))
    expected = reference(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


def assert_exact(model: Model) -> None:
    """In exact mode the logits are the same, bit for bit, whatever is drafted."""
    answers = []
    for drafter in (None, NgramDrafter()):
        speculation = Speculation(drafter, Forced(), (2, 4, 8))
        answers.append(list(model.stream(model.prompt(REPEAT), limit=40, top=3, speculation=speculation)))
    plain, drafted = answers
    assert [(piece.step.token, piece.step.top) for piece in plain] == [(p.step.token, p.step.top) for p in drafted]
    assert any(piece.step.from_draft for piece in drafted)


def test_eight_bits_answer_a_question(smollm2: Checkpoint, tmp_path: Path, exported_once: None) -> None:
    model = compiled(smollm2, "int8", tmp_path / "int8")
    artifact, session = model.artifact, model.session
    steps = decode(
        session.bind(session.new_cache()),
        model.prompt(QUESTION),
        choose=lambda logits, _: int(logits.argmax()),
        limit=32,
        end=model.end,
    )
    assert model.tokenizer.decode([step.token for step in steps]) == "The capital of France is Paris."
    assert_exact(model)
    # A quarter of the float weights: a byte a weight, and a scale for each 32.
    assert artifact.size < 1.2 * artifact.manifest.model["parameters"] * (1 + 4 / 32)
    assert json.loads((artifact.directory / "genai_config.json").read_text())["model"]["type"] == "llama"
