"""A checkpoint and what is decided to go from it: what a graph is built of, and what is calibrated as it will be."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dsopt.compiler.checkpoint import Checkpoint, Tensor
from dsopt.compiler.models import find_family
from dsopt.compiler.pruning.auto import Choice, choose, measure_times
from dsopt.compiler.pruning.decide import Cuts, decide
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.pruning.renumber import prune_vocabulary
from dsopt.compiler.pruning.spelling import Spelling
from dsopt.compiler.pruning.stream import Sublayer, check_prunable
from dsopt.compiler.pruning.tensors import Indices, select
from dsopt.compiler.pruning.vocabulary import Vocabulary, choose_vocabulary
from dsopt.compiler.recipe import Recipe
from dsopt.compiler.self_text import Calibrate
from dsopt.runtime.errors import DsoptError

Report = Callable[[str], None]


@dataclass(frozen=True)
class Pruned:
    """`whole` is the checkpoint as it was, `checkpoint` the same over the tokens that stay, with blocks still whole:
    the passes `prune_*` cut those in the graph, as `cuts` say."""

    pruning: Pruning
    whole: Checkpoint
    checkpoint: Checkpoint
    vocabulary: Vocabulary | None = None
    cuts: Cuts = dataclasses.field(default_factory=Cuts)

    def facts(self) -> dict[str, Any]:
        """What went, and what that cost by the estimates; for people who have no graph yet."""
        vocab = {"vocab": dict(self.vocabulary.record)} if self.vocabulary else {}
        return {"text": self.pruning.text, "steps": {**vocab, **self.cuts.steps}, "kld_repaired": self.cuts.kld}

    @cached_property
    def spelling(self) -> Spelling | None:
        """Of the tokens that are gone."""
        return Spelling(self.vocabulary, int(self.whole.config["vocab_size"])) if self.vocabulary else None

    @cached_property
    def cut(self) -> Checkpoint:
        """`checkpoint` with its blocks cut too: they may lack parts and differ in width, which `BlockStream` knows."""
        if not self.pruning.needs_text:
            return self.checkpoint
        tensors = {name: cut for name, tensor in self.checkpoint.tensors.items()
                   if (cut := self._cut(name, tensor)) is not None}  # fmt: skip
        return dataclasses.replace(self.checkpoint, tensors=tensors, changes=self._digest())

    def _cut(self, name: str, tensor: Tensor) -> Tensor | None:
        """What is left of a tensor; None where that is nothing."""
        place = name.split(".")
        if place[:2] != ["model", "layers"] or place[3] not in ("self_attn", "mlp"):
            return tensor
        layer, mlp, leaf = int(place[2]), place[3] == "mlp", place[4]
        if Sublayer(layer, mlp) in self.cuts.removed:
            return None
        if (refitted := self.cuts.weights.get(name)) is not None:
            return refitted
        kept = (self.cuts.channels if mlp else self.cuts.groups).get(layer)
        if kept is None or not leaf.endswith("_proj"):
            return tensor
        if leaf in ("down_proj", "o_proj"):
            return select(tensor, columns=kept if mlp else self._features(kept, tensor.shape[1]))
        return select(tensor, rows=kept if mlp else self._features(kept, tensor.shape[0]))

    def _features(self, groups: Indices, width: int) -> Indices:
        """Those of key-value groups among `width`, of queries or of keys and values."""
        config = self.whole.config
        unit = width // int(config.get("num_key_value_heads") or config["num_attention_heads"])
        return (groups[:, None] * unit + np.arange(unit)).reshape(-1)

    def _digest(self) -> str:
        cuts = self.cuts
        found = hashlib.sha256(f"{self.checkpoint.changes} {sorted(cuts.removed)}".encode())
        for kind in (cuts.channels, cuts.groups):
            for layer, kept in sorted(kind.items()):
                found.update(f" {layer} ".encode() + kept.tobytes())
        for name, weight in sorted(cuts.weights.items()):
            found.update(name.encode() + weight.read().tobytes())
        return found.hexdigest()


def prune(
    checkpoint: Checkpoint,
    recipe: Recipe,
    pruning: Pruning,
    target: str,
    calibrate: Calibrate,
    report: Report = lambda line: None,
) -> Pruned:
    """Decide what goes and fit what stays. `recipe` and `target` say what takes how long, for `auto`.

    Raises DsoptError where that cannot be done.
    """
    if pruning.needs_text:
        check_prunable(checkpoint)
    vocabulary, automatic = None, None
    if pruning.auto:
        automatic = _choose(checkpoint, recipe, pruning, target, calibrate, report)
        vocabulary = automatic.vocabulary
    elif pruning.vocab:
        report("choosing tokens")
        vocabulary = choose_vocabulary(checkpoint.files["tokenizer.json"], pruning.read_corpus(), pruning.tokens)
    smaller = prune_vocabulary(checkpoint, vocabulary) if vocabulary else checkpoint
    cuts = _cuts(checkpoint, pruning, automatic, calibrate, report)
    return Pruned(pruning, checkpoint, smaller, vocabulary, cuts)


def _choose(
    checkpoint: Checkpoint, recipe: Recipe, pruning: Pruning, target: str, calibrate: Calibrate, report: Report
) -> Choice:
    if target != "cpu":
        raise DsoptError(f"--prune auto: kernels are timed on the cpu alone so far, the target is {target}; "
                         "name what to remove, as blocks=3")  # fmt: skip
    config = find_family(checkpoint.config.get("model_type")).Config.from_dict(checkpoint.config)
    windows = calibrate(checkpoint)
    report("timing kernels")
    return choose(checkpoint, pruning, measure_times(config, recipe, target), windows, report)


def _cuts(whole: Checkpoint, pruning: Pruning, automatic: Choice | None, calibrate: Calibrate, report: Report) -> Cuts:
    """Blocks do not know the vocabulary: they are judged and repaired with the whole one."""
    if automatic is None:
        return decide(whole, pruning, calibrate(whole), report) if pruning.needs_text else Cuts()
    if not automatic.removed:
        return Cuts()
    return decide(whole, pruning, calibrate(whole), report, removed=automatic.removed, steps=automatic.steps)
