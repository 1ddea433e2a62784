"""Logits of some tokens -> logits of all, in a token's own place; those that a short head does not say never win.

One more column, filled with a number below all, stands for them: Pad, then Gather by token.
"""

import numpy as np
import onnx_ir as ir

from dsopt.compiler.pruning.tensors import Indices
from dsopt.compiler.weights import initializer

NEVER = -1e9  # exp() of it is 0; infinity would make differences that are no numbers


class WidenLogits(ir.passes.InPlacePass):
    """kept: the tokens of the columns, ascending; vocab_size: of the columns to be."""

    def __init__(self, kept: Indices, vocab_size: int) -> None:
        super().__init__()
        self.kept, self.vocab_size = kept, vocab_size

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        short = graph.outputs[0]
        columns = np.full(self.vocab_size, len(self.kept), np.int64)
        columns[self.kept] = np.arange(len(self.kept))
        pads, never, places = (
            initializer(graph, ir.tensor(array, name=f"head.{name}"))
            for name, array in (
                ("pads", np.array([0, 0, 0, 0, 0, 1], np.int64)),
                ("never", np.array(NEVER, np.float32)),
                ("columns", columns),
            )
        )
        padded = ir.node("Pad", [short, pads, never], name="head/Pad")
        padded.outputs[0].name = "head/Pad"
        wide = ir.node("Gather", [padded.outputs[0], places], {"axis": 2}, name="head/Gather")
        logits = wide.outputs[0]
        assert short.shape is not None
        logits.type, logits.shape = short.type, ir.Shape([*short.shape[:-1], self.vocab_size])
        logits.name, short.name = short.name, "head.logits"
        graph.extend([padded, wide])
        graph.outputs[0] = logits
        return ir.passes.PassResult(model, modified=True)
