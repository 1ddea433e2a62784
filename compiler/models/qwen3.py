"""Qwen3, the dense models (arXiv:2505.09388): Llama with a norm on each head of query and key."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dsopt.compiler.models import llama
from dsopt.compiler.models.layers import HeadNorm
from dsopt.runtime.errors import DsoptError

_HEAD_DIM = 128  # unless config.json says otherwise; it does not follow from the width of the model


@dataclass(frozen=True)
class Config(llama.Config):
    """As Llama's; `head_dim` has a default of its own."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json. Raises DsoptError on a missing field or an unsupported value."""
        if config.get("use_sliding_window"):
            raise DsoptError("config.json: use_sliding_window = true is not supported for qwen3 models")
        if kinds := set(config.get("layer_types") or ()) - {"full_attention"}:
            raise DsoptError(f"config.json: layer_types {', '.join(sorted(map(str, kinds)))} are not supported")
        made = super().from_dict({**config, "head_dim": config.get("head_dim") or _HEAD_DIM})
        assert isinstance(made, Config)
        return made


class Attention(llama.Attention):
    def __init__(self, config: llama.Config) -> None:
        super().__init__(config)
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_norm(self.q_proj(x)), *self.key_and_value(x)

    def key_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_norm(self.k_proj(x)), self.v_proj(x)


class Block(llama.Block):
    def make_attention(self, config: llama.Config) -> nn.Module:
        return Attention(config)


class Model(llama.Model):
    block = Block
