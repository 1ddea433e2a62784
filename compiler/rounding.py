"""What the kernels of each format compute, in PyTorch: weights and activations rounded as they round them."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsopt.compiler.gptq import Feedback, round_columns, round_weights
from dsopt.compiler.passes.prepare_rows import SMALLEST
from dsopt.compiler.passes.quantize_linears import GPTQ_ROWS
from dsopt.compiler.quantizers import (
    Blocks,
    for_row_chunks,
    quantize_blocks,
    quantize_columns,
    quantize_fp8,
    quantize_minima,
)
from dsopt.compiler.recipe import Format
from dsopt.compiler.rotation import rotated_columns
from dsopt.compiler.sensitivity import Observed, divergence
from dsopt.runtime.session import PREFILL_CHUNK


def quantize_activations(x: Tensor, block: int) -> Tensor:
    """What MatMulNBits at accuracy level 4 makes of activations [T, K]: int8, a scale for each block of each row."""
    blocks = x.unflatten(1, (-1, block))
    scales = (blocks.abs().amax(2, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scales).round() * scales).flatten(1)


def dynamic(
    linears: list[Observed], scales: Tensor, form: Format, head: int | None = None, by: Feedback | None = None
) -> float:
    """The price of DynamicQuantizeMatMul on x / scales, which all `linears` read; see `dynamic_values`."""
    x, w = dynamic_values(linears[0].x, torch.cat([linear.w for linear in linears]), scales, form, head, by)
    parts = w.split([len(linear.w) for linear in linears])
    return divergence(linears, [x @ part.T for part in parts])


def dynamic_values(
    x: Tensor, w: Tensor, scales: Tensor, form: Format, head: int | None = None, by: Feedback | None = None
) -> tuple[Tensor, Tensor]:
    """What DynamicQuantizeMatMul makes of inputs x [T, K] / scales, uint8 with one scale and zero point for a chunk of
    rows, and of weights w [N, K] * scales, both in its basis.

    `head`: so many channels each are rotated before, also where `form` says nothing of it. `by`: what GPTQ rounds the
    weights by.
    """
    x, pieces = rotated_columns(x / scales, head), []
    sizes = _row_sizes(x, form)
    for rows in (x / sizes).split(PREFILL_CHUNK):
        low, high = rows.amin().clamp_max(0), rows.amax().clamp_min(0)
        step = ((high - low) / 255).clamp_min(1e-30)
        zero = (-low / step).round()
        pieces.append(((rows / step).round() + zero).clamp(0, 255).sub(zero) * step)
    out = torch.empty_like(w)

    def work(start: int, stop: int) -> None:
        rows = rotated_columns(w[start:stop] * scales, head)
        codes, steps = round_columns(rows, by, form.bits) if by else quantize_columns(rows, form.bits)
        out[start:stop] = codes.float() * steps[:, None]

    for_row_chunks(len(w), w.shape[1], work, GPTQ_ROWS)  # a head's; the layers' are one chunk
    return torch.cat(pieces) * sizes, out


def _row_sizes(x: Tensor, form: Format) -> Tensor:
    """What each row of x [T, K] is divided by, [T, 1], as `PrepareRows` has it."""
    if not form.per_token:
        return torch.ones(len(x), 1)
    if form.rotated:
        return (x.square().mean(1, keepdim=True) + SMALLEST).sqrt()
    return x.abs().amax(1, keepdim=True).clamp_min(SMALLEST)


def rounded(
    linears: list[Observed],
    exact: list[bool],
    form: Format,
    feedback: Callable[[], Feedback],
    floats: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The weights as the format will hold them, with scales of type `floats`: float32 [N, K] each.

    GPTQ rounds all that read one input at once; `feedback` is that of the input's Gram matrix.
    """
    if all(exact):
        return [linear.w for linear in linears]
    w = torch.cat([linear.w for linear in linears])
    out = torch.empty_like(w)
    if form.kernel == "none":

        def work(start: int, stop: int) -> None:
            out[start:stop] = w[start:stop].to(floats)
    elif form.kernel == "fp8":

        def work(start: int, stop: int) -> None:
            codes, scales = quantize_fp8(w[start:stop], form.block)
            out[start:stop] = codes.float() * scales.repeat_interleave(form.block, 1)[:, : w.shape[1]]
    elif form.bits < 8:
        passed_on = feedback()

        def work(start: int, stop: int) -> None:
            out[start:stop] = values_of(round_weights(w[start:stop], passed_on, form), w.shape[1], floats)
    else:

        def work(start: int, stop: int) -> None:
            out[start:stop] = values_of(nearest(w[start:stop], form), w.shape[1], floats)

    for_row_chunks(len(w), w.shape[1], work, GPTQ_ROWS if form.bits < 8 else None)
    return list(out.split([len(linear.w) for linear in linears]))


def nearest(w: Tensor, form: Format) -> Blocks:
    if form.minima:
        return quantize_minima(w, form.bits, form.block)
    return quantize_blocks(w, form.bits, form.block, zero_points=form.zero_points)


def values_of(made: Blocks, width: int, floats: torch.dtype = torch.float32) -> Tensor:
    values = made.scales.to(floats).float()[..., None] * (made.codes.float() - made.zero_points.float()[..., None])
    if made.rest is not None:
        values = values + made.rest[..., None]
    return values.flatten(1)[:, :width]
