"""Checkpoints with float8 weights and a scale for each square of them: DeepSeek-V3, Qwen3-...-FP8.

`X.weight` is float8 (e4m3) [N, K], `X.weight_scale_inv` [ceil(N / 128), ceil(K / 128)] multiplies it
(arXiv:2412.19437, section 3.3.2; Hugging Face's quantization method `fp8`). Read as float32, or kept as codes with a
scale a row and block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsopt.compiler.checkpoint import Tensor
from dsopt.runtime.errors import DsoptError

DTYPE = "F8_E4M3"
_SCALES = "_scale_inv"


@dataclass(frozen=True)
class Fp8Tensor(Tensor):
    """`codes` and `scales` are the stored tensors; `square` is the rows and columns that share a scale."""

    codes: Tensor
    scales: Tensor
    square: tuple[int, int]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        codes, scales = self.stored(start, stop)
        return codes.astype(np.float32) * scales.repeat(self.square[1], 1)[:, : self.shape[1]]

    def stored(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes float8_e4m3fn [rows, K] and scales float32 [rows, ceil(K / columns)] of rows start:stop.

        A row's block of a square has the square's scale, so that the codes stay as they are.
        """
        height = self.square[0]
        first = start // height
        scales = self.scales.read(first, -(-stop // height)).repeat(height, 0)
        codes: np.ndarray = self.codes._rows(start, stop)
        return codes, scales[start - first * height : stop - first * height]


def read_square(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """The side lengths of a scale's square. Raises DsoptError on any other quantization."""
    said: Mapping[str, Any] = config["quantization_config"] or {}
    method, square = said.get("quant_method", "unknown"), said.get("weight_block_size")
    if method != "fp8":
        raise DsoptError(
            f"{path}: the weights are already quantized (quant_method {method!r}); "
            "give the original F32, F16 or BF16 checkpoint, or one in fp8 with a scale a square"
        )
    sides = square if isinstance(square, list) and all(type(side) is int and side > 0 for side in square) else []
    kind = said.get("fmt", "e4m3"), said.get("activation_scheme", "dynamic")
    if len(sides) != 2 or kind != ("e4m3", "dynamic"):
        raise DsoptError(
            f"{path}: weights in fp8 of another kind (weight_block_size {square}, fmt {said.get('fmt')}, "
            f"activation_scheme {said.get('activation_scheme')}); read are e4m3, dynamic, with a scale a square"
        )
    return sides[0], sides[1]


def join_scales(tensors: Mapping[str, Tensor], square: tuple[int, int], path: Path) -> dict[str, Tensor]:
    """The tensors, each weight in float8 with its scales. Raises DsoptError where a weight has none that fit."""
    joined = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALES)}
    for name, codes in joined.items():
        if codes.dtype != DTYPE or not name.endswith(".weight"):
            continue
        if len(codes.shape) != 2:
            raise DsoptError(f"{path}: {name} {list(codes.shape)} is float8 and no matrix")
        scales = tensors.get(name + _SCALES)
        wanted = tuple(-(-n // side) for n, side in zip(codes.shape, square, strict=True))
        if scales is None or scales.shape != wanted:
            found = "missing" if scales is None else list(scales.shape)
            raise DsoptError(f"{path}: {name + _SCALES} is {found}; {name} {list(codes.shape)} needs {list(wanted)}")
        joined[name] = Fp8Tensor(name, codes.shape, DTYPE, codes.nbytes + scales.nbytes, codes, scales, square)
    return joined


def read_codes(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a float8 tensor of a safetensors file; by torch, since NumPy has no such type."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rows = file.get_slice(name)[start:stop]
    import torch

    return rows.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
