"""One view of a model checkpoint, wherever it comes from: config, tokenizer files, lazy tensors by name."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.files import sha256_file

Progress = Callable[[str], None]

_CHUNK_ELEMENTS = 1 << 22
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Tensor(ABC):
    """A weight, read when asked for. `dtype` and `nbytes` are as stored: "BF16", or a ggml type as "Q4_1"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @abstractmethod
    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start:stop in any float type."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of axis 0 as float32, C-contiguous; nothing else is read. A scalar is read whole.

        Converted a piece at a time, so that beside the result only a few megabytes are held.
        """
        if not self.shape:
            return np.asarray(self._rows(0, 1), np.float32).reshape(())
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        out = np.empty((max(stop - start, 0), *self.shape[1:]), np.float32)
        step = max(1, _CHUNK_ELEMENTS // max(1, int(np.prod(self.shape[1:], dtype=np.int64))))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self._rows(first, last)
        return out


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from. `name` is short and good for a directory's name."""

    kind: str
    name: str
    path: Path
    content: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the one file, or of the names and SHA-256s of several. Computed when first asked for."""
        if len(self.content) == 1:
            return sha256_file(self.content[0])
        lines = sorted(f"{path.name} {sha256_file(path)}\n" for path in self.content)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


_BIAS = re.compile(r"model\.layers\.\d+\..*_proj\.bias|lm_head\.bias")


@dataclass(frozen=True)
class Checkpoint:
    """`config` and the names of `tensors` are Hugging Face's; `files` always has tokenizer.json.

    `lm_head.weight` may be absent when the embeddings are tied. `files` may also have tokenizer_config.json,
    chat_template.jinja and generation_config.json. `changes` is a digest of what was taken from it since it was read.
    """

    source: Source
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes]
    left_out: tuple[str, ...] = ()  # tensors of the file that belong to parts other than the text decoder
    changes: str = ""

    @property
    def fingerprint(self) -> str:
        """Of weights and tokens as they are: what is learnt about them is kept under it."""
        if not self.changes:
            return self.source.sha256
        return hashlib.sha256(f"{self.source.sha256} {self.changes}".encode()).hexdigest()

    def check_no_biases(self) -> None:
        """Raises DsoptError where linear layers have biases, which the eager models would leave out silently."""
        found = [name for name in self.tensors if _BIAS.fullmatch(name)]
        if found:
            raise DsoptError(f"{self.source.path}: linear layers with a bias are not supported: {found[0]}"
                             f"{f' and {len(found) - 1} more' * (len(found) > 1)}")  # fmt: skip


def open_checkpoint(model: str, progress: Progress | None = None) -> Checkpoint:
    """Open a directory, a `.gguf` file, a built-in name or a hub id ("org/name"), in this order.

    `progress` is told of downloads. Raises DsoptError, one line, when the checkpoint is missing, damaged or
    of a kind that is not read.
    """
    from dsopt.compiler import builtin

    path = Path(model).expanduser()
    if model and path.is_dir():
        return _tell_left_out(_open_directory(path), progress)
    if model and path.exists():
        return _open_file(path)
    if model in builtin.MODELS:
        from dsopt.compiler.gguf import open_gguf

        return open_gguf(builtin.fetch(model, progress), kind="builtin", name=model)
    if _HUB_ID.fullmatch(model):
        from dsopt.compiler.hub import open_hub

        return _tell_left_out(open_hub(model), progress)
    raise DsoptError(
        f"no model {model!r}: not a file or directory here; works: a Hugging Face directory, a .gguf file, "
        f"a hub id such as org/name, or a built-in name ({', '.join(builtin.MODELS)})"
    )


def _open_directory(path: Path) -> Checkpoint:
    from dsopt.compiler.safetensors_dir import open_safetensors_dir

    if not (path / "config.json").exists() and (found := sorted(path.glob("*.gguf"))):
        raise DsoptError(f"{path} has no config.json but GGUF files; name one of them, as {found[0]}")
    return open_safetensors_dir(path, kind="huggingface", name=path.resolve().name)


def _tell_left_out(checkpoint: Checkpoint, progress: Progress | None) -> Checkpoint:
    if checkpoint.left_out and progress:
        parts = sorted({name.removeprefix("model.").partition(".")[0] for name in checkpoint.left_out})
        progress(f"text only: {len(checkpoint.left_out)} tensors of {', '.join(parts)} are left out")
    return checkpoint


def _open_file(path: Path) -> Checkpoint:
    from dsopt.compiler.gguf import open_gguf

    if path.suffix == ".safetensors":
        raise DsoptError(f"{path} holds weights alone; name its directory, which has config.json and tokenizer.json")
    return open_gguf(path, kind="gguf", name=path.stem)
