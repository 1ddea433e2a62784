"""A recipe applied to the graphs of a drafter. Its errors cost accepted tokens, never a wrong one."""

import dataclasses
import re

import onnx_ir as ir

from dsopt.compiler.passes import CLEAN, FUSE
from dsopt.compiler.passes.quantize_embedding import quantize_gather
from dsopt.compiler.passes.quantize_linears import QuantizeLinears
from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.roles import Linear
from dsopt.compiler.weights import Weight

_LAYER = re.compile(r"\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight$")


def passes(recipe: Recipe) -> list[ir.passes.InPlacePass]:
    """clean -> quantize -> fuse, as for a model."""
    return [*CLEAN, QuantizeLinears(recipe, find=find_draft_linears), QuantizeTables(recipe), *FUSE]


def find_draft_linears(graph: ir.Graph) -> list[Linear]:
    """By name: dsopt itself named these modules. What has no role of a decoder has the recipe's first format."""
    found = []
    for node in graph:
        if node.op_type == "FusedMatMul":
            weight = node.inputs[1]
            assert weight is not None
            found.append(Linear(node, *_role(weight.name or "")))
    return found


def _role(name: str) -> tuple[str, int | None]:
    if match := _LAYER.search(name):
        return match[2], int(match[1])
    return ("context" if name.endswith(".fc.weight") else "head"), None


class QuantizeTables(ir.passes.InPlacePass):
    """The embedding as the recipe says, the Markov head's two tables as the embedding."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            table = node.inputs[0] if node.op_type == "Gather" else None
            if table is not None and isinstance(table.const_value, Weight):
                modified |= self._quantize(model.graph, node, table)
        return ir.passes.PassResult(model, modified)

    def _quantize(self, graph: ir.Graph, gather: ir.Node, table: ir.Value) -> bool:
        assert table.shape is not None
        width = int(table.shape[1])  # type: ignore[arg-type]
        form = self.recipe.embedding(width)
        if form.kernel == "w8a8":  # which only one gather could read
            form = Format("nbits", 8, 32) if width % 32 == 0 else Format()
        if ".markov_" in str(table.name):
            form = _symmetric(form)  # read at several places, which share codes and scales and nothing else
        if form.kernel == "none":
            return False
        quantize_gather(graph, gather, form, str(table.name).removesuffix(".weight"))
        return True


def _symmetric(form: Format) -> Format:
    return dataclasses.replace(form, zero_points=False)
