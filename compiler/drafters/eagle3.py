"""Eagle3 (arXiv:2503.01840) as DeepSpec trains it: one layer that runs ahead of the target token by token.

Row i joins the target's hidden state at i with the token at i + 1 and predicts the one at i + 2. Where there is no
hidden state of the target yet, the layer's own output of the row before stands in.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsopt.compiler.drafters.config import DraftConfig
from dsopt.compiler.drafters.dspark import best
from dsopt.compiler.drafters.families import make_embedding, make_head, make_layer


def _make_layer(config: DraftConfig) -> Any:
    """A layer of the family whose queries, keys and values read two vectors side by side: the token's and the hidden
    state's."""
    layer, shape = make_layer(config, causal=True), config.decoder
    layer.hidden_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
    attention = layer.self_attn
    for name, linear in list(attention.named_children()):
        if name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, nn.Linear(2 * shape.hidden_size, linear.out_features, bias=False))
    return layer


class Drafter(nn.Module):
    """All weights, named as in the checkpoint."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config, shape = config, config.decoder
        self.embed_tokens = make_embedding(config)
        self.fc = nn.Linear(len(config.taps) * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([_make_layer(config)])
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = make_head(config)


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
        self.drafter: Any = drafter

    def forward(self, hidden: Tensor, ids: Tensor, *state: Tensor) -> list[Tensor]:
        """hidden [1, n, width] at n positions, ids int64 [1, n] the tokens after each, state as in a decoder's block.

        Returns the layer's output at the last row [1, 1, width], that row's candidates int64 [1, CANDIDATES] for the
        token after, their logits, and the present key and value.
        """
        drafter, layer = self.drafter, self.drafter.layers[0]
        lengths, total, cos, sin, key, value = state
        both = torch.cat([layer.input_layernorm(drafter.embed_tokens(ids)), layer.hidden_norm(hidden)], -1)
        attended, *present = layer.self_attn(both, key, value, lengths, total, cos, sin)
        last = layer.finish(hidden, attended)[:, -1:]
        logits, candidates = best(drafter.lm_head(drafter.norm(last)))
        return [last, candidates, logits, *present]
