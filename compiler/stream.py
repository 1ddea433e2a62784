"""A checkpoint run block by block in float32: one block's weights in memory, however deep the model.

The eager torch code of the family does the arithmetic, so whatever is learnt here (statistics of activations,
gradients) is learnt about the very function that the graph computes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.models import find_family
from dsopt.runtime.errors import DsoptError

Observe = Callable[[str, Tensor, Tensor], None]
"""A linear layer's module name, its input [..., K] and its output [..., N], in the order of computation."""


class BlockStream:
    """The parts of one model. Hidden states are float32 [windows, tokens, width]."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises DsoptError on a model that is not supported."""
        checkpoint.check_no_biases()
        self.checkpoint = checkpoint
        self.family = find_family(checkpoint.config.get("model_type"))
        self.config = self.family.Config.from_dict(checkpoint.config)
        self.depth: int = self.config.num_hidden_layers

    def embed(self, ids: np.ndarray) -> Tensor:
        """ids int64 [windows, tokens] -> hidden states. Only the rows in use are read."""
        used, inverse = np.unique(ids, return_inverse=True)
        tensor = self._tensor("model.embed_tokens.weight")
        rows = np.concatenate([tensor.read(int(i), int(i) + 1) for i in used])
        embedding = self.blank(lambda model: model.model.embed_tokens)
        embedding.weight = nn.Parameter(torch.from_numpy(rows), requires_grad=False)
        return embedding(torch.from_numpy(inverse.reshape(ids.shape)))

    def block(self, layer: int) -> nn.Module:
        """The block of one layer, `forward(x, *state(...))`; its parameters take no gradient."""
        prefix, block = f"model.layers.{layer}.", self.blank(layer=layer)
        if self.checkpoint.changes:
            shrink(block, self.config.layer(layer).head_dim, lambda name: self.checkpoint.tensors.get(prefix + name))
        return self._filled(block, prefix)

    def state(self, layer: int, windows: int, tokens: int) -> list[Tensor]:
        """What a layer's block wants beside its input, for sequences that start at position 0."""
        config = self.config.layer(layer)
        empty = torch.empty(windows, config.num_key_value_heads, 0, config.head_dim)
        lengths, total = torch.full((windows,), tokens - 1, dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32)
        return [empty, empty, lengths, total, *config.rotary(tokens)]

    def run(
        self,
        ids: np.ndarray,
        progress: Callable[[int, int], None] = lambda done, total: None,
        prepare: Callable[[int, nn.Module], None] = lambda layer, block: None,
    ) -> Tensor:
        """ids int64 [windows, tokens] -> hidden states behind the last block. `progress` is told of layers, `prepare`
        may change a layer's block before it runs."""
        x = self.embed(ids)
        with torch.inference_mode():
            for layer in range(self.depth):
                block = self.block(layer)
                prepare(layer, block)
                x = block(x, *self.state(layer, *x.shape[:2]))[0]
                progress(layer + 1, self.depth)
        return x

    @property
    def head_weight(self) -> str:
        """The name of the head's weight: the embedding's where they are tied, even if the file has a copy."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

    def norm(self) -> nn.Module:
        """The norm before the head."""
        return self._filled(self.blank(lambda model: model.model.norm), "model.norm.")

    def head(self) -> nn.Sequential:
        """Final norm and head: hidden states [..., width] -> logits [..., vocab]."""
        linear = self.blank(lambda model: model.lm_head)
        linear.load_state_dict({"weight": torch.from_numpy(self._tensor(self.head_weight).read())}, assign=True)
        return nn.Sequential(self.norm(), linear).requires_grad_(False)

    def blank(
        self, part: Callable[[Any], nn.Module] = lambda model: model.model.layers[0], layer: int = 0
    ) -> nn.Module:
        """A part of the model, a layer's block unless said, without weights."""
        with torch.device("meta"):
            return part(self.family.Model(self.config.layer(layer)))

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        state = {name: torch.from_numpy(self._tensor(prefix + name).read()) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def _tensor(self, name: str) -> Any:
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            raise DsoptError(f"{self.checkpoint.source.path}: tensor {name} is missing")
        return tensor


class _NoAttention(nn.Module):
    """In place of one that was pruned: adds nothing to the hidden states [b, s, width], and has no cache."""

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(x), past_key, past_value


class _NoMlp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def shrink(block: Any, head_dim: int, find: Callable[[str], Any]) -> None:
    """Make a blank block as wide as the tensors that `find` gives by their names in it, where it was pruned."""
    if find("self_attn.o_proj.weight") is None:
        block.self_attn = _NoAttention()
    if find("mlp.down_proj.weight") is None:
        block.mlp = _NoMlp()
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and (tensor := find(f"{name}.weight")) is not None:
            module.out_features, module.in_features = tensor.shape
            module.weight = nn.Parameter(torch.empty(tensor.shape, device="meta"))
    if (query := find("self_attn.q_proj.weight")) is not None:
        block.self_attn.heads = query.shape[0] // head_dim
        block.self_attn.kv_heads = groups = find("self_attn.k_proj.weight").shape[0] // head_dim
        block.self_attn.register_forward_pre_hook(
            lambda _module, inputs: (inputs[0], *(cache[:, :groups] for cache in inputs[1:3]), *inputs[3:])
        )


@contextmanager
def observed(block: nn.Module, prefix: str, observe: Observe) -> Iterator[None]:
    """While inside, `observe` sees every linear layer of `block` that runs."""

    def hook(name: str) -> Callable[..., None]:
        def seen(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            observe(name, inputs[0], output)

        return seen

    handles = [
        module.register_forward_hook(hook(f"{prefix}{name}"))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
