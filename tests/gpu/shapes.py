"""Checkpoints of known shapes with random weights: speed does not depend on what the weights are."""

import json
import math
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dsopt.compiler.checkpoint import Checkpoint, Source, Tensor

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


@dataclass(frozen=True)
class RandomTensor(Tensor):
    """Rows out of a pool of random numbers: nothing is stored, so that 8 billion weights cost no disk and no time."""

    def _rows(self, start: int, stop: int) -> np.ndarray:
        if len(self.shape) == 1:
            return np.ones(stop - start, np.float32)
        width, pool = self.shape[1], _pool()
        first = (zlib.crc32(self.name.encode()) + start * width) % (pool.size // 2)
        return np.resize(pool[first : first + (stop - start) * width], (stop - start, width))


@cache
def _pool() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)


def random_checkpoint(name: str, folder: Path) -> Checkpoint:
    """A model of these sizes; config and tokenizer stand in `folder`, the weights are made when they are read."""
    config = SHAPES[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    shapes = outer_shapes(config)
    for index in range(config["num_hidden_layers"]):
        shapes |= layer_shapes(config, index)
    tensors = {key: RandomTensor(key, shape, "BF16", 2 * math.prod(shape)) for key, shape in shapes.items()}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = Source("random", name, folder, tuple(sorted(folder.iterdir())))
    return Checkpoint(source, config, tensors, {key: data for key, data in files.items() if key != "config.json"})


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
    if config["model_type"].startswith("gemma4"):
        return _gemma4_shapes(config, index)
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    return {f"{_LAYER.format(index)}{name}.weight": shape for name, shape in shapes.items()}


def _gemma4_shapes(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    """Layers that see all have heads of their own, and no projection of values."""
    full = config["layer_types"][index] == "full_attention"
    own = {"head_dim": config["global_head_dim"]} if full else {}
    shared = full and config["attention_k_eq_v"]
    own |= {"num_key_value_heads": config["num_global_key_value_heads"]} if shared else {}
    shapes = layer_shapes({**config, **own, "model_type": "qwen3"}, index)
    prefix, hidden = _LAYER.format(index), config["hidden_size"]
    shapes |= {f"{prefix}{place}_feedforward_layernorm.weight": (hidden,) for place in ("pre", "post")}
    shapes[f"{prefix}layer_scalar"] = (1,)
    if shared:
        del shapes[f"{prefix}self_attn.v_proj.weight"]
    return shapes


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
