"""A pruned copy of a model as its own drafter: what verification corrects need not be good, only quick and often right.

Half the layers and a quarter of the feed-forward channels go, the rest is repaired and stored in 4 bits. The head says
the likeliest quarter of the tokens; the logits keep their places, since drafts are told in the target's tokens. The
embedding keeps its rows. It is stored again: ONNX Runtime reads external data only from the graph's own directory or
below, so that the copy cannot point to the target's file.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.corpus import self_windows
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.self_text import Calibrate
from dsopt.runtime.errors import DsoptError

if TYPE_CHECKING:
    from dsopt.compiler.build import Plan

DIRECTORY = "draft-self"
_HEAD = 0.25  # share of the tokens that the head says


def plan_draft(
    checkpoint: Checkpoint,
    target: Pruning,
    *,
    calibrate: Calibrate = self_windows,
    report: Callable[[str], None] = lambda line: None,
) -> "Plan":
    """The drafter of a model that is itself pruned as `target` says, as an artifact of its own."""
    from dsopt.compiler import build

    layers = int(checkpoint.config["num_hidden_layers"]) // 2
    if not layers:
        raise DsoptError("--draft self: a model of one layer has no smaller copy")
    pruning = Pruning(ffn=0.25, layers=layers, vocab=target.vocab, tokens=target.tokens, head=_HEAD)
    return build.plan(checkpoint, Recipe.parse("int4"), pruning, calibrate=calibrate, report=report)
