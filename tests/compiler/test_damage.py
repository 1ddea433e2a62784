"""Damage to an artifact is found when it is opened."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsopt.runtime.artifact import FORMAT, Artifact, open_artifact
from dsopt.runtime.errors import DsoptError


@pytest.fixture
def out(build_tiny: Callable[..., Artifact]) -> Path:
    return build_tiny("none").directory


def flip(path: Path, offset: int) -> None:
    """One bit, and the times put back: only the change time tells."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json", "genai_config.json"])
def test_a_flipped_bit_is_found(name: str, out: Path) -> None:
    open_artifact(out)  # hashes are known by now
    flip(out / name, (out / name).stat().st_size // 2)
    with pytest.raises(DsoptError, match=f"{name}: changed"):
        open_artifact(out)


def test_a_longer_and_a_missing_file_are_found(out: Path) -> None:
    with (out / "model.onnx.data").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DsoptError, match="changed"):
        open_artifact(out)
    (out / "model.onnx.data").unlink()
    with pytest.raises(DsoptError, match=r"model\.onnx\.data: missing"):
        open_artifact(out)
    shutil.rmtree(out)
    with pytest.raises(DsoptError, match="no such directory"):
        open_artifact(out)


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: {**manifest, **fields}


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a later format": (changed(format=FORMAT + 1), f"artifact format {FORMAT + 1}"),
    "no format": (lambda m: {k: v for k, v in m.items() if k != "format"}, "not a dsopt manifest"),
    "a list": (lambda m: [m], "not a dsopt manifest"),
    "an unknown field": (changed(color="red"), "unknown fields.*color"),
    "a missing field": (lambda m: {k: v for k, v in m.items() if k != "eos"}, "missing.*eos"),
    "null for a list": (changed(eos=None), "eos"),
    "a list for the files": (changed(files=["model.onnx"]), "files"),
    "a file without its hash": (changed(files={"model.onnx": {"bytes": 3}}), "model.onnx"),
    "no graph among the files": (changed(files={}), "model.onnx"),
    "a number for the name": (changed(name=3), "name is not a text"),
    "an empty model": (changed(model={}), "model is not an object with layers"),
    "a text for a size": (lambda m: {**m, "model": {**m["model"], "vocab_size": "many"}}, "model is not"),
    "true for a size": (lambda m: {**m, "model": {**m["model"], "layers": True}}, "model is not"),
    "a text for an end token": (changed(eos=["257"]), "eos is not a list"),
    "a text for a node": (changed(nodes=["q_proj"]), "nodes is not a list"),
    "a node without its bytes": (lambda m: {**m, "nodes": [{**m["nodes"][0], "bytes": None}]}, "nodes.0. is not"),
    "a source without its hash": (changed(source={"kind": "gguf", "name": "x"}), "source is not"),
}


@pytest.mark.parametrize(("change", "what"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_is_none_is_one_line(change: Callable[[dict[str, Any]], Any], what: str, out: Path) -> None:
    path = out / "dsopt.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DsoptError, match=what) as caught:
        open_artifact(out)
    assert "\n" not in str(caught.value)


def test_a_cut_manifest_is_one_line(out: Path) -> None:
    path = out / "dsopt.json"
    for data in (path.read_bytes()[:100], b"", b"\xff\xfe"):
        path.write_bytes(data)
        with pytest.raises(DsoptError, match="not a dsopt manifest"):
            open_artifact(out)


def test_an_artifact_may_be_moved(out: Path) -> None:
    moved: Artifact = open_artifact(out.rename(out.with_name("elsewhere")))
    assert moved.size == sum((moved.directory / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
