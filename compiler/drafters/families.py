"""What a drafter has of its target's family: the shape of its layers, the embedding, the head."""

from typing import Any

from torch import nn

from dsopt.compiler.drafters.config import DraftConfig
from dsopt.compiler.models import gemma4_text, llama, qwen3


def make_layer(config: DraftConfig, *, causal: bool) -> Any:
    """A decoder's block. Not `causal`, each row sees all others."""
    block: Any = gemma4_text.Block if _is_gemma(config) else qwen3.Block if config.head_norms else llama.Block
    layer = block(config.decoder.layer(0))
    layer.self_attn.causal = causal
    return layer


def make_embedding(config: DraftConfig) -> nn.Embedding:
    return _model(config).make_embedding(config.decoder)


def make_head(config: DraftConfig) -> nn.Linear:
    return _model(config).make_head(config.decoder)


def _model(config: DraftConfig) -> type[llama.Model]:
    return gemma4_text.Model if _is_gemma(config) else llama.Model


def _is_gemma(config: DraftConfig) -> bool:
    return isinstance(config.decoder, gemma4_text.Config)
