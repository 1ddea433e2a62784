"""Checkpoints of known shapes with random weights: speed does not depend on what the weights are."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER = "model.layers.{}."


def _llama(name: str, **sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "name": name,
        **sizes,
    }


def _qwen3(name: str, **sizes: Any) -> dict[str, Any]:
    """Qwen3's sizes; as a Llama where this dsopt does not know the family: its norms of q and k are 1 % of the time."""
    config = _llama(name, **sizes) | {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
    try:
        import dsopt.compiler.models.qwen3  # noqa: F401
    except ImportError:
        return config
    return config | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False}


def _sizes(
    hidden: int, wide: int, layers: int, heads: int, kv: int, head: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "smollm2-135m": _llama("smollm2-135m", **_sizes(576, 1536, 30, 9, 3, 64, 49152, True)),
    "qwen3-0.6b": _qwen3("qwen3-0.6b", **_sizes(1024, 3072, 28, 16, 8, 128, 151936, True)),
    "llama-3.2-1b": _llama("llama-3.2-1b", **_sizes(2048, 8192, 16, 32, 8, 64, 128256, True)),
    "qwen3-8b": _qwen3("qwen3-8b", **_sizes(4096, 12288, 36, 32, 8, 128, 151936, False)),
    "tiny": _llama("tiny", **_sizes(128, 256, 2, 4, 2, 64, 320, True)),
}


def write_checkpoint(name: str, folder: Path) -> Path:
    """A Hugging Face directory in bfloat16, one file a layer."""
    config = SHAPES[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    files, layers = {}, config["num_hidden_layers"]
    for index in range(layers + 1):
        shapes = outer_shapes(config) if index == layers else layer_shapes(config, index)
        file = f"model-{index + 1:05}-of-{layers + 1:05}.safetensors"
        save_file({tensor: _random(shape, index) for tensor, shape in shapes.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16) * 0.02


def layer_shapes(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    return {f"{_LAYER.format(index)}{name}.weight": shape for name, shape in shapes.items()}


def outer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    table = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": table[1:]}
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": table}


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return tokenizer
