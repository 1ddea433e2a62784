"""A rewrite of one's own in the pipeline: scaled logits, by a pass that walks the graph.

    python samples/custom_pass.py CHECKPOINT OUT [TEMPERATURE]

The temperature goes into the graph as one Mul after the head, so that every program that samples from this artifact at
temperature 1 draws as if at TEMPERATURE.
"""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dsopt.compiler import build
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.weights import initializer


class ScaleLogits(ir.passes.InPlacePass):
    """logits -> logits / temperature."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = graph.outputs[0]
        factor = ir.tensor(np.array(1 / self.temperature, np.float32), name="logits.scale")
        scaled = ir.node("Mul", [logits, initializer(graph, factor)], name="logits/Mul")
        graph.append(scaled)
        output = scaled.outputs[0]
        output.shape, output.type = logits.shape, logits.type
        logits.name, output.name = "logits.unscaled", "logits"
        graph.outputs[0] = output
        return ir.passes.PassResult(model, modified=True)


def main() -> None:
    checkpoint, out, *rest = sys.argv[1:]
    temperature = float(rest[0]) if rest else 2.0
    plan = build.plan(open_checkpoint(checkpoint), Recipe.parse("int8"))
    before = len(list(plan.model.graph))
    ScaleLogits(temperature)(plan.model)
    build.write(plan, Path(out))
    print(f"{out}: {before} nodes before, {len(list(plan.model.graph))} after")


if __name__ == "__main__":
    main()
