"""What a GGUF file's metadata say, in Hugging Face's terms: config.json and tensor names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsopt.compiler.gguf_header import Header
from dsopt.runtime.errors import DsoptError

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Llama 3.1 and 3.2 were both trained with these; a GGUF file has only the frequencies that come of them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` maps. `permuted`: the projections whose rows llama.cpp interleaves."""

    config: Callable[["Metadata", Header, np.ndarray | None], dict[str, Any]]
    layer_names: Mapping[str, str]
    permuted: frozenset[str] = frozenset()

    def rename(self, name: str) -> str:
        """The Hugging Face name of a tensor. Raises DsoptError for one that the architecture lacks."""
        if (match := _LAYER.fullmatch(name)) and match[2] in self.layer_names:
            return f"model.layers.{match[1]}.{self.layer_names[match[2]]}.{match[3]}"
        stem, _, kind = name.rpartition(".")
        if stem in _TOP_NAMES and kind == "weight":
            return f"{_TOP_NAMES[stem]}.weight"
        raise DsoptError(f"the GGUF file has a tensor {name!r} that is not known for its architecture")


class Metadata:
    """The keys of one architecture, checked as they are read."""

    def __init__(self, header: Header, architecture: str) -> None:
        self._header, self._prefix = header.metadata, architecture

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`; one that holds for every layer may be repeated per layer."""
        name = f"{self._prefix}.{key}"
        value = self._header.get(name, default)
        if isinstance(value, list) and value and value == value[:1] * len(value):
            value = value[0]
        if value is None:
            raise DsoptError(f"the GGUF file's metadata lack {name}")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DsoptError(f"the GGUF file's metadata have {name} = {str(value)[:60]}, not one {kind.__name__}")
        return value


def find_architecture(header: Header) -> tuple[str, Architecture]:
    """The entry for `general.architecture`. Raises DsoptError that lists the known ones."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise DsoptError(f"GGUF architecture {name!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise DsoptError("the GGUF file is one of several parts; join them with `llama-gguf-split --merge`")
    return name, ARCHITECTURES[name]


def _llama_config(metadata: Metadata, header: Header, rope_factors: np.ndarray | None) -> dict[str, Any]:
    if metadata.get("expert_count", int, 0):
        raise DsoptError("the GGUF file is a mixture of experts, which the architecture 'llama' does not cover here")
    if "token_embd.weight" not in header.tensors:
        raise DsoptError("the GGUF file has no tensor token_embd.weight; is it a whole model?")
    heads = metadata.get("attention.head_count", int)
    hidden = metadata.get("embedding_length", int)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.get("feed_forward_length", int),
        "num_hidden_layers": metadata.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", int, heads),
        "head_dim": _head_dim(metadata, hidden // max(heads, 1)),
        "max_position_embeddings": metadata.get("context_length", int),
        "rms_norm_eps": metadata.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": metadata.get("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": any(name.endswith("attn_q.bias") for name in header.tensors),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in header.tensors),
    }
    if scaling := _rope_scaling(metadata, config, rope_factors):
        config["rope_scaling"] = scaling
    return config


def _head_dim(metadata: Metadata, default: int) -> int:
    key, value = (metadata.get(f"attention.{name}_length", int, default) for name in ("key", "value"))
    rotated = metadata.get("rope.dimension_count", int, key)
    if not key == value == rotated:
        raise DsoptError(
            f"the GGUF file's heads have {key} key, {value} value and {rotated} rotated dimensions; "
            "only heads that have as many of each are read"
        )
    return key


def _rope_scaling(metadata: Metadata, config: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type", str, "none")
    if kind not in ("none", "linear"):
        raise DsoptError(f"the GGUF file's rope.scaling.type {kind!r} is not supported; none and linear are")
    # Files of 2023 have the factor under the older key, and no type.
    factor = metadata.get("rope.scaling.factor", float, metadata.get("rope.scale_linear", float, 1.0))
    if factor != 1.0:
        return {"rope_type": "linear", "factor": factor}
    return None if factors is None else _llama3_scaling(config, factors)


def _llama3_scaling(config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any] | None:
    """The llama3 scaling whose divisors `rope_freqs.weight` holds, as convert_hf_to_gguf.py computes them.

    The recipe's four numbers are not in the file. The factor is the last divisor; the others are taken to be
    those of Llama 3.x and the whole is recomputed: only an exact match is translated.
    """
    if np.all(factors == 1.0):
        return None
    scaling = {"rope_type": "llama3", "factor": float(factors[-1]), **_LLAMA3}
    dim = config["head_dim"]
    frequencies = config["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (keep + (1 - keep) / scaling["factor"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
        raise DsoptError("the GGUF file's rope_freqs.weight is not a Llama 3.x scaling; give the original checkpoint")
    return scaling


ARCHITECTURES = {
    "llama": Architecture(_llama_config, _LAYER_NAMES, permuted=frozenset({"attn_q", "attn_k"})),
}
