"""Gemma 4, the text decoder of the dense 12B.

Beside Llama: norms before and behind each sublayer, and on every head of query, key and value; a scalar for each layer;
scores that are not scaled; layers that see a window and layers that see all, with heads, rotary embedding and width of
their own, some of them with one projection for keys and values; logits that are capped. What the other sizes have on
top (embeddings for each layer, caches that layers share, experts) is refused.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsopt.compiler.models import llama
from dsopt.compiler.models.layers import CappedHead, GatedMlp, HeadNorm, ScaledEmbedding
from dsopt.runtime.errors import DsoptError

SLIDING, FULL = "sliding_attention", "full_attention"
_PERIOD = 6  # every so many layers one sees all, unless config.json says which
_GLOBAL_HEAD = 512  # values of a head of layers that see all, unless config.json says otherwise
_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
# What only other sizes have, by the field of config.json that says so.
_REFUSED = {
    "hidden_size_per_layer_input": "embeddings for each layer (E2B, E4B) are",
    "num_kv_shared_layers": "layers that share a cache (E2B, E4B) are",
    "enable_moe_block": "experts (26B-A4B) are",
    "attention_bias": "a bias in attention is",
}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

gelu = partial(F.gelu, approximate="tanh")


@dataclass(frozen=True)
class Kind:
    """What differs between layers."""

    head_dim: int
    num_key_value_heads: int
    rope_scaling: Mapping[str, Any]
    window: int | None  # positions that a row sees, None for all
    values_are_keys: bool  # before norm and rotation: they have no projection of their own


@dataclass(frozen=True)
class Config(llama.Config):
    """As Llama's, whose fields about attention are those of the first of `kinds`, one a layer."""

    kinds: tuple[Kind, ...] = ()
    softcap: float | None = None
    embedding_scale: float = 1.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json. Raises DsoptError on a missing field or an unsupported value.

        The scale of the embedding is rounded to the type of the weights, as the model was trained: `dtype` says it.
        """
        _check_kind(config)
        base = {**config, "rope_scaling": {"rope_theta": 1e4}}
        base.setdefault("tie_word_embeddings", True)
        made = super().from_dict(base)
        assert isinstance(made, Config)
        try:
            cap = config.get("final_logit_softcapping")
            kinds = tuple(_kind(config, layer, kind) for layer, kind in enumerate(_layer_types(config)))
            made = dataclasses.replace(
                made,
                kinds=kinds,
                softcap=None if cap is None else float(cap),
                embedding_scale=_embedding_scale(made.hidden_size, config.get("dtype") or config.get("torch_dtype")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DsoptError(f"config.json: missing or malformed field ({error!r}) for a gemma4 model") from error
        if made.softcap is not None and not 0 < made.softcap < 1e6:
            raise DsoptError(f"config.json: final_logit_softcapping {made.softcap} is not a positive number")
        for layer, kind in enumerate(made.kinds):
            made.layer(layer)._check(config)
            if kind.window is not None and kind.window < 1:
                raise DsoptError(f"config.json: sliding_window {kind.window} is not a positive number")
        return dataclasses.replace(made.layer(0), num_hidden_layers=made.num_hidden_layers, kinds=made.kinds)

    @property
    def norms_values(self) -> bool:
        return True

    def layer(self, index: int) -> "Config":
        kind = self.kinds[index]
        return dataclasses.replace(
            self,
            num_hidden_layers=1,
            kinds=(kind,),
            head_dim=kind.head_dim,
            num_key_value_heads=kind.num_key_value_heads,
            rope_theta=float(kind.rope_scaling["rope_theta"]),
            rope_scaling=dict(kind.rope_scaling),
        )


def _check_kind(config: Mapping[str, Any]) -> None:
    for field, what in _REFUSED.items():
        if config.get(field):
            raise DsoptError(f"config.json: {field} = {config[field]}: {what} not supported; the dense 12B is")
    if config.get("use_bidirectional_attention") == "all":
        raise DsoptError("config.json: use_bidirectional_attention = 'all' is not supported: tokens follow each other")
    if (activation := config.get("hidden_activation", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise DsoptError(f"config.json: hidden_activation {activation!r} is not supported; gemma4 uses "
                         "'gelu_pytorch_tanh'")  # fmt: skip


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """One a layer; the last sees all."""
    count = int(config["num_hidden_layers"])
    types = config.get("layer_types")
    if types is None:
        types = [FULL if layer % _PERIOD == 0 or layer == count else SLIDING for layer in range(1, count + 1)]
    if len(types) != count or set(types) - {SLIDING, FULL} or types[-1:] != [FULL]:
        raise DsoptError(f"config.json: layer_types must be {count} of {SLIDING!r} and {FULL!r}, the last {FULL!r}")
    return list(types)


def _kind(config: Mapping[str, Any], layer: int, kind: str) -> Kind:
    """Newer files say in `per_layer_config` what layers have of their own, older ones by fields with "global"."""
    full = kind == FULL
    shared = full and bool(config.get("attention_k_eq_v"))
    head, groups = config["head_dim"], config["num_key_value_heads"]
    if (own := config.get("per_layer_config")) is not None:
        head, groups = (
            own.get(str(layer), {}).get(field, value)
            for field, value in (("head_dim", head), ("num_key_value_heads", groups))
        )
    elif full:
        head = config.get("global_head_dim") or _GLOBAL_HEAD
        groups = (config.get("num_global_key_value_heads") if shared else None) or groups
    rope = (config.get("rope_parameters") or _ROPE).get(kind) or _ROPE[kind]
    if not float(rope["rope_theta"]) > 0:
        raise ValueError(rope["rope_theta"])
    return Kind(int(head), int(groups), dict(rope), None if full else int(config["sliding_window"]), shared)


def _embedding_scale(hidden: int, dtype: object) -> float:
    """sqrt(hidden) in the type of the weights: 62 and not 61.97 in bfloat16 for a width of 3840."""
    return float(torch.tensor(hidden**0.5).to(_DTYPES.get(str(dtype).removeprefix("torch."), torch.float32)))


class Attention(llama.Attention):
    scale = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.window, self.values_are_keys = config.kinds[0].window, config.kinds[0].values_are_keys
        if self.values_are_keys:
            del self.v_proj
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps)
        self.v_norm = HeadNorm(config.head_dim, config.rms_norm_eps, elementwise_affine=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_norm(self.q_proj(x)), *self.key_and_value(x)

    def key_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = self.k_proj(x)
        value = key if self.values_are_keys else self.v_proj(x)
        return self.k_norm(key), self.v_norm(value)

    def extra_repr(self) -> str:
        return f"window={self.window}, values_are_keys={self.values_are_keys}"


class Block(nn.Module):
    """One decoder layer. `state` is (past_key, past_value, seqlens_k, total_length, cos, sin)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.make_attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, activation=gelu)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def make_attention(self, config: Config) -> nn.Module:
        return Attention(config)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, present_key, present_value = self.self_attn(self.input_layernorm(x), *state)
        return self.finish(x, attended), present_key, present_value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What comes out, for what came in and what attention made of it."""
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar


class Model(llama.Model):
    block = Block

    @staticmethod
    def make_embedding(config: Config) -> nn.Embedding:
        return ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_scale)

    @staticmethod
    def make_head(config: Config) -> nn.Linear:
        if config.softcap is None:
            return llama.Model.make_head(config)
        return CappedHead(config.hidden_size, config.vocab_size, config.softcap)
