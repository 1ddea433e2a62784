"""Layers shared by the families. Run eagerly they are the numerical reference; traced, they emit the graph."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_tables(
    head_dim: int, length: int, theta: float, scaling: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, arXiv:2104.09864), each float32 [length, head_dim / 2].

    `scaling` is Hugging Face's `rope_scaling`; kinds "default", "linear", "llama3" and "proportional" are known here.
    In float32 throughout, as transformers computes them and as models were trained: float64 would move the angle
    of position 8000 by 5e-4.
    """
    frequencies = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    frequencies = _scale_frequencies(frequencies, scaling or {})
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def _scale_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    if kind == "proportional":
        return _proportional_frequencies(frequencies, scaling)
    raise ValueError(f"rope_scaling type {kind!r}")


def _llama3_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's stretching of the long wavelengths only, with a linear ramp between the two borders."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def _proportional_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Gemma 4's: a share of the pairs turns as if all did, the others stand still."""
    turning = int(scaling.get("partial_rotary_factor", 1.0) * len(frequencies))
    return torch.where(torch.arange(len(frequencies)) < turning, frequencies, 0.0) / scaling.get("factor", 1.0)


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_length: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    kv_num_heads: int,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention with rotary embedding and a KV cache, as ONNX Runtime's contrib operator.

    query [b, s, heads * d], key and value [b, s, kv_heads * d], past_* [b, kv_heads, c, d] whose first
    `total_length - s` positions are valid, seqlens_k int32 [b] = total length - 1, total_length int32 scalar.
    Returns the context [b, s, heads * d] and the present key and value [b, kv_heads, >= total_length, d].
    Not `causal`, every row sees all others too. `scale` of the scores is 1 / sqrt(d) unless said; with a `window` a row
    sees that many positions, its own the last of them. `store` tells what a cache makes of the keys and values
    [b, kv_heads, s, d] that it takes up; of a graph the compiler says it.
    """
    scale = (query.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():
        context, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [query, key, value, past_key, past_value, seqlens_k, total_length, cos, sin],
            attrs={
                "num_heads": num_heads,
                "kv_num_heads": kv_num_heads,
                "do_rotary": 1,
                "rotary_interleaved": 0,
                "scale": scale,
                **({} if causal else {"causal": 0}),
                **({} if window is None else {"local_window_size": window}),
            },
            dtypes=[query.dtype, past_key.dtype, past_value.dtype],
            shapes=[query.shape, past_key.shape, past_value.shape],
            version=1,
        )
        return context, present_key, present_value
    past = int(total_length) - query.shape[1]
    query, key, value = (
        _split_heads(t, n) for t, n in ((query, num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    query, key = _rotate(query, cos, sin, past), _rotate(key, cos, sin, past)
    key, value = store(key, value) if store else (key, value)
    key = torch.cat([past_key[:, :, :past], key], 2)
    value = torch.cat([past_value[:, :, :past], value], 2)
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(past) if causal else None
    if mask is not None and window is not None:
        mask = mask.triu(past - window + 1)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return context.transpose(1, 2).flatten(2), key, value


def rotary_embedding(x: Tensor, start: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [b, heads, s, d], whose first row stands at position `start` int64 [1]."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding", [x, start, cos, sin], dtype=x.dtype, shape=x.shape, version=1
        )
    return _rotate(x, cos, sin, int(start))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[b, s, heads * d] -> [b, heads, s, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
    """Turn each pair (i, i + d / 2) of x [b, heads, s, d] by the angle of its position."""
    rows = slice(start, start + x.shape[2])
    cos, sin = cos[rows], sin[rows]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class HeadNorm(nn.RMSNorm):
    """RMS norm of each head of x [b, s, heads * d], with one weight [d] for all heads, or none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape))).flatten(-2)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), the SwiGLU feed-forward (arXiv:2002.05202), or with another activation."""

    def __init__(self, hidden: int, intermediate: int, *, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by `scale`, which a head tied to it is not."""

    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__(rows, width)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class CappedHead(nn.Linear):
    """cap * tanh(W x / cap): logits within (-cap, cap), Gemma's soft-capping (arXiv:2408.00118)."""

    def __init__(self, width: int, vocab: int, cap: float) -> None:
        super().__init__(width, vocab, bias=False)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x) * (1 / self.cap)) * self.cap

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cap={self.cap}"
