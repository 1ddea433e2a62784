"""The report of a search as one HTML page: loss against time with the chosen point, the rounds, a table per layer."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsopt.compiler.goal import Goal
from dsopt.runtime.artifact import Manifest
from dsopt.runtime.errors import DsoptError

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 56
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}svg text{font:12px system-ui,sans-serif;fill:#444}"""

Point = tuple[float, float]


def render(manifest: Manifest) -> str:
    """The page. Raises DsoptError on an artifact that no search made."""
    search, quality = manifest.search, manifest.quality
    if search is None or quality is None:
        raise DsoptError(f"{manifest.name} ({manifest.recipe}): made by a recipe, there is no search to report")
    parts = [
        f"<h1>{_text(manifest.name)}</h1>",
        f"<p>{_text(manifest.recipe)}: mean KL divergence {quality['kld_mean']:.4f} ± "
        f"{quality['kld_mean_err']:.4f} nats, "
        f"perplexity × {quality['ppl_ratio']:.4f}, same top token {quality['same_top_p']:.1f} %, "
        f"on {quality['tokens']} tokens that were not calibrated on.</p>",
        *_pruning(manifest, search),
        _plot(search),
        "<h2>Rounds</h2>",
        _table(("loss, nats", "expected", "ms", "MB", "formats", "cache"), map(_round, search["rounds"])),
        "<h2>What else there was</h2>",
        _table(("expected loss, nats", "ms", "MB", "formats", "cache"), map(_point, search["pareto"])),
        "<h2>Fixed recipes, by the same estimates</h2>",
        _table(
            ("recipe", "expected loss, nats", "ms", "MB"),
            ([name, *_point(made)[:3]] for name, made in search["uniform"].items()),
        ),
        "<h2>Layers</h2>",
        _table(("layer", "shape", "format", "smoothing", "MB", "expected loss of its site"), _nodes(manifest.nodes)),
    ]
    title = _text(f"dsopt: {manifest.name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"{''.join(parts)}</html>\n"
    )


def _pruning(manifest: Manifest, search: Mapping[str, Any]) -> Iterable[str]:
    if manifest.pruning:
        goal = Goal(**search["goal"])
        yield (
            f"<p>Pruned first ({_text(manifest.pruning['text'])}), which took {goal.said(search['pruned'])} of the "
            f"{goal.budget} allowed and is part of every loss below.</p>"
        )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["".join(f"<th>{_text(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{_text(value)}</td>" for value in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _formats(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {form}" for form, count in counts.items())


def _point(made: Mapping[str, Any]) -> list[str]:
    return [
        f"{made['loss']:.4f}",
        f"{1e3 * made['seconds']:.2f}",
        f"{made['bytes'] / 1e6:.1f}",
        _formats(made["formats"]),
        str(made["cache"]),
    ]


def _round(made: Mapping[str, Any]) -> list[str]:
    mark = " (chosen)" if made["chosen"] else ""
    return [f"{made['measured']:.4f}{mark}", *_point(made)]


def _nodes(nodes: Iterable[Mapping[str, Any]]) -> Iterable[list[str]]:
    for node in nodes:
        yield [
            node["name"],
            " × ".join(map(str, node["shape"])),
            node["format"],
            _folded(node),
            f"{node['bytes'] / 1e6:.2f}",
            f"{node['loss']:.6f}" if "loss" in node else "",
        ]


def _folded(node: Mapping[str, Any]) -> str:
    smoothing = "" if node.get("smoothing") is None else f"{node['smoothing']:g}"
    return f"{smoothing} rotated".strip() if node.get("rotated") else smoothing


def _plot(search: Mapping[str, Any]) -> str:
    """Loss (logarithmic) to the right, time upwards: the curve, fixed recipes as squares, the chosen one as a disc."""
    curve = [(made["loss"], made["seconds"]) for made in search["pareto"]]
    recipes = {name: (made["loss"], made["seconds"]) for name, made in search["uniform"].items()}
    chosen = [(made["measured"], made["seconds"]) for made in search["rounds"] if made["chosen"]]
    place = _scale([*curve, *recipes.values(), *chosen])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, curve))
    shapes = [f'<polyline points="{line}" fill="none" stroke="#36c" stroke-width="2"/>']
    for name, point in recipes.items():
        x, y = place(point)
        shapes.append(f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="#a44"/>')
        shapes.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{_text(name)}</text>')
    for point in chosen:
        x, y = place(point)
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="#2a2"/>')
        shapes.append(f'<text x="{x + 9:.1f}" y="{y - 6:.1f}">chosen, as measured</text>')
    shapes.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}">loss, nats a token (logarithmic)</text>')
    shapes.append(f'<text x="4" y="16">time of the linear layers for {_text(search["goal"]["workload"])}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(shapes)}</svg>'


def _scale(points: Sequence[Point]) -> Any:
    logs = [math.log(max(loss, 1e-7)) for loss, _ in points]
    times = [seconds for _, seconds in points]
    left, right, low, high = min(logs), max(logs), min(times), max(times)

    def place(point: Point) -> Point:
        x = (math.log(max(point[0], 1e-7)) - left) / ((right - left) or 1)
        y = (point[1] - low) / ((high - low) or 1)
        return _MARGIN + x * (_WIDTH - 3 * _MARGIN), _HEIGHT - _MARGIN - y * (_HEIGHT - 2 * _MARGIN)

    return place
