"""dsopt inspect: what a checkpoint, a GGUF file or a compiled model is, and what was done to it."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsopt.cli import report
from dsopt.cli.models import BUILT_IN
from dsopt.cli.progress import note
from dsopt.runtime.artifact import GRAPH, MANIFEST, WEIGHTS, Manifest
from dsopt.runtime.errors import DsoptError

if TYPE_CHECKING:
    from dsopt.compiler.checkpoint import Checkpoint

# The names of a manifest's `model`, and where a config.json has them.
_SIZES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}


def inspect_command(
    path: Annotated[
        str,
        typer.Argument(help="Compiled model, Hugging Face directory or hub id, GGUF file, or a built-in name."),
    ] = BUILT_IN,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Print what PATH is: sizes, bytes by type, tokenizer; of a compiled model also how it was made.

    Every file of a compiled model is hashed; exit code 1 when one is missing or has changed.
    """
    directory = Path(path).expanduser()
    if compiled := (directory / MANIFEST).is_file():
        facts = _artifact(directory)
    else:
        from dsopt.compiler.checkpoint import open_checkpoint

        facts = _checkpoint(open_checkpoint(path, progress=note))
    print(report.json_text(facts) if as_json else "\n".join(_lines(facts)))
    if compiled and (damaged := [name for name, state in facts["files"].items() if state != "ok"]):
        raise DsoptError(
            f"{directory}: {', '.join(damaged)} missing or changed since compiled; compile the model again"
        )


def _checkpoint(checkpoint: "Checkpoint") -> dict[str, Any]:
    from dsopt.compiler.models import families

    config, tensors = checkpoint.config, checkpoint.tensors.values()
    sizes = {name: config.get(field) for name, field in _SIZES.items()}
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    if sizes["head_dim"] is None and sizes["heads"] and sizes["hidden_size"]:
        sizes["head_dim"] = sizes["hidden_size"] // sizes["heads"]
    sized = [({"type": tensor.dtype}, math.prod(tensor.shape), tensor.nbytes) for tensor in tensors]
    return {
        "kind": checkpoint.source.kind,
        "name": checkpoint.source.name,
        "path": str(checkpoint.source.path),
        "architecture": config.get("model_type"),
        "supported": config.get("model_type") in families(),
        **sizes,
        "tied_embeddings": "lm_head.weight" not in checkpoint.tensors,
        **_totals(sum(weights for _, weights, _ in sized), sum(nbytes for _, _, nbytes in sized)),
        "types": _grouped(sized),
        "tokenizer": _tokenizer(checkpoint.files["tokenizer.json"]),
        "chat_template": "chat_template.jinja" in checkpoint.files,
    }


def _artifact(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    manifest = Manifest.from_json(path.read_bytes(), path)
    tokenizer = directory / "tokenizer.json"
    return {
        "kind": "artifact",
        "name": manifest.name,
        "path": str(directory),
        "architecture": manifest.family,
        "recipe": manifest.recipe,
        "target": manifest.target,
        "source": dict(manifest.source),
        **{name: manifest.model.get(name) for name in _SIZES},
        **{name: manifest.model[name] for name in ("caches", "cache") if name in manifest.model},
        **_compiled_totals(manifest),
        "tokenizer": _tokenizer(tokenizer.read_bytes()) if tokenizer.is_file() else None,
        "chat_template": "chat_template.jinja" in manifest.files,
        "versions": dict(manifest.versions),
        "quality": manifest.quality,
        "speed": manifest.speed,
        "drafters": list(manifest.drafters),
        "files": {name: _state(directory / name, entry) for name, entry in manifest.files.items()},
    }


def _compiled_totals(manifest: Manifest) -> dict[str, Any]:
    """Linear layers by role and format; the rest of the weight file is embeddings, norms and tables."""
    linears = [
        ({"role": node["role"], "format": node["format"]}, math.prod(node["shape"]), node["bytes"])
        for node in manifest.nodes
    ]
    stored = sum(int(manifest.files[name]["bytes"]) for name in (GRAPH, WEIGHTS) if name in manifest.files)
    return {
        **_totals(manifest.model["parameters"], stored),
        "other_bytes": stored - sum(nbytes for _, _, nbytes in linears),
        "linears": _grouped(linears),
    }


def _totals(parameters: int, nbytes: int) -> dict[str, Any]:
    bits = round(8 * nbytes / parameters, 3) if parameters else None
    return {"parameters": parameters, "bytes": nbytes, "bits_per_weight": bits}


def _grouped(tensors: Iterable[tuple[dict[str, str], int, int]]) -> list[dict[str, Any]]:
    """Sums of (kind, weights, bytes) for each kind, in order of appearance."""
    groups: dict[str, tuple[dict[str, str], list[int], list[int]]] = {}
    for kind, weights, nbytes in tensors:
        _, all_weights, all_bytes = groups.setdefault(str(kind), (kind, [], []))
        all_weights.append(weights)
        all_bytes.append(nbytes)
    return [
        {**kind, "tensors": len(weights), **_totals(sum(weights), sum(nbytes))}
        for kind, weights, nbytes in groups.values()
    ]


def _tokenizer(data: bytes) -> dict[str, Any]:
    """Kind and size of a tokenizer.json, read as JSON: whether it can be used is `generate`'s business."""
    try:
        tokenizer = json.loads(data)
        model = tokenizer["model"]
        tokens = {*model["vocab"]} if isinstance(model["vocab"], dict) else {text for text, _ in model["vocab"]}
        tokens |= {token["content"] for token in tokenizer.get("added_tokens", [])}
        kind = model.get("type", "BPE")
        if '"ByteLevel"' in json.dumps(tokenizer.get("decoder")):
            kind = f"byte-level {kind}"
        elif model.get("byte_fallback"):
            kind = f"{kind} with byte fallback"
        return {"kind": kind, "tokens": len(tokens)}
    except (ValueError, KeyError, TypeError) as error:
        raise DsoptError(f"tokenizer.json is no tokenizer ({error!r})") from error


def _state(path: Path, entry: Mapping[str, Any]) -> str:
    """Hashed anew: a remembered hash would not notice a bad disk."""
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "ok" if digest == entry["sha256"] else "changed"


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    simple = [(name, _text(name, value)) for name, value in facts.items() if not isinstance(value, list)]
    yield from report.aligned([row for row in simple if row[1]], left=2)
    for rows in (facts.get("types"), facts.get("linears")):
        if rows:
            yield ""
            names = len(rows[0]) - 4
            yield from report.aligned([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)], names)


def _text(name: str, value: Any) -> str:
    """A fact as one cell; empty where there is nothing to say."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "files":
        damaged = [f"{file} {state}" for file, state in value.items() if state != "ok"]
        return ", ".join(damaged) or f"{len(value)}, each with the hash it was written with"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if name == "parameters":
        return f"{value} ({report.count(value)})"
    if name.endswith("bytes"):
        return f"{value} ({report.size(value)})"
    return str(value)
