"""Eagle3 (arXiv:2503.01840) as DeepSpec trains it: one layer that runs ahead of the target token by token.

Row i joins the target's hidden state at i with the token at i + 1 and predicts the one at i + 2. Where there is no
hidden state of the target yet, the layer's own output of the row before stands in.
"""

import torch
from torch import Tensor, nn

from dsopt.compiler.drafters.config import DraftConfig
from dsopt.compiler.drafters.dspark import best
from dsopt.compiler.models import llama, qwen3
from dsopt.compiler.models.layers import GatedMlp


def _widen(attention: llama.Attention, hidden: int) -> None:
    """Queries, keys and values read two vectors side by side: the token's and the hidden state's."""
    for name in ("q_proj", "k_proj", "v_proj"):
        out = getattr(attention, name).out_features
        setattr(attention, name, nn.Linear(2 * hidden, out, bias=False))


class Layer(nn.Module):
    def __init__(self, config: llama.Config, *, head_norms: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (qwen3.Attention if head_norms else llama.Attention)(config)
        _widen(self.self_attn, config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size)

    def forward(self, embedded: Tensor, hidden: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)
        attended, present_key, present_value = self.self_attn(both, *state)
        x = hidden + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present_key, present_value


class Drafter(nn.Module):
    """All weights, named as in the checkpoint."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config, shape = config, config.decoder
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.fc = nn.Linear(len(config.taps) * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([Layer(shape, head_norms=config.head_norms)])
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)


class Context(nn.Module):
    """Tapped hidden states [1, n, taps * width] -> one of the layer's own width."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return [self.drafter.fc(hidden)]


class Step(nn.Module):
    """Rows behind each other, causally."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(self, hidden: Tensor, ids: Tensor, *state: Tensor) -> list[Tensor]:
        """hidden [1, n, width] at n positions, ids int64 [1, n] the tokens after each, state as in a decoder's block.

        Returns the layer's output at the last row [1, 1, width], that row's candidates int64 [1, CANDIDATES] for the
        token after, their logits, and the present key and value.
        """
        drafter = self.drafter
        lengths, total, cos, sin, key, value = state
        x, *present = drafter.layers[0](drafter.embed_tokens(ids), hidden, key, value, lengths, total, cos, sin)
        last = x[:, -1:]
        logits, candidates = best(drafter.lm_head(drafter.norm(last)))
        return [last, candidates, logits, *present]
