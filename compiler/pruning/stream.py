"""A family's torch model run a block at a time: memory is one block and the hidden states, whatever the depth.

The residual stream is seen as a row of sublayers, attention and feed-forward of layer 0, of layer 1, ..., each of
which adds `features @ weight.T`: the features are what its last linear layer (o_proj, down_proj) reads.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.models import find_family
from dsopt.runtime.errors import DsoptError

_BATCH = 2048  # tokens run at a time: bounds the activations of a block
_ROWS = 128  # rows of logits at a time


class Sublayer(NamedTuple):
    """Attention (`mlp` false) or feed-forward of a layer; they sort in the order in which they run."""

    layer: int
    mlp: bool

    def __str__(self) -> str:
        return f"{'mlp' if self.mlp else 'attention'} {self.layer}"

    @property
    def weight(self) -> str:
        """The checkpoint's name of its last linear layer's weight."""
        module = "mlp.down_proj" if self.mlp else "self_attn.o_proj"
        return f"model.layers.{self.layer}.{module}.weight"


class Stream:
    """Reads blocks of a checkpoint as they are needed, float32; keeps the last one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises DsoptError on a family whose blocks are no pair of attention and feed-forward."""
        family = find_family(checkpoint.config.get("model_type"))
        self.config = family.Config.from_dict(checkpoint.config)
        self._checkpoint = checkpoint
        with torch.device("meta"):
            self._model = family.Model(self.config)
        block = self._model.model.layers[0]
        parts = ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
        if missing := [part for part in parts if part not in dict(block.named_modules())]:
            raise DsoptError(f"{self.config.__class__.__module__}: a family without {missing[0]} cannot be pruned yet")
        self._loaded: tuple[int, Any] | None = None

    @property
    def sublayers(self) -> list[Sublayer]:
        return [Sublayer(layer, mlp) for layer in range(self.config.num_hidden_layers) for mlp in (False, True)]

    def block(self, layer: int) -> Any:
        """One block with its weights."""
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = None  # let go of the old one before the new one is read
            module = copy.deepcopy(self._model.model.layers[layer])
            self._loaded = layer, self._fill(module, f"model.layers.{layer}.")
        return self._loaded[1]

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        tensors = self._checkpoint.tensors
        state = {name: torch.from_numpy(tensors[prefix + name].read()) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def weight(self, sublayer: Sublayer) -> Tensor:
        """[hidden, features] of its last linear layer."""
        block = self.block(sublayer.layer)
        return block.get_parameter(sublayer.weight.partition(f".{sublayer.layer}.")[2]).detach()

    def parameters(self, sublayer: Sublayer) -> int:
        """How many weights a sublayer has."""
        block = self._model.model.layers[sublayer.layer]
        module = block.mlp if sublayer.mlp else block.self_attn
        return sum(parameter.numel() for parameter in module.parameters())

    def embed(self, windows: Sequence[NDArray[np.int64]]) -> Tensor:
        """Windows of one length -> hidden states float32 [windows, length, hidden]."""
        ids, places = np.unique(np.stack(windows), return_inverse=True)
        table = self._checkpoint.tensors["model.embed_tokens.weight"]
        rows = np.concatenate([table.read(int(id), int(id) + 1) for id in ids])
        return torch.from_numpy(rows)[torch.from_numpy(places).reshape(len(windows), -1)]

    def run(self, sublayer: Sublayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features, contribution) of a sublayer to the hidden states x [b, s, hidden] before it."""
        block = self.block(sublayer.layer)
        last = block.get_submodule("mlp.down_proj" if sublayer.mlp else "self_attn.o_proj")
        seen: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            if sublayer.mlp:
                out = block.mlp(block.post_attention_layernorm(x))
            else:
                out = block.self_attn(block.input_layernorm(x), *self._state(x))[0]
        finally:
            hook.remove()
        return seen[0], out

    def _state(self, x: Tensor) -> tuple[Tensor, ...]:
        config, (batch, rows, _) = self.config, x.shape
        empty = torch.empty(batch, config.num_key_value_heads, 0, config.head_dim)
        lengths = torch.full((batch,), rows - 1, dtype=torch.int32)
        return empty, empty, lengths, torch.tensor(rows, dtype=torch.int32), *config.rotary(rows)

    def advance(self, sublayer: Sublayer, x: Tensor) -> Tensor:
        """The hidden states after a sublayer."""
        return torch.cat([part + self.run(sublayer, part)[1] for part in batches(x)])

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and output table: hidden states [rows, hidden] -> logits [rows, vocab]."""
        norm = self._fill(copy.deepcopy(self._model.model.norm), "model.norm.")
        tensors, tied = self._checkpoint.tensors, self.config.tie_word_embeddings
        table = torch.from_numpy(tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].read())
        return lambda x: norm(x) @ table.T


def batches(x: Tensor) -> Iterator[Tensor]:
    """Some windows at a time."""
    return iter(x.split(max(1, _BATCH // x.shape[1])))


def divergence(head: Callable[[Tensor], Tensor], base: Tensor, new: Tensor) -> float:
    """Mean KL(base || new) in nats over the second halves of windows, from final hidden states [n, s, hidden]."""
    half = base.shape[1] // 2
    pairs = zip(*(x[:, half:].flatten(0, 1).split(_ROWS) for x in (base, new)), strict=True)
    total = 0.0
    for one, other in pairs:
        p, q = head(one).log_softmax(-1), head(other).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total / (base.shape[0] * (base.shape[1] - half))
