"""The header of a GGUF file: its metadata and where its tensors lie.

Written here, on the `gguf` package's tables, because that package's reader takes seconds for a vocabulary (it
makes an array per token) and does not end on a header with absurd counts. Layout: ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from dsopt.runtime.errors import DsoptError

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# Far above any real header (a vocabulary of 262 144 with its merges has 1.3 million entries).
_MOST_ITEMS = 1 << 24
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Entry:
    """A tensor as the file describes it: shape outermost first, `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]


class _Malformed(Exception):
    pass


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file, version 2 or 3, little-endian.

    Raises DsoptError when it is not one, is cut short, or contradicts itself.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data).header()
    except OSError as error:
        raise DsoptError(f"{path} could not be read ({error.strerror})") from error
    except (_Malformed, ValueError) as error:
        raise DsoptError(f"{path} is not a readable GGUF file: {error}") from error


class _Parser:
    """A cursor over the bytes; every step is checked against the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.items = data, 0, 0

    def header(self) -> Header:
        if self.take(4) != b"GGUF":
            raise _Malformed("it does not begin with the letters GGUF")
        version = self.unpack("I")
        if version not in (2, 3):
            raise _Malformed(f"version {version} (big-endian, or not known); little-endian 2 and 3 are read")
        tensor_count, metadata_count = self.unpack("Q"), self.unpack("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.bounded(metadata_count)):
            key = self.string()
            if key in metadata:
                raise _Malformed(f"the key {key!r} stands twice in it")
            metadata[key] = self.value(self.kind())
        infos = [self.tensor_info() for _ in range(self.bounded(tensor_count))]
        return Header(metadata, self.place(infos, metadata.get("general.alignment", 32)))

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _Malformed(f"cut short: {count} bytes wanted at {self.at} of {len(self.data)}; download it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def bounded(self, count: int) -> int:
        self.items += count
        if self.items > _MOST_ITEMS:
            raise _Malformed(f"a count of {count} entries at {self.at} cannot be right")
        return count

    def string(self) -> str:
        return self.take(self.unpack("Q")).decode()

    def kind(self) -> GGUFValueType:
        return GGUFValueType(self.unpack("I"))

    def value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.unpack(_SCALARS[kind])
        item, count = self.kind(), self.bounded(self.unpack("Q"))
        if item is GGUFValueType.ARRAY:
            raise _Malformed("it has an array of arrays, which nothing known here needs")
        if item is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        code = f"<{count}{_SCALARS[item]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dimensions = self.string(), self.unpack("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Malformed(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.unpack("Q") for _ in range(dimensions))
        if 0 in shape:
            raise _Malformed(f"tensor {name!r} is empty: its dimensions are {shape}")
        return name, shape[::-1], GGMLQuantizationType(self.unpack("I")), self.unpack("Q")

    def place(self, infos: list[Any], alignment: Any) -> dict[str, Entry]:
        """The absolute position of each tensor; the data begin at the next multiple of `alignment`."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _Malformed(f"general.alignment {alignment!r} is not a power of two")
        start = -(-self.at // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, shape, dtype, offset in infos:
            if name in entries:
                raise _Malformed(f"the tensor {name!r} stands twice in it")
            entries[name] = self.entry(name, shape, dtype, start + offset)
        return entries

    def entry(self, name: str, shape: tuple[int, ...], dtype: GGMLQuantizationType, offset: int) -> Entry:
        block, block_bytes = GGML_QUANT_SIZES[dtype]
        if shape[-1] % block:
            raise _Malformed(f"tensor {name!r}: rows of {shape[-1]} are no multiple of {dtype.name}'s block {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if (end := offset + nbytes) > len(self.data):
            raise _Malformed(f"cut short: tensor {name!r} ends at {end} of {len(self.data)}; download it again")
        return Entry(name, shape, dtype, offset, nbytes)
