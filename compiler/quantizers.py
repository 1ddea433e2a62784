"""Rounding weights to few bits so that the weighted squared error is smallest. Pure tensor arithmetic.

x ~ scale * (code - zero_point), per block along the input dimension. For given integer codes the best scale has a
closed form, scale = sum(w x q) / sum(w q^2) with q = code - zero_point, and the error it leaves is
sum(w x^2) - sum(w x q)^2 / sum(w q^2). So candidates only have to propose codes; the one with the largest
sum(w x q)^2 / sum(w q^2) wins and its scale is refitted (the idea of llama.cpp's k-quants and imatrix).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# How far beyond the largest magnitude the code range may reach, or stop short of it (then that weight is clipped).
_SYMMETRIC_GRID = {4: (1.08, 1.0, 0.9), 8: (1.0,)}
_ASYMMETRIC_GRID = {4: (1.0, 0.93, 0.86), 8: (1.0,)}
# Shares of the range cut off below and above, for minima.
_MINIMA_GRID = ((0.0, 0.0), (0.04, 0.04), (0.08, 0.0), (0.0, 0.08))
_CHUNK = 1 << 17  # elements a thread works on at a time: its temporaries stay in the L2 cache


@dataclass(frozen=True)
class Blocks:
    """Quantized rows: codes uint8 [N, blocks, block], scales float32 [N, blocks], zero_points uint8 [N, blocks].

    `rest` float32 [N, blocks], where minima were asked for: x ~ scale * (code - zero_point) + rest.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    rest: Tensor | None = None


def quantize_minima(x: Tensor, bits: int, block: int, *, importance: Tensor | None = None) -> Blocks:
    """Quantize rows x float32 [N, K], K whole blocks, with a real minimum for each block: x ~ scale * q + minimum.

    For given codes q, scale and minimum are a weighted line fit; of several ranges the one that fits best is taken.
    Weights that lie on such a grid already and use both its ends (GGUF's Q4_1) come back as they are.
    """
    x = x.unflatten(1, (-1, block)).permute(2, 0, 1).contiguous()
    weight = _error_weights(x, importance, 0)
    low, high = x.amin(0), x.amax(0)
    best: tuple[Tensor, ...] | None = None
    for shrink_low, shrink_high in _MINIMA_GRID:
        first, last = low + shrink_low * (high - low), high - shrink_high * (high - low)
        q = ((x - first) * _safe_inverse((last - first) / (2**bits - 1))).round_().clamp_(0, 2**bits - 1)
        candidate = (*_fit_line(x, q, weight), q)
        if best is None:
            best = candidate
            continue
        better = candidate[0] < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))
    assert best is not None
    _, scales, minima, q = best
    return affine_blocks(q.permute(1, 2, 0).to(torch.uint8), scales, minima, bits)


def affine_blocks(codes: Tensor, scales: Tensor, minima: Tensor, bits: int) -> Blocks:
    """scale * code + minimum, with the nearest integer zero point and the rest that it misses."""
    zeros = (-minima * _safe_inverse(scales)).round_().clamp_(0, 2**bits - 1)
    return Blocks(codes.contiguous(), scales, zeros.to(torch.uint8), minima + scales * zeros)


def _fit_line(x: Tensor, q: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted squared error, scale and minimum of the best x ~ scale * q + minimum of each block."""
    w = torch.ones((), dtype=x.dtype) if weight is None else weight
    total = (w * torch.ones_like(x)).sum(0) if weight is None else weight.expand_as(x).sum(0)
    mean_q, mean_x = (w * q).sum(0) / total, (w * x).sum(0) / total
    dq, dx = q - mean_q, x - mean_x
    scale = (w * dq * dx).sum(0) / (w * dq * dq).sum(0).clamp_min(1e-30)
    error = (w * (dx - scale * dq) ** 2).sum(0)
    return error, scale, mean_x - scale * mean_q


def quantize_blocks(
    x: Tensor, bits: int, block: int, *, zero_points: bool = False, importance: Tensor | None = None
) -> Blocks:
    """Quantize rows x float32 [N, K] in blocks of `block` along K; K is padded with zeros to whole blocks.

    `importance` float32 [K] weighs the error of each input channel (E[activation^2] is the natural choice).
    Without zero points the zero point is 2^(bits-1), as MatMulNBits assumes.
    """
    padding = -x.shape[1] % block
    # [block, N, blocks]: arithmetic and sums then run along memory over many blocks, not over 32 values at a time.
    x = torch.nn.functional.pad(x, (0, padding)).unflatten(1, (-1, block)).permute(2, 0, 1).contiguous()
    weight = _error_weights(x, importance, padding)
    best = None
    q, scratch = torch.empty_like(x), torch.empty_like(x)  # reused: fresh pages would cost more than the arithmetic
    for inverse_scale, zero in _asymmetric(x, bits) if zero_points else _symmetric(x, bits):
        xq, qq = _products(x, _codes(x, inverse_scale, zero, bits, q), weight, scratch)
        candidate = xq * xq / qq, inverse_scale, zero
        if best is None:
            best = candidate
            continue
        better = candidate[0] > best[0]
        gain, inverse_scale, zero = (torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))
        best = gain, inverse_scale, zero
    assert best is not None
    _, inverse_scale, zero = best
    xq, qq = _products(x, _codes(x, inverse_scale, zero, bits, q), weight, scratch)
    codes = q.add_(zero).to(torch.uint8).permute(1, 2, 0).contiguous()
    return Blocks(codes, xq / qq, zero.to(torch.uint8))


def _codes(x: Tensor, inverse_scale: Tensor, zero: Tensor, bits: int, out: Tensor) -> Tensor:
    """code - zero point, as float: the nearest integers that the code range allows."""
    torch.mul(x, inverse_scale, out=out).round_()
    torch.maximum(out, -zero, out=out)
    return torch.minimum(out, 2**bits - 1 - zero, out=out)


def _products(x: Tensor, q: Tensor, weight: Tensor | None, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """sum(w x q) and sum(w q^2) of each block."""
    sums = []
    for other in (x, q):
        torch.mul(q, other, out=scratch)
        sums.append((scratch if weight is None else scratch.mul_(weight)).sum(0))
    return sums[0], sums[1].clamp_min_(1e-30)


def _error_weights(x: Tensor, importance: Tensor | None, padding: int) -> Tensor | None:
    if importance is None:
        return None
    # A channel that calibration never saw active may be active later: its error still counts a little.
    importance = importance.clamp_min(max(1e-3 * float(importance.mean()), 1e-30))
    return torch.nn.functional.pad(importance, (0, padding)).reshape(x.shape[2], 1, x.shape[0]).permute(2, 1, 0)


def _symmetric(x: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The code range has one step more below zero: let the extreme weight, whatever its sign, sit there."""
    half = 2 ** (bits - 1)
    extreme = torch.where(x.amax(0) > -x.amin(0), x.amax(0), x.amin(0))
    zero = torch.full_like(extreme, half)
    for stretch in _SYMMETRIC_GRID[bits]:
        yield _safe_inverse(-extreme * stretch / half), zero


def _asymmetric(x: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    top = 2**bits - 1
    low, high = x.amin(0).clamp_max(0), x.amax(0).clamp_min(0)
    for shrink_low in _ASYMMETRIC_GRID[bits]:
        for shrink_high in _ASYMMETRIC_GRID[bits]:
            inverse = _safe_inverse((high * shrink_high - low * shrink_low) / top)
            yield inverse, (-low * shrink_low * inverse).round().clamp(0, top)


def _safe_inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that would overflow: weights so small are zero."""
    return torch.where(scale.abs() < 1e-37, torch.zeros_like(scale), 1 / scale)


def quantize_columns(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Per output channel: rows x [N, K] -> codes int8 [N, K], of 8 bits in [-127, 127], and scales float32 [N]."""
    scales = column_scales(x, bits)
    top = 2 ** (bits - 1) - 1
    codes = (x * _safe_inverse(scales).unsqueeze(1)).round().clamp(-top, top)
    return codes.to(torch.int8), scales


def column_scales(x: Tensor, bits: int) -> Tensor:
    """Of rows x [N, K]: float32 [N], the largest magnitude of each at the largest code."""
    return x.abs().amax(1) / (2 ** (bits - 1) - 1)


def quantize_fp8(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Rows x [N, K] -> codes float8_e4m3fn [N, K] and scales float32 [N, ceil(K / block)], the largest at 448."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    scales = padded.abs().amax(2) / torch.finfo(torch.float8_e4m3fn).max
    codes = (padded * _safe_inverse(scales).unsqueeze(2)).flatten(1)[:, : x.shape[1]]
    return codes.to(torch.float8_e4m3fn), scales


def for_row_chunks(rows: int, width: int, work: Callable[[int, int], None], step: int | None = None) -> None:
    """Call `work(start, stop)` for chunks of rows on all cores; tensor operations inside run single-threaded."""
    step = step or max(1, _CHUNK // width)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(work, start, min(start + step, rows)) for start in range(0, rows, step)]
            for job in jobs:
                job.result()
    finally:
        torch.set_num_threads(threads)


def pack_nibbles(codes: Tensor) -> np.ndarray:
    """uint8 codes below 16 [..., n] -> [..., ceil(n / 2)]: even positions in the low nibble, as MatMulNBits reads."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).numpy()
