"""Llama (arXiv:2302.13971, 2407.21783) and what shares its shape: SmolLM2, TinyLlama, Llama 3.x."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsopt.compiler.models.layers import GatedMlp, group_query_attention, rotary_tables
from dsopt.runtime.errors import DsoptError

_LONGEST = 1 << 24  # positions; the rotary tables of more would fill the memory before anything else is looked at


@dataclass(frozen=True)
class Config:
    """The fields of config.json that decide the graph; checked when made."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json. Raises DsoptError on a missing field or an unsupported value."""
        # transformers 5 writes rope_theta inside rope_parameters; older files have it at the top.
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise DsoptError(f"config.json: rope_scaling is {rope!r}; it must be an object or null")
        try:
            heads = int(config["num_attention_heads"])
            made = cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_hidden_layers=int(config["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                max_position_embeddings=int(config["max_position_embeddings"]),
                rms_norm_eps=float(config["rms_norm_eps"]),
                rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                rope_scaling=dict(rope) or None,
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise DsoptError(
                f"config.json: missing or malformed field ({error!r}) for a {_kind(config)} model"
            ) from error
        made._check(config)
        return made

    def _check(self, config: Mapping[str, Any]) -> None:
        if config.get("hidden_act", "silu") != "silu":
            raise DsoptError(
                f"config.json: hidden_act {config['hidden_act']!r} is not supported; {_kind(config)} uses 'silu'"
            )
        for field in ("attention_bias", "mlp_bias"):
            if config.get(field):
                raise DsoptError(f"config.json: {field} = true is not supported for {_kind(config)} models")
        if any(size < 1 for size in dataclasses.astuple(self) if type(size) is int):
            raise DsoptError("config.json: a size is zero or negative")
        if self.max_position_embeddings > _LONGEST:
            raise DsoptError(
                f"config.json: max_position_embeddings {self.max_position_embeddings} is beyond {_LONGEST}"
            )
        if not 0 < self.rms_norm_eps < 1:
            raise DsoptError(f"config.json: rms_norm_eps {self.rms_norm_eps} is not between 0 and 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DsoptError(
                f"config.json: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 16:
            raise DsoptError(f"config.json: head_dim {self.head_dim} is not a multiple of 16, as attention needs")
        try:
            finite = all(bool(table.isfinite().all()) for table in self.rotary(2))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise DsoptError(f"config.json: rope_scaling {self.rope_scaling} is not supported ({error!r})") from error
        if not finite:
            raise DsoptError(f"config.json: rope_scaling {self.rope_scaling} gives infinite angles")

    @property
    def norms_values(self) -> bool:
        """Whether attention reads values that are normed by heads: rows of v_proj have no scale that lasts."""
        return False

    def layer(self, _index: int) -> "Config":
        """That of a model of this one layer; two that are equal have the same graph."""
        return dataclasses.replace(self, num_hidden_layers=1)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [length, head_dim / 2]."""
        return rotary_tables(self.head_dim, length, self.rope_theta, self.rope_scaling)


def _kind(config: Mapping[str, Any]) -> object:
    return config.get("model_type", "llama")


class Attention(nn.Module):
    causal = True
    scale: float | None = None  # of the scores, other than 1 / sqrt(head_dim)
    window: int | None = None  # positions that a row sees, if not all before it
    store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # what a cache makes of keys and values

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, width, kv_width = (
            config.hidden_size,
            self.heads * config.head_dim,
            self.kv_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value before the rotary embedding."""
        return self.q_proj(x), *self.key_and_value(x)

    def key_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, present_key, present_value = group_query_attention(
            *self.project(x), *state, num_heads=self.heads, kv_num_heads=self.kv_heads,
            causal=self.causal, scale=self.scale, window=self.window, store=self.store,
        )  # fmt: skip
        return self.o_proj(context), present_key, present_value


class Block(nn.Module):
    """One decoder layer. `state` is (past_key, past_value, seqlens_k, total_length, cos, sin)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.make_attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size)

    def make_attention(self, config: Config) -> nn.Module:
        return Attention(config)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, present_key, present_value = self.self_attn(self.input_layernorm(x), *state)
        return self.finish(x, attended), present_key, present_value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What comes out, for what came in and what attention made of it."""
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: Config, embedding: nn.Embedding, block: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(block(config.layer(index)) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """The whole model; parameters are named as in the checkpoint. Relatives have another `block`."""

    block: Callable[[Any], nn.Module] = Block

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config, self.make_embedding(config), self.block)
        self.lm_head = self.make_head(config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def make_embedding(config: Any) -> nn.Embedding:
        return nn.Embedding(config.vocab_size, config.hidden_size)

    @staticmethod
    def make_head(config: Any) -> nn.Linear:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids int64 [b, s], past per layer (key, value) [b, kv_heads, t, d] -> logits [b, s, vocab], present."""
        layers = [self.config.layer(index) for index in range(self.config.num_hidden_layers)]
        batch, rows = input_ids.shape
        if past is None:
            empty = [torch.empty(batch, one.num_key_value_heads, 0, one.head_dim) for one in layers]
            past = list(zip(empty, empty, strict=True))
        total = rows + past[0][0].shape[2]
        lengths = torch.full((batch,), total - 1, dtype=torch.int32)
        x, present = self.model.embed_tokens(input_ids), []
        for block, layer, (key, value) in zip(self.model.layers, layers, past, strict=True):
            x, *kv = block(x, key, value, lengths, torch.tensor(total, dtype=torch.int32), *layer.rotary(total))
            present.append((kv[0], kv[1]))
        return self.lm_head(self.model.norm(x)), present
