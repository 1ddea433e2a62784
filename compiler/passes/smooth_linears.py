"""Scales of input channels folded into weights: what makes x is divided, what reads it is multiplied.

norm(x) * g         ->  norm(x) * (g / s)        before q, k, v, before gate, up, and before the head
v = x V^T           ->  x (V / s)^T              before o: the context is a mean of values, channel by channel
silu(gate) * (x U^T) -> silu(gate) * (x (U / s)^T)   before down
y = x W^T           ->  x (W s)^T

Where the head's weight is the embedding too, a token's row e becomes e s, which is divided after it was gathered.
"""

import numpy as np
import onnx_ir as ir
import torch

from dsopt.compiler.passes.quantize_linears import module_name
from dsopt.compiler.roles import Linear, find_linears
from dsopt.compiler.smoothing import Scales, repeat_channels, scale
from dsopt.compiler.weights import Weight, initializer

_READERS = {"q": ("q", "k", "v"), "o": ("o",), "gate": ("gate", "up"), "down": ("down",), "head": ("head",)}
_MAKERS = {"o": "v", "down": "up"}


class SmoothLinears(ir.passes.InPlacePass):
    """`scales` by module name of the first reader; of o_proj one value for each channel of v_proj's outputs."""

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layers: dict[int | None, dict[str, Linear]] = {}
        for linear in find_linears(model.graph):
            layers.setdefault(linear.layer, {})[linear.role] = linear
        found = 0
        for linears in layers.values():
            for first, readers in _READERS.items():
                scales = self.scales.get(module_name(linears[first])) if first in linears else None
                if scales is not None:
                    present = [linears[role] for role in readers if role in linears]
                    self._fold(model.graph, linears, first, present, scales.float())
                    found += 1
        assert found == len(self.scales), "scales for a layer that is not there"
        return ir.passes.PassResult(model, modified=bool(found))

    def _fold(
        self, graph: ir.Graph, linears: dict[str, Linear], first: str, readers: list[Linear], scales: torch.Tensor
    ) -> None:
        assert first != "o" or can_smooth_context(linears[first].node), "values that are normed"
        maker = _MAKERS.get(first)
        _multiply(linears[maker].weight if maker else _norm(readers), rows=(1 / scales).numpy())
        if first == "o":
            scales = repeat_channels(scales, *heads_before(readers[0]))
        for reader in readers:
            _multiply(reader.weight, columns=scales.numpy())
        for use in readers[0].weight.uses():
            if use.node.op_type == "Gather":
                _multiply_output(graph, use.node, 1 / scales.numpy())


def can_smooth_context(output: ir.Node) -> bool:
    """Whether an output projection reads values as they come from their projection. A norm of each head would undo
    what its rows are divided by."""
    context = output.inputs[0]
    attention = context.producer() if context is not None else None
    value = attention.inputs[2] if attention is not None else None
    made = value.producer() if value is not None else None
    return made is not None and made.op_type == "FusedMatMul"


def _multiply(value: ir.Value, *, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> None:
    assert isinstance(value.const_value, Weight), value.name
    value.const_value = Weight(scale(value.const_value.tensor, rows=rows, columns=columns), str(value.name))


def _multiply_output(graph: ir.Graph, gather: ir.Node, by: np.ndarray) -> None:
    rows = gather.outputs[0]
    factors = initializer(graph, ir.tensor(by.astype(np.float32), name="model.embed_tokens.unsmooth"))
    product = ir.node("Mul", [rows, factors], name="model.embed_tokens/unsmooth")
    output = product.outputs[0]
    output.name, output.shape, output.type = str(product.name), rows.shape, rows.type
    rows.replace_all_uses_with(output)
    product.replace_input_with(0, rows)
    graph.insert_after(gather, product)


def _norm(readers: list[Linear]) -> ir.Value:
    """The weight of the norm whose output all readers read, and nobody else."""
    x = readers[0].node.inputs[0]
    assert x is not None
    node = x.producer()
    assert node is not None
    assert {use.node for use in x.uses()} == {reader.node for reader in readers}, "a norm that others read too"
    weight = node.inputs[1]
    assert weight is not None
    return weight


def heads_before(output: Linear) -> tuple[int, int]:
    """Query heads and key-value heads of the attention before an output projection."""
    context = output.node.inputs[0]
    attention = context.producer() if context is not None else None
    assert attention is not None
    return attention.attributes["num_heads"].as_int(), attention.attributes["kv_num_heads"].as_int()
