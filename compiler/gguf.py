"""A GGUF file as a checkpoint: tensors dequantized by the `gguf` package, names as Hugging Face's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from dsopt.compiler.checkpoint import Checkpoint, Source, Tensor
from dsopt.compiler.gguf_config import Architecture, Metadata, find_architecture
from dsopt.compiler.gguf_header import Entry, Header, read_header
from dsopt.compiler.gguf_tokenizer import tokenizer_files
from dsopt.compiler.gguf_vocabulary import Vocabulary
from dsopt.runtime.errors import DsoptError

READABLE = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q5_0",
    "Q5_1",
    "Q4_0",
    "Q4_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)

FLOAT_TYPES = ("F32", "F16", "BF16")

_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """A tensor of a GGUF file, its rows in Hugging Face's order.

    `head_dim` is set where llama.cpp puts the rows i and i + head_dim / 2 of each head side by side.
    """

    path: Path
    offset: int
    head_dim: int | None = None

    def raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The stored bytes of rows start:stop, uint8 [rows, bytes of a row]."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if self.head_dim is None:
            return self._stored(start, max(start, stop))
        first = start // self.head_dim * self.head_dim
        last = -(-stop // self.head_dim) * self.head_dim
        return self._stored(first, max(first, last))[_interleaved(np.arange(start, stop), self.head_dim) - first]

    def _stored(self, start: int, stop: int) -> np.ndarray:
        row = self.nbytes // self.shape[0]
        count = (stop - start) * row
        data = np.fromfile(self.path, np.uint8, count, offset=self.offset + start * row)
        if data.size != count:
            raise DsoptError(f"{self.path} was cut short after it was opened: tensor {self.name} is not all there")
        return data.reshape(stop - start, row)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        stored = self.raw(start, stop).reshape(stop - start, *self.shape[1:-1], -1)
        return dequantize(stored, GGMLQuantizationType[self.dtype]).reshape(stop - start, *self.shape[1:])


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp keeps these rows: within a head, row p * head_dim / 2 + i stands at 2 * i + p."""
    head, within = np.divmod(rows, head_dim)
    part, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + part


def open_gguf(path: Path, *, kind: str, name: str) -> Checkpoint:
    """Open a GGUF file without reading a weight.

    Raises DsoptError for: a file that is none or is damaged, an architecture, tensor type or tokenizer that
    is not known here.
    """
    header = read_header(path)
    try:
        config, tensors = _translate(path, header)
        vocabulary = Vocabulary.from_metadata(header.metadata)
        files = tokenizer_files(vocabulary, header.metadata)
        if len(vocabulary.tokens) > config["vocab_size"]:
            raise DsoptError(f"{len(vocabulary.tokens)} tokens, but embeddings for {config['vocab_size']}")
    except DsoptError as error:
        raise DsoptError(f"{path}: {error}") from error
    config |= {f"{role}_token_id": token for role, token in vocabulary.roles.items()}
    return Checkpoint(Source(kind, name, path, content=(path,)), config, tensors, files)


def _translate(path: Path, header: Header) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name, architecture = find_architecture(header)
    factors = None
    if (entry := header.tensors.get(_ROPE_FACTORS)) is not None:
        factors = _declare(path, _ROPE_FACTORS, entry, None).read()
    config = architecture.config(Metadata(header, name), header, factors)
    tensors: dict[str, Tensor] = {
        renamed.name: renamed
        for entry in header.tensors.values()
        if entry.name != _ROPE_FACTORS
        for renamed in [_declare(path, architecture.rename(entry.name), entry, _head_dim(architecture, entry, config))]
    }
    return config, tensors


def _head_dim(architecture: Architecture, entry: Entry, config: Mapping[str, Any]) -> int | None:
    """Set for a projection whose rows are interleaved."""
    if not any(f".{part}." in entry.name for part in architecture.permuted):
        return None
    head_dim = int(config["head_dim"])
    if head_dim < 2 or head_dim % 2 or entry.shape[0] % head_dim:
        raise DsoptError(f"tensor {entry.name!r} has {entry.shape[0]} rows, which are no heads of {head_dim}")
    return head_dim


def _declare(path: Path, name: str, entry: Entry, head_dim: int | None) -> GgufTensor:
    if entry.dtype.name not in READABLE:
        raise DsoptError(f"tensor {entry.name!r} is stored as {entry.dtype.name}; read are {', '.join(READABLE)}")
    if entry.nbytes % entry.shape[0]:
        raise DsoptError(f"tensor {entry.name!r} is a vector stored in blocks ({entry.dtype.name}), which is not read")
    return GgufTensor(name, entry.shape, entry.dtype.name, entry.nbytes, path, entry.offset, head_dim)
