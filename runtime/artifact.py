"""The artifact: a directory that onnxruntime-genai loads unchanged, and `dsopt.json`, the manifest of how it was made.

The manifest is the contract between compiler and runtime; its format belongs to the reader, so it stands here and
the compiler writes through it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import sha256_file

FORMAT = 3
MANIFEST = "dsopt.json"
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"

Fields = Mapping[str, type]
_TEXTS: Fields = dict.fromkeys(("name", "recipe", "target", "family"), str)
_OBJECTS: dict[str, Fields] = {
    "source": dict.fromkeys(("kind", "name", "sha256"), str),
    "model": dict.fromkeys(
        ("layers", "hidden_size", "heads", "kv_heads", "head_dim", "vocab_size", "context_length", "parameters"), int
    ),
    "files": {},
    "versions": {},
}
_NODE: Fields = {"name": str, "role": str, "format": str, "shape": list, "bytes": int}
_FILE: Fields = {"bytes": int, "sha256": str}
_NAMES = {str: "text", int: "integer", list: "list", dict: "object"}


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and how it came to be.

    `nodes` has one entry a linear layer, in graph order, and one for the embedding: name, role, layer (an index,
    None for head and embedding), shape, format, bytes.
    """

    name: str  # the checkpoint's short name
    recipe: str
    target: str  # execution provider it was made for: cpu
    family: str
    source: Mapping[str, str]  # kind, name, sha256 of the checkpoint
    # layers, hidden_size, heads, kv_heads, head_dim, vocab_size, context_length, parameters; `cache` is int8 or fp8
    # where keys and values are no floats of the graph's type. Where layers have caches
    # of several shapes also `caches`, [kv_heads, head_dim] of each: kv_heads and head_dim are then the first layer's.
    model: Mapping[str, Any]
    bos: int | None
    eos: tuple[int, ...]
    nodes: tuple[Mapping[str, Any], ...]  # name, role, layer, shape, format, bytes
    files: Mapping[str, Mapping[str, Any]]  # by file name: bytes, sha256
    versions: Mapping[str, str]
    quality: Mapping[str, Any] | None = None  # measured loss against the checkpoint
    speed: Mapping[str, Any] | None = None
    profile: Mapping[str, Any] | None = None  # kernel times of the machine it was made for
    search: Mapping[str, Any] | None = None  # goal, rounds and what else could have been chosen
    pruning: Mapping[str, Any] | None = None  # what was removed: text, layers kept, steps, divergence after the repair
    drafters: tuple[str, ...] = ()  # directories in this one
    taps: tuple[int, ...] = ()  # layers whose outputs the graph gives, for drafters that read them
    format: int = field(default=FORMAT)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: Path) -> "Manifest":
        """Raises DsoptError when the data is no manifest or of another format version."""
        try:
            raw = json.loads(data)
            version = raw["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DsoptError(f"{where}: not a dsopt manifest ({error!r}); compile the model again") from error
        if version != FORMAT:
            raise DsoptError(f"{where}: artifact format {version}, this dsopt reads {FORMAT}; compile the model again")
        names = {f.name for f in fields(cls)}
        if names != set(raw):
            odd = ", ".join(sorted(names ^ set(raw)))
            raise DsoptError(f"{where}: manifest with missing or unknown fields ({odd}); compile the model again")
        _check_values(raw, where)
        return cls(**{**raw, **{name: tuple(raw[name]) for name in ("eos", "nodes", "drafters", "taps")}})


def _check_values(raw: Mapping[str, Any], where: Path) -> None:
    for name in _TEXTS:
        _require(_has(raw, {name: str}), name, "a text", where)
    for name, inner in _OBJECTS.items():
        _require(_has(raw[name], inner), name, f"an object{_listed(inner)}", where)
    caches = raw["model"].get("caches", [])
    good = isinstance(caches, list) and all(
        isinstance(cache, list) and [type(size) for size in cache] == [int, int] for cache in caches
    )
    _require(good and len(caches) in (0, raw["model"]["layers"]), "caches", "a list of two integers a layer", where)
    for name, kind in (("eos", int), ("nodes", dict), ("drafters", str), ("taps", int)):
        good = isinstance(raw[name], list) and all(type(value) is kind for value in raw[name])
        _require(good, name, f"a list ({_NAMES[kind]} each)", where)
    _require(raw["bos"] is None or type(raw["bos"]) is int, "bos", "an integer or null", where)
    for number, node in enumerate(raw["nodes"]):
        _require(_has(node, _NODE), f"nodes[{number}]", f"an object{_listed(_NODE)}", where)
    for name in (GRAPH, WEIGHTS, *raw["files"]):
        _require(_has(raw["files"].get(name), _FILE), name, f"among the files{_listed(_FILE)}", where)


def _has(value: object, wanted: Fields) -> bool:
    """Whether `value` is an object with these fields of exactly these types: true is no integer."""
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in wanted.items())


def _listed(wanted: Fields) -> str:
    return " with " + ", ".join(f"{name} ({_NAMES[kind]})" for name, kind in wanted.items()) if wanted else ""


def _require(good: bool, name: str, what: str, where: Path) -> None:
    if not good:
        raise DsoptError(f"{where}: {name} is not {what}; compile the model again")


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk."""

    directory: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        return self.directory / GRAPH

    @property
    def size(self) -> int:
        """Bytes of graph and weights."""
        return sum(int(self.manifest.files[name]["bytes"]) for name in (GRAPH, WEIGHTS))

    def text(self, name: str) -> str | None:
        """A text file of the artifact (`chat_template.jinja`), or None where there is none."""
        path = self.directory / name
        return path.read_text(encoding="utf-8") if path.is_file() else None


def open_artifact(directory: Path) -> Artifact:
    """Read and check an artifact: its format, and that each file still has the content it was written with.

    Raises DsoptError naming the file that is missing or has changed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        what = "no such directory" if not directory.exists() else f"no {MANIFEST} in it"
        raise DsoptError(f"{directory}: not a compiled model ({what}); make one with: dsopt compile MODEL -o DIR")
    manifest = Manifest.from_json(path.read_bytes(), path)
    for name, entry in manifest.files.items():
        _check_file(directory / name, entry)
    return Artifact(directory, manifest)


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise DsoptError(f"{path}: missing from the artifact; compile the model again")
    if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
        raise DsoptError(f"{path}: changed since it was compiled (its hash differs); compile the model again")
