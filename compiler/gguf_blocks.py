"""GGUF's block formats that MatMulNBits can hold as they are: codes repacked, not one weight rounded again.

Layouts of ggml-common.h: within 32 weights of a nibble format byte i holds weights i and i + 16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dsopt.compiler.gguf import GgufTensor
from dsopt.compiler.quantizers import Blocks, affine_blocks
from dsopt.compiler.recipe import Format

Bytes = np.ndarray


@dataclass(frozen=True)
class _Layout:
    """`unpack` turns raw blocks uint8 [n, bytes] into codes [n, parts, block], scales and minima [n, parts].

    minima None: x = scale * (code - 2^(bits-1)).
    """

    form: Format
    bytes: int
    unpack: Callable[[Bytes], tuple[Bytes, Bytes, Bytes | None]]


def counterpart(dtype: str) -> Format | None:
    """The format that holds a GGUF type exactly, None where there is none."""
    layout = _LAYOUTS.get(dtype)
    return layout.form if layout else None


def repack(tensor: GgufTensor, start: int, stop: int) -> Blocks:
    """Rows start:stop in their exact counterpart. Scales are float32 copies of the file's float16 ones."""
    layout = _LAYOUTS[tensor.dtype]
    raw = tensor.raw(start, stop)
    codes, scales, minima = layout.unpack(raw.reshape(-1, layout.bytes))
    rows, block = len(raw), layout.form.block
    shaped = torch.from_numpy(np.ascontiguousarray(codes, np.uint8)).reshape(rows, -1, block)
    scale = torch.from_numpy(scales.astype(np.float32)).reshape(rows, -1)
    if minima is None:
        return Blocks(shaped, scale, torch.full_like(scale, 2 ** (layout.form.bits - 1), dtype=torch.uint8))
    return affine_blocks(shaped, scale, torch.from_numpy(minima.astype(np.float32)).reshape(rows, -1), 4)


def _half(raw: Bytes) -> Bytes:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """[n, b] -> [n, 2 b]: all low halves, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], 1)


def _q4_0(raw: Bytes) -> tuple[Bytes, Bytes, None]:
    return _nibbles(raw[:, 2:]), _half(raw[:, :2]), None


def _q4_1(raw: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    return _nibbles(raw[:, 4:]), _half(raw[:, :2]), _half(raw[:, 2:4])


def _q5_0(raw: Bytes) -> tuple[Bytes, Bytes, None]:
    """x = d * (q - 16), the fifth bits in 4 bytes; as 8 bits the code is q - 16 + 128."""
    fifth = np.unpackbits(raw[:, 2:6], axis=1, bitorder="little")
    return (_nibbles(raw[:, 6:]) | fifth << 4) + 112, _half(raw[:, :2]), None


def _q8_0(raw: Bytes) -> tuple[Bytes, Bytes, None]:
    return raw[:, 2:] ^ 128, _half(raw[:, :2]), None


def _q6_k(raw: Bytes) -> tuple[Bytes, Bytes, None]:
    """256 weights: 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, one float16 scale of them."""
    low, high = raw[:, :128].reshape(-1, 2, 2, 32), raw[:, 128:192].reshape(-1, 2, 32)
    parts = [
        (low[:, :, i % 2] >> 4 * (i // 2) & 15) | ((high >> 2 * i & 3) << 4)  # quarter i of each 128
        for i in range(4)
    ]
    codes = np.stack(parts, 2).reshape(-1, 16, 16) + 96  # q - 32 + 128
    scales = raw[:, 192:208].view(np.int8).astype(np.float32) * _half(raw[:, 208:210])
    return codes, scales, None


def _q4_k(raw: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """256 weights in 8 blocks: x = d * scale * q - dmin * min, with scale and min of 6 bits."""
    scales, minima = _six_bits(raw[:, 4:16])
    packed = raw[:, 16:].reshape(-1, 4, 32)
    codes = np.stack([packed & 15, packed >> 4], 2).reshape(-1, 8, 32)
    return codes, scales * _half(raw[:, :2]), -minima * _half(raw[:, 2:4])


def _six_bits(raw: Bytes) -> tuple[Bytes, Bytes]:
    """The 8 scales and 8 minima that a K-quant packs in 12 bytes, as float32 [n, 8] each."""
    a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], 1)
    minima = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], 1)
    return scales.astype(np.float32), minima.astype(np.float32)


_LAYOUTS = {
    "Q4_0": _Layout(Format("nbits", 4, 32), 18, _q4_0),
    "Q4_1": _Layout(Format("nbits", 4, 32, True, True), 20, _q4_1),
    "Q5_0": _Layout(Format("nbits", 8, 32), 22, _q5_0),
    "Q8_0": _Layout(Format("nbits", 8, 32), 34, _q8_0),
    "Q6_K": _Layout(Format("nbits", 8, 16), 210, _q6_k),
    "Q4_K": _Layout(Format("nbits", 4, 32, True, True), 144, _q4_k),
}
