"""GPTQ (arXiv:2210.17323): round one input channel after the other, each error passed on to those not yet rounded.

With H = E[x x^T] of a layer's inputs, what is minimised is the error of its *outputs*, tr((W - Q) H (W - Q)^T),
not of its weights. Scale and zero point of a block are searched when the block is reached, on the weights as the
errors so far have changed them (the paper's "static groups" off). The blocks with the most active channels go first,
and within a block the most active channels: their errors find the most others to make up for them. (The "activation
order" of GPTQ's authors sorts all channels, and then a block's are not neighbours; so they are.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsopt.compiler.quantizers import Blocks, column_scales, quantize_blocks, quantize_minima
from dsopt.compiler.recipe import Format

_CHANNELS = 32  # rounded before their errors are passed on to all others
_DAMPING = 0.01  # of the mean diagonal: directions that calibration saw little of are not free


@dataclass(frozen=True)
class Feedback:
    """How errors are passed on: `order` int64 [K'] of the channels, K' = K in whole blocks, and in this order the
    upper Cholesky `factor` U of the damped H^-1 = U^T U, float32 [K', K']."""

    order: Tensor
    factor: Tensor


def error_feedback(gram: Tensor, block: int) -> Feedback:
    """From H [K, K]. Raises nothing: it is positive semidefinite, and the damping is raised until U exists."""
    padding = -gram.shape[0] % block
    h = torch.nn.functional.pad(gram.double(), (0, padding, 0, padding))
    order = _order(h.diagonal(), block)
    h = h[order][:, order]
    mean = h.diagonal().mean().clamp_min(1e-30)
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = mean
    damping = _DAMPING
    while True:
        damped = h + damping * mean * torch.eye(len(h), dtype=h.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return Feedback(order, upper.float())
        damping *= 10


def _order(square: Tensor, block: int) -> Tensor:
    """Blocks by the sum of E[x^2], in a block channels by E[x^2], the largest first. Of equals the first is first."""
    square = square.unflatten(0, (-1, block))
    blocks = square.sum(1).argsort(descending=True, stable=True)
    return (blocks[:, None] * block + square.argsort(dim=1, descending=True, stable=True)[blocks]).flatten()


def round_weights(w: Tensor, feedback: Feedback, form: Format) -> Blocks:
    """Rows w float32 [N, K] rounded to `form`; `feedback` is for the format's block."""
    block, bits, factor, order = form.block, form.bits, feedback.factor, feedback.order
    w = torch.nn.functional.pad(w, (0, len(factor) - w.shape[1]))[:, order]
    importance = factor.diagonal().reciprocal().square()  # what an error in a channel costs after the feedback
    parts = []
    for first in range(0, w.shape[1], block):
        last = first + block
        grid = _grid(w[:, first:last], form, importance[first:last])
        codes, errors = _round_block(w[:, first:last], factor[first:last, first:last], grid, bits)
        w[:, last:] -= errors @ factor[first:last, last:]
        parts.append((codes, grid))
    codes = torch.cat([codes for codes, _ in parts], 1)[:, order.argsort()].unflatten(1, (-1, block))
    places = (order[::block] // block).argsort()  # of the blocks
    scales, zeros = (
        torch.cat([getattr(grid, name) for _, grid in parts], 1)[:, places] for name in ("scales", "zero_points")
    )
    rest = torch.cat([grid.rest for _, grid in parts if grid.rest is not None], 1)[:, places] if form.minima else None
    return Blocks(codes.contiguous(), scales, zeros, rest)


def round_columns(w: Tensor, feedback: Feedback, bits: int) -> tuple[Tensor, Tensor]:
    """Rows w float32 [N, K] with one scale each, that of the largest weight: codes int8 [N, K] and scales [N].

    `feedback` may be that of any block.
    """
    k, half = w.shape[1], 2 ** (bits - 1)
    scales = column_scales(w, bits)
    zeros = torch.full((len(w), 1), half, dtype=torch.uint8)
    grid = Blocks(zeros, scales[:, None], zeros)
    w = torch.nn.functional.pad(w, (0, len(feedback.factor) - k))[:, feedback.order]
    parts = []
    for first in range(0, w.shape[1], _CHANNELS):
        last = min(first + _CHANNELS, w.shape[1])
        codes, errors = _round_block(w[:, first:last], feedback.factor[first:last, first:last], grid, bits)
        w[:, last:] -= errors @ feedback.factor[first:last, last:]
        parts.append(codes)
    codes = torch.cat(parts, 1)[:, feedback.order.argsort()][:, :k]
    return (codes.to(torch.int16) - half).to(torch.int8), scales


def _grid(w: Tensor, form: Format, importance: Tensor) -> Blocks:
    if form.minima:
        return quantize_minima(w, form.bits, form.block, importance=importance)
    return quantize_blocks(w, form.bits, form.block, zero_points=form.zero_points, importance=importance)


def _round_block(w: Tensor, factor: Tensor, grid: Blocks, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, block], and the errors as the later blocks want them, float32 [N, block]."""
    w = w.T.contiguous()  # a channel is a row: the loop runs along memory
    scale, zero = grid.scales[:, 0], grid.zero_points[:, 0].float()
    offset = -scale * zero if grid.rest is None else grid.rest[:, 0] - scale * zero
    inverse = torch.where(scale.abs() < 1e-37, torch.zeros_like(scale), 1 / scale)
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for i, (x, code, error, pivot) in enumerate(zip(w, codes, errors, factor.diagonal().tolist(), strict=True)):
        torch.sub(x, offset, out=code).mul_(inverse).round_().clamp_(0, 2**bits - 1)
        torch.addcmul(offset, code, scale, out=error)
        torch.sub(x, error, out=error).div_(pivot)
        if i + 1 < len(w):
            w[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return codes.T.to(torch.uint8).contiguous(), errors.T
