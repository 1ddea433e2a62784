"""DSpark (arXiv:2607.05147) and DFlash as DeepSpec trains it: a block of rows drafted in one pass.

What the target has processed is context: its tapped hidden states become keys and values of every draft layer, with no
attention among themselves (`Context`). The block is the anchor and masks; each row sees all context and all rows, and
row j predicts the token after position j of the block (`Block`). DSpark then walks the rows: what was drawn at one row
shifts the logits of the next (the Markov head), and the confidence head says how likely a row's token is accepted.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsopt.compiler.drafters.config import DraftConfig
from dsopt.compiler.drafters.families import make_embedding, make_head, make_layer
from dsopt.compiler.models.layers import rotary_embedding

# Tokens of a row that the chain chooses among. The Markov head then reads as many rows of its table, not all;
# with 16 the accepted length was measured to fall by 0.1 %.
CANDIDATES = 64


class Drafter(nn.Module):
    """All weights, named as in the checkpoint."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config, shape = config, config.decoder
        self.embed_tokens = make_embedding(config)
        self.fc = nn.Linear(len(config.taps) * shape.hidden_size, shape.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(make_layer(config, causal=False) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = make_head(config)
        if config.markov_rank:
            self.markov_head = MARKOV_HEADS[config.markov_head](config)
        if config.confidence:
            self.confidence_head = ConfidenceHead(config)


class Context(nn.Module):
    """Tapped hidden states to keys and values, row by row."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(self, hidden: Tensor, start: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """hidden [1, n, taps * width], start int64 [1]: the position of the first row.

        Returns key and value of each layer, [1, kv_heads, n, head_dim].
        """
        drafter, made = self.drafter, []
        context = drafter.hidden_norm(drafter.fc(hidden))
        for layer in drafter.layers:
            attention: Any = layer.self_attn
            key, value = (_by_heads(part, attention.kv_heads) for part in attention.key_and_value(context))
            made += [rotary_embedding(key, start, cos, sin), value]
        return made


def _by_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Anchor and masks to drafted tokens."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(
        self, ids: Tensor, noise: Tensor, lengths: Tensor, total: Tensor, cos: Tensor, sin: Tensor, *past: Tensor
    ) -> list[Tensor]:
        """ids int64 [1, rows], past_key and past_value of each layer, lengths and total as in a decoder's block.

        noise float64 [rows, CANDIDATES] is added to the logits before the largest is taken: zeros choose greedily,
        T times Gumbel noise draws from softmax(logits / T).
        Returns tokens int64 [rows], candidates int64 [rows, CANDIDATES], their logits float32, the logit of each
        row's confidence float32 [rows] if there is a head for it, and the present keys and values.
        """
        drafter = self.drafter
        x, present = drafter.embed_tokens(ids), []
        for layer, key, value in zip(drafter.layers, past[::2], past[1::2], strict=True):
            x, *made = layer(x, key, value, lengths, total, cos, sin)
            present += made
        rows = drafter.norm(x)
        logits, candidates = best(drafter.lm_head(rows))
        if drafter.config.markov_rank:
            return [*self._chain(ids[0, 0].reshape(1), rows[0], candidates, logits, noise), *present]
        choice = (logits.double() + noise).argmax(-1, keepdim=True)
        tokens = candidates.gather(-1, choice)[:, 0]
        return [tokens, candidates, logits, *_confidence(drafter, rows[0], None), *present]

    def _chain(self, token: Tensor, rows: Tensor, candidates: Tensor, logits: Tensor, noise: Tensor) -> list[Tensor]:
        """What is drawn at a row decides on the logits of the next one."""
        head = self.drafter.markov_head
        outputs, features = head.outputs(candidates), head.features(rows)
        state, tokens, shifted, embeddings = None, [], [], []
        for row in range(rows.shape[0]):
            embedding = head.embed(token)
            feature, state = head(embedding, features, row, state)
            shifted.append(logits[row] + outputs[row] @ feature)
            # In float64, so that the law of what is drawn is that of the logits.
            choice = (shifted[-1].double() + noise[row]).argmax(-1, keepdim=True)
            token = candidates[row].index_select(0, choice)
            tokens.append(token)
            embeddings.append(embedding)
        embedded = torch.cat(embeddings).reshape(len(tokens), -1)
        all_logits = torch.cat(shifted).reshape(len(tokens), -1)
        return [torch.cat(tokens), candidates, all_logits, *_confidence(self.drafter, rows, embedded)]


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logits of each row of [1, rows, vocab] and their tokens, [rows, CANDIDATES] each, falling."""
    values, tokens = torch.topk(logits, min(CANDIDATES, logits.shape[-1]))
    return values[0], tokens[0]


def _confidence(drafter: Drafter, rows: Tensor, embeddings: Tensor | None) -> list[Tensor]:
    if not drafter.config.confidence:
        return []
    parts = [rows, embeddings] if drafter.config.confidence_with_markov and embeddings is not None else [rows]
    return [drafter.confidence_head(torch.cat(parts, -1)).reshape(-1)]


class ConfidenceHead(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width = config.decoder.hidden_size + config.confidence_with_markov * config.markov_rank
        self.proj = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class VanillaHead(nn.Module):
    """logits + w2 w1[previous token]: a bigram table of low rank."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.rank, vocab = config.markov_rank, config.decoder.vocab_size
        self.markov_w1 = nn.Embedding(vocab, self.rank)
        self.markov_w2 = nn.Linear(self.rank, vocab, bias=False)

    def embed(self, token: Tensor) -> Tensor:
        """int64 [1] -> [rank]."""
        return self.markov_w1(token.reshape(1, 1)).reshape(self.rank)

    def outputs(self, candidates: Tensor) -> Tensor:
        """The rows of w2 of candidates [rows, n] -> [rows, n, rank]."""
        return F.embedding(candidates.reshape(1, -1), self.markov_w2.weight).reshape(*candidates.shape, self.rank)

    def features(self, rows: Tensor) -> Tensor:
        """What the head needs to know of the rows [rows, width], computed for all at once."""
        return rows

    def forward(
        self, embedding: Tensor, features: Tensor, row: int, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The embedding [rank] of the token before `row` -> what w2 multiplies [rank], and the next state."""
        return embedding, state


class GatedHead(VanillaHead):
    """w2 (g * w1[previous token]), g = sigmoid(gate [row; w1[previous token]])."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.width = config.decoder.hidden_size
        self.gate_proj = nn.Linear(self.width + self.rank, self.rank)

    def features(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.gate_proj.weight[:, : self.width], self.gate_proj.bias)

    def forward(
        self, embedding: Tensor, features: Tensor, row: int, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        gate = torch.sigmoid(features[row] + self.gate_proj.weight[:, self.width :] @ embedding)
        return gate * embedding, state


class RnnHead(VanillaHead):
    """w2 tanh(o); [g; c; o] = joint [state; w1[previous token]; row]; state <- s(g) state + (1 - s(g)) tanh(c)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.joint_proj = nn.Linear(2 * self.rank + config.decoder.hidden_size, 3 * self.rank)

    def features(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.joint_proj.weight[:, 2 * self.rank :], self.joint_proj.bias)

    def forward(
        self, embedding: Tensor, features: Tensor, row: int, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        weight, rank = self.joint_proj.weight, self.rank
        joint = features[row] + weight[:, rank : 2 * rank] @ embedding
        if state is not None:  # it starts as zeros
            joint = joint + weight[:, :rank] @ state
        parts = joint.reshape(3, rank)
        gate, candidate = torch.sigmoid(parts[0]), torch.tanh(parts[1])
        kept = -candidate if state is None else state - candidate
        return torch.tanh(parts[2]), candidate + gate * kept


MARKOV_HEADS = {"vanilla": VanillaHead, "gated": GatedHead, "rnn": RnnHead}
