"""Channels of feed-forwards and key-value groups of attentions leave the weights around them.

gate and up lose rows, down columns; q, k and v lose rows, o columns, and GroupQueryAttention counts fewer heads. Layers
may differ in width, which no config.json can say and a graph can. Where last weights (o, down) were refitted, those are
taken.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from dsopt.compiler.checkpoint import Tensor
from dsopt.compiler.pruning.tensors import Indices, select
from dsopt.compiler.roles import HEAD_NORM, Linear, find_linears
from dsopt.compiler.weights import Weight, initializer


class PruneFeatures(ir.passes.InPlacePass):
    """channels, groups: by layer those kept. weights: refitted ones by name, in their new shapes."""

    def __init__(
        self, channels: Mapping[int, Indices], groups: Mapping[int, Indices], weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.channels, self.groups, self.weights = channels, groups, weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        linears = find_linears(model.graph)
        for linear in linears:
            self._slice_channels(linear)
        parts = {(linear.layer, linear.role): linear for linear in linears}
        for layer in self.groups:
            self._slice_groups(*(parts[layer, role] for role in "oqkv"))
        for linear in linears:
            if (refitted := self.weights.get(linear.weight.name or "")) is not None:
                assert linear.size == refitted.shape, linear.name
                _bind(linear.weight, refitted)
        return ir.passes.PassResult(model, modified=bool(self.channels or self.groups or self.weights))

    def _slice_channels(self, linear: Linear) -> None:
        kept = self.channels.get(linear.layer) if linear.layer is not None else None
        if kept is not None and linear.role in ("gate", "up", "down"):
            _slice(linear.weight, kept, columns=linear.role == "down")

    def _slice_groups(self, out: Linear, *projections: Linear) -> None:
        assert out.layer is not None
        attention, kept = out.node.inputs[0].producer(), self.groups[out.layer]  # type: ignore[union-attr]
        assert attention is not None
        heads, groups = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        width = out.size[1] // heads
        queries = _spread(kept, heads // groups * width)
        _slice(out.weight, queries, columns=True)
        for projection, features in zip(projections, (queries, *[_spread(kept, width)] * 2), strict=True):
            _slice(projection.weight, features, columns=False)
            _free_heads(projection.node, width)
        for name, count in (("num_heads", heads // groups * len(kept)), ("kv_num_heads", len(kept))):
            attention.attributes[name] = ir.AttrInt64(name, count)
        for cache in (*attention.inputs[3:5], *attention.outputs[1:3]):
            assert cache is not None
            assert cache.shape is not None
            cache.shape = ir.Shape([cache.shape[0], len(kept), *cache.shape[2:]])


def _free_heads(projection: ir.Node, width: int) -> None:
    """A norm of each head stands between two reshapes that count them: let what comes in say how many there are."""
    for use in list(projection.outputs[0].uses()):
        node, sizes = use.node, iter(([0, 0, -1, width], [0, 0, -1]))
        for op in HEAD_NORM:
            if node.op_type != op:
                break
            if op == "Reshape":
                name = f"{node.name}.sizes"
                assert node.graph is not None
                value = initializer(node.graph, ir.tensor(np.array(next(sizes), np.int64), name=name))
                node.replace_input_with(1, value)
            node = node.outputs[0].consumers()[0]


def _spread(kept: Indices, width: int) -> Indices:
    """The features of units of `width` neighbouring ones."""
    return (kept[:, None] * width + np.arange(width)).reshape(-1)


def _slice(value: ir.Value, kept: Indices, *, columns: bool) -> None:
    assert isinstance(value.const_value, Weight)
    source = value.const_value.tensor
    _bind(value, select(source, columns=kept) if columns else select(source, rows=kept))


def _bind(value: ir.Value, tensor: Tensor) -> None:
    value.const_value = Weight(tensor, value.name or "")
    value.shape = ir.Shape(tensor.shape)
