"""What pruning freed and what that costs: each kind's exchange rate, for the manifest and for people."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsopt.compiler.pruning.decide import Cuts

Node = Mapping[str, Any]  # an entry of the manifest's `nodes`
_ATTENTION = ("q", "k", "v", "o")


def describe_pruning(text: str, before: Iterable[Node], after: Iterable[Node], cuts: Cuts, vocab: Node) -> Node:
    """The manifest's `pruning`: text of the options, layers kept, steps by kind, the divergence after the repair.

    before, after: linear layers without and with pruning, the first with the head over the whole vocabulary. A step's
    `freed` is its share of the bytes that a step of one token reads, nearly its share of the time, which is `time`
    where kernels were timed; its `kld` what it was expected to cost in nats before the repair, with `kld_per_percent`
    of the time or else of `freed`.
    """
    old, new = ({node["name"]: node for node in nodes if node["role"] != "embed"} for nodes in (before, after))
    total = sum(node["bytes"] for node in old.values())
    freed = dict.fromkeys(cuts.steps, 0) | ({"vocab": 0} if vocab else {})
    for name, node in old.items():
        if left := node["bytes"] - (new[name]["bytes"] if name in new else 0):
            freed[_kind(node, cuts, gone=name not in new)] += left
    facts = {**({"vocab": vocab} if vocab else {}), **cuts.steps}
    steps = [{"kind": kind, **facts[kind], **_rate(facts[kind], freed[kind] / total)} for kind in freed]
    kept = _kept_layers(new.values()) if cuts.steps else None
    return {"text": text, "layers": kept, "steps": steps, "kld_repaired": cuts.kld}


def _kind(node: Node, cuts: Cuts, *, gone: bool) -> str:
    if gone:
        layers = cuts.steps.get("layers", {"removed": ()})["removed"]
        return "layers" if node["layer"] in layers else "blocks"
    if node["role"] == "head" and "head" in cuts.steps:
        return "head"
    return "vocab" if node["role"] == "head" else "kv" if node["role"] in _ATTENTION else "ffn"


def _rate(facts: Node, share: float) -> dict[str, float]:
    bought = facts.get("time", share)
    rate = {"kld_per_percent": facts["kld"] / (100 * bought)} if bought and "kld" in facts else {}
    return {"freed": share, **rate}


def _kept_layers(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """For each layer that has something left: its number in the checkpoint, output features of q (0: no attention)
    and channels of the feed-forward (0: none)."""
    layers: dict[int, dict[str, Any]] = {}
    for node in nodes:
        if node["layer"] is not None:
            layer = layers.setdefault(node["layer"], {"layer": node["layer"], "attention": 0, "mlp": 0})
            if node["role"] in ("q", "up"):
                layer["attention" if node["role"] == "q" else "mlp"] = node["shape"][0]
    return list(layers.values())


def exchange_lines(pruning: Node) -> Iterator[str]:
    """A line a step, for a person."""
    for step in pruning["steps"]:
        cost = f", about {step['kld']:.3f} nats" if "kld" in step else ""
        rate = f" ({step['kld_per_percent']:.4f} a per cent)" if "kld_per_percent" in step else ""
        if step["kind"] == "vocab":
            cost = (
                f", {step['tokens']} of {step['of']} tokens kept, {100 * step['dropped_share']:.2g} % of text affected"
                + (f"; {step['alike']} would do for text just like it" if "alike" in step else "")
            )
        if step["kind"] == "head":
            cost = f", which says {step['tokens']} of {step['of']} tokens"
        yield f"pruned {step['kind']}: {100 * step['freed']:.1f} % of the weights of a step{cost}{rate}"
    if pruning["kld_repaired"] is not None:
        yield f"after the repair {pruning['kld_repaired']:.3f} nats in all, on calibration text"
