"""A family's torch model run a block at a time: memory is one block and the hidden states, whatever the depth.

The residual stream is seen as a row of sublayers, attention and feed-forward of layer 0, of layer 1, ..., each of
which adds `features @ weight.T`: the features are what its last linear layer (o_proj, down_proj) reads.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.self_text import Windows
from dsopt.compiler.stream import BlockStream
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
        self.blocks = BlockStream(checkpoint)
        self.config = self.blocks.config
        self._blank: Any = self.blocks.blank()
        parts = {name for name, _ in self._blank.named_children()}
        if odd := parts ^ {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
            raise DsoptError(
                f"--prune: layers of {checkpoint.config['model_type']} models are not Llama's ({min(odd)}) and cannot "
                "be pruned yet, for --draft self neither; vocab=FILE works"
            )
        self._loaded: tuple[int, Any] | None = None

    @property
    def sublayers(self) -> list[Sublayer]:
        return [Sublayer(layer, mlp) for layer in range(self.config.num_hidden_layers) for mlp in (False, True)]

    def block(self, layer: int) -> Any:
        """One block with its weights."""
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = None  # let go of the old one before the new one is read
            self._loaded = layer, self.blocks.block(layer)
        return self._loaded[1]

    def weight(self, sublayer: Sublayer) -> Tensor:
        """[hidden, features] of its last linear layer."""
        block = self.block(sublayer.layer)
        return block.get_parameter(sublayer.weight.partition(f".{sublayer.layer}.")[2]).detach()

    def parameters(self, sublayer: Sublayer) -> int:
        """How many weights a sublayer has."""
        module = self._blank.mlp if sublayer.mlp else self._blank.self_attn
        return sum(parameter.numel() for parameter in module.parameters())

    def embed(self, windows: Windows) -> Tensor:
        """Windows of one length -> hidden states float32 [windows, length, hidden]."""
        return self.blocks.embed(np.asarray(windows))

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
                out = block.self_attn(block.input_layernorm(x), *self.blocks.state(sublayer.layer, *x.shape[:2]))[0]
        finally:
            hook.remove()
        return seen[0], out

    def advance(self, sublayer: Sublayer, x: Tensor) -> Tensor:
        """The hidden states after a sublayer."""
        return torch.cat([part + self.run(sublayer, part)[1] for part in batches(x)])

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and output table: hidden states [rows, hidden] -> logits [rows, vocab]."""
        return self.blocks.head()


def check_prunable(checkpoint: Checkpoint) -> None:
    """Raises DsoptError where `Stream` would, before text to prune by is written for nothing."""
    Stream(checkpoint)


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
