"""A random Qwen3 target and a random DeepSpec drafter for it, to measure what a round costs without trained weights.

    python samples/random_drafter.py FOLDER [--shape qwen3-4b|tiny] [--layers 6] [--draft-layers 5] [--rank 256]
    dsopt compile FOLDER/target --draft FOLDER/drafter --quant int8 -o ARTIFACT

The layers have the widths of the model named; there are fewer of them, so that it fits. `--rank 0` writes DFlash: the
difference between the two is the chain of the Markov head. Nothing it drafts is ever right.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPES: dict[str, dict[str, int]] = {
    "qwen3-4b": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
    "tiny": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
}  # fmt: skip
TAPS, STEPS = 5, 7
POOL = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)


def layer(config: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,), "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def fill(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Norms are ones. All others are cut from one pool of numbers: billions of new ones would take minutes."""
    return {
        name: np.ones(shape, ml_dtypes.bfloat16) if name.endswith("norm.weight") else np.resize(POOL, shape)
        for name, shape in shapes.items()
    }


def target_weights(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    hidden = config["hidden_size"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        shapes |= layer(config, f"model.layers.{index}")
    return fill(shapes)


def drafter_weights(config: Mapping[str, Any], embedding: np.ndarray) -> dict[str, np.ndarray]:
    hidden, vocab, rank = config["hidden_size"], config["vocab_size"], config["markov_rank"]
    shapes = {"fc.weight": (hidden, TAPS * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        shapes |= layer(config, f"layers.{index}")
    if rank:
        shapes |= {"markov_head.markov_w1.weight": (vocab, rank), "markov_head.markov_w2.weight": (vocab, rank)}
        shapes |= {"confidence_head.proj.weight": (1, hidden + rank), "confidence_head.proj.bias": (1,)}
    return {**fill(shapes), "embed_tokens.weight": embedding, "lm_head.weight": embedding}


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--layers", type=int, default=6, help="of the target, at least 6")
    parser.add_argument("--draft-layers", type=int, default=5)
    parser.add_argument("--rank", type=int, default=256, help="of the Markov head; 0 for DFlash")
    chosen = parser.parse_args()
    shape = SHAPES[chosen.shape]
    common = {**shape, "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    end = shape["vocab_size"] - 1
    target = {**common, "num_hidden_layers": chosen.layers, "tie_word_embeddings": True, "eos_token_id": end}
    drafter = {
        **common, "num_hidden_layers": chosen.draft_layers, "num_target_layers": chosen.layers, "block_size": STEPS,
        "target_layer_ids": np.linspace(0, chosen.layers - 2, TAPS).astype(int).tolist(), "mask_token_id": end - 1,
        "markov_rank": chosen.rank, "markov_head_type": "vanilla", "enable_confidence_head": chosen.rank > 0,
        "confidence_head_with_markov": chosen.rank > 0,
    }  # fmt: skip
    weights = target_weights(target)
    write(chosen.folder / "target", target, weights)
    byte_tokenizer().save(str(chosen.folder / "target" / "tokenizer.json"))
    write(chosen.folder / "drafter", drafter, drafter_weights(drafter, weights["model.embed_tokens.weight"]))


if __name__ == "__main__":
    main()
