"""The decisions: what goes, and new last weights for what stays, fitted to give the dense model's hidden states."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsopt.compiler.checkpoint import Checkpoint
from dsopt.compiler.checkpoint import Tensor as Weight
from dsopt.compiler.pruning.depth import choose_removals
from dsopt.compiler.pruning.obs import eliminate, known_damp
from dsopt.compiler.pruning.options import Pruning
from dsopt.compiler.pruning.refit import HELD_OUT, Fit, Loss, Streams, refit_sublayers
from dsopt.compiler.pruning.sensitivity import measure_sensitivity
from dsopt.compiler.pruning.stream import Stream, Sublayer, batches, divergence
from dsopt.compiler.pruning.tensors import spill
from dsopt.compiler.pruning.widths import BLOCK, Removal, allocate, group_sizes
from dsopt.compiler.self_text import Windows
from dsopt.runtime.errors import DsoptError

Report = Callable[[str], None]
_SCORED = 1024  # tokens on which removed blocks are judged: each candidate runs them through the rest of the model
_FEW = 4  # where more than that is to go, every candidate is judged on half the tokens
_FELT = 2048  # tokens of the sensitivities
_SEEN = 8192  # tokens of the channels' first statistics, which decide the widths


@dataclass(frozen=True)
class Cuts:
    """removed: sublayers that go. channels: of a layer's feed-forward, those kept. groups: its key-value groups kept.

    weights: last weights (o_proj, down_proj) of sublayers, already without the columns that go, by name.
    steps: by kind of pruning, what was removed and what it is thought to cost before any repair (`kld`, nats).
    kld: KL(dense || pruned and repaired) in nats on windows that the repair did not see; None where nothing was cut.
    """

    removed: frozenset[Sublayer] = frozenset()
    channels: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    groups: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kld: float | None = None


def decide(
    checkpoint: Checkpoint,
    pruning: Pruning,
    windows: Windows,
    report: Report = lambda line: None,
    *,
    removed: frozenset[Sublayer] = frozenset(),
    steps: Mapping[str, Mapping[str, Any]] | None = None,
) -> Cuts:
    """Choose and repair by calibration text: windows of token ids, all of one length.

    `removed` are blocks of which it is decided already that they go, `steps` what is known of that.

    Raises DsoptError where more is to go than there is. Memory: one block, and the hidden states of the windows
    about four times over.
    """
    stream = Stream(checkpoint)
    check_fits(pruning, stream.config)
    decision = _Decision(stream, pruning, stream.embed(windows), report)
    decision.removed = removed
    decision.steps |= {kind: dict(facts) for kind, facts in (steps or {}).items()}
    return decision.make()


def check_fits(pruning: Pruning, config: Any) -> None:
    """Raises DsoptError where more is to be removed than a model has; at least one layer and group stays."""
    layers, groups = config.num_hidden_layers, config.num_key_value_heads
    if pruning.layers >= layers:
        raise DsoptError(f"--prune layers={pruning.layers}: the model has {layers} layers; fewer than that can go")
    if pruning.blocks >= 2 * (layers - pruning.layers) - 1:
        raise DsoptError(f"--prune blocks={pruning.blocks}: {2 * (layers - pruning.layers)} are left, two must stay")
    if pruning.kv >= groups:
        raise DsoptError(f"--prune kv={pruning.kv}: a layer has {groups} key-value groups; fewer than that can go")


class _Decision:
    def __init__(self, stream: Stream, pruning: Pruning, x: Tensor, report: Report) -> None:
        self.stream, self.pruning, self.x, self.report = stream, pruning, x, report
        self.removed: frozenset[Sublayer] = frozenset()
        self.losses: dict[Sublayer, Loss] = {}
        self.steps: dict[str, dict[str, Any]] = {}

    def make(self) -> Cuts:
        self.report("measuring how much each block matters")
        self.felt, dense = measure_sensitivity(self.stream, self._some(_FELT))
        if self.pruning.layers or self.pruning.blocks:
            self.report("choosing blocks to remove")
            self._remove_blocks(dense)
        if self.pruning.ffn:
            self.report("choosing feed-forward channels to remove")
            self._remove_channels()
        self._remove_groups()
        self.report("repairing what stays")
        return self._repair()

    def _some(self, tokens: int) -> Tensor:
        return self.x[: max(1, tokens // self.x.shape[1])]

    def _remove_blocks(self, dense: Tensor) -> None:
        many = max(self.pruning.layers, self.pruning.blocks) > _FEW
        x = self._some(_SCORED // 2 if many else _SCORED)
        estimates = {sublayer: felt.removal for sublayer, felt in self.felt.items()}
        for name, count in (("layers", self.pruning.layers), ("blocks", self.pruning.blocks)):
            if not count:
                continue
            chosen, after = choose_removals(
                self.stream, x, dense[: len(x)], estimates, count,
                whole=name == "layers", removed=self.removed, weigh=self.stream.parameters,
            )  # fmt: skip
            self.removed = self.removed.union(*chosen)
            before = self.steps.get("layers", {}).get("kld", 0.0)
            gone = [min(group).layer if name == "layers" else str(min(group)) for group in chosen]
            self.steps[name] = {"removed": gone, "kld": after - before}

    def _remove_channels(self) -> None:
        """Curves of error over width from the dense stream, then widths; which channels go is chosen at the repair."""
        x, width, curves = self._some(_SEEN), 0, {}
        most = min(1.0, 3 * self.pruning.ffn)
        for sublayer in self.stream.sublayers:
            weight = self.stream.weight(sublayer)
            features, added = map(
                torch.cat, zip(*(self.stream.run(sublayer, part) for part in batches(x)), strict=True)
            )
            x = x + added
            if sublayer.mlp and sublayer not in self.removed:
                h = (features * self.felt[sublayer].weigh(x).sqrt()).flatten(0, 1)
                gram = (h.T @ h).double() / len(h)
                width += len(gram)
                damp = known_damp(len(gram), len(h))
                groups = eliminate(gram, weight, self.felt[sublayer].metric, group_sizes(len(gram)), damp)
                groups = itertools.islice(groups, max(1, round(most * len(gram) / BLOCK)))
                curves[sublayer.layer] = [Removal(channels, cost / 2) for channels, cost in groups]
        taken = allocate(curves, round(self.pruning.ffn * width))
        for layer, count in taken.items():
            if channels := sum(len(removal.channels) for removal in curves[layer][:count]):
                self.losses[Sublayer(layer, True)] = Loss(channels)
        cost = sum(removal.cost for layer, count in taken.items() for removal in curves[layer][:count])
        self.steps["ffn"] = {"kld": cost}

    def _remove_groups(self) -> None:
        config, count = self.stream.config, self.pruning.kv
        unit = config.num_attention_heads // config.num_key_value_heads * config.head_dim
        for sublayer in self.stream.sublayers if count else []:
            if not sublayer.mlp and sublayer not in self.removed:
                self.losses[sublayer] = Loss(count * unit, unit)

    def _repair(self) -> Cuts:
        fits: dict[Sublayer, Fit] = {}
        weights = {}
        streams = Streams(self.x, self.x)
        for sublayer, fit in refit_sublayers(self.stream, streams, self.removed, self.losses, self.felt):
            weights[sublayer.weight] = spill(sublayer.weight, fit.weight.numpy())
            fits[sublayer] = dataclasses.replace(fit, weight=torch.empty(0))
        if self.pruning.kv:
            cost = sum(fit.cost for sublayer, fit in fits.items() if not sublayer.mlp)
            self.steps["kv"] = {"removed": self.pruning.kv, "kld": cost}
        held = slice(HELD_OUT - 1, None, HELD_OUT) if len(self.x) >= HELD_OUT else slice(None)
        total = divergence(self.stream.head(), streams.dense[held], streams.pruned[held])
        return Cuts(
            removed=self.removed,
            channels={s.layer: fit.kept.numpy() for s, fit in fits.items() if s.mlp and fit.kept is not None},
            groups={s.layer: self._groups(fit.kept) for s, fit in fits.items() if not s.mlp and fit.kept is not None},
            weights=weights,
            steps=self.steps,
            kld=total,
        )

    def _groups(self, kept: Tensor) -> NDArray[np.int64]:
        config = self.stream.config
        unit = config.num_attention_heads // config.num_key_value_heads * config.head_dim
        return (kept[::unit] // unit).numpy()
