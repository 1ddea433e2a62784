"""GPTQ against rounding to nearest, by the error of a layer's outputs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dsopt.compiler.gptq import Feedback, error_feedback, round_columns, round_weights
from dsopt.compiler.quantizers import Blocks, quantize_blocks, quantize_columns, quantize_minima
from dsopt.compiler.recipe import Format

FORMS = ["int4", "int4-zp", "int4-min", "int4-b16"]


def values(made: Blocks, width: int) -> Tensor:
    found = made.scales[..., None] * (made.codes.float() - made.zero_points.float()[..., None])
    return (found if made.rest is None else found + made.rest[..., None]).flatten(1)[:, :width]


def nearest(w: Tensor, form: Format) -> Blocks:
    if form.minima:
        return quantize_minima(w, form.bits, form.block)
    return quantize_blocks(w, form.bits, form.block, zero_points=form.zero_points)


def correlated(tokens: int, width: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return mixed + 0.3 * torch.randn(tokens, width, generator=generator)


def weights(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("text", FORMS)
def test_outputs_are_nearer_than_by_rounding_to_nearest(text: str) -> None:
    form, x, w = Format.parse(text), correlated(512, 96, 8), weights(48, 96)
    made = round_weights(w, error_feedback(x.T @ x / len(x), form.block), form)
    assert made.codes.shape == (48, 96 // form.block, form.block)
    assert made.codes.dtype == made.zero_points.dtype == torch.uint8
    assert int(made.codes.max()) <= 15

    def output_error(rounded: Blocks) -> float:
        return float((x @ (values(rounded, 96) - w).T).square().sum())

    assert output_error(made) < 0.5 * output_error(nearest(w, form))


@pytest.mark.parametrize("width", [96, 80])  # whole blocks of 32, and not
@pytest.mark.parametrize("bits", [7, 8])
def test_so_they_are_with_one_scale_a_row(bits: int, width: int) -> None:
    x, w = correlated(512, width, 8), weights(48, width)
    codes, scales = round_columns(w, error_feedback(x.T @ x / len(x), 32), bits)
    plain, same = quantize_columns(w, bits)
    assert codes.dtype == torch.int8
    assert -(2 ** (bits - 1)) <= int(codes.min()) < int(codes.max()) < 2 ** (bits - 1)
    torch.testing.assert_close(scales, same)
    errors = [float((x @ (made * scales[:, None] - w).T).square().sum()) for made in (codes, plain)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("text", FORMS)
def test_where_inputs_have_nothing_in_common_it_is_rounding_to_nearest(text: str) -> None:
    form, w = Format.parse(text), weights(16, 64)
    made, plain = round_weights(w, error_feedback(torch.eye(64), form.block), form), nearest(w, form)
    np.testing.assert_allclose(made.scales, plain.scales, rtol=1e-5)
    assert torch.equal(made.zero_points, plain.zero_points)
    # Its codes are the nearest of the final grid, those of the search were of the grid before the refit.
    assert float((made.codes.int() - plain.codes.int()).abs().float().mean()) < 0.05
    assert ((values(made, 64) - w) ** 2).sum() <= ((values(plain, 64) - w) ** 2).sum() * (1 + 1e-6)


def test_the_factor_is_of_the_damped_inverse_in_its_order() -> None:
    x = correlated(512, 48, 48).double()
    gram = x.T @ x / len(x)
    feedback = error_feedback(gram.float(), 16)
    upper, order = feedback.factor.double(), feedback.order
    assert torch.equal(upper, upper.triu())
    damped = (gram + 0.01 * gram.diagonal().mean() * torch.eye(48))[order][:, order]
    np.testing.assert_allclose(upper.T @ upper @ damped, torch.eye(48), atol=1e-4)


def test_active_blocks_go_first_and_active_channels_in_them() -> None:
    gram = torch.eye(70)
    gram.diagonal()[[40, 33]] = torch.tensor([9.0, 5.0])  # in the second block of 32; the third is of 6 and padding
    order = error_feedback(gram, 32).order.tolist()
    assert sorted(order) == list(range(96))
    assert order == [40, 33, 32, *(i for i in range(34, 64) if i != 40), *range(32), *range(64, 96)]


def test_codes_and_scales_stand_where_their_channels_do() -> None:
    """One active block among weights of very different sizes: it comes first, and goes back to its place."""
    form, w = Format.parse("int4-min"), weights(8, 96) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(32)
    gram = torch.eye(96) + 0.1
    gram.diagonal()[64:] += torch.rand(32, generator=torch.Generator().manual_seed(0))
    made = round_weights(w, error_feedback(gram, 32), form)
    assert float(((values(made, 96) - w).abs() / made.scales.repeat_interleave(32, 1)).max()) < 40
    error = (values(made, 96) - w).unflatten(1, (3, 32)).norm(dim=2) / w.unflatten(1, (3, 32)).norm(dim=2)
    assert float(error[:, 1].max()) < 0.2


def test_the_order_spares_what_one_active_channel_would_do_to_its_block() -> None:
    """An outlier that comes last has none left to make up for its error."""
    form, x, w = Format.parse("int4"), correlated(512, 96, 8), weights(48, 96)
    x[:, 95] *= 30
    x[:, :95] += 0.3 * x[:, 95:]  # the others can: they say much of the same
    gram = x.T @ x / len(x)
    feedback = error_feedback(gram, 32)
    assert int(feedback.order[0]) == 95
    unordered = torch.linalg.cholesky(
        torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(96)), upper=True
    )
    plain = round_weights(w, Feedback(torch.arange(96), unordered), form)

    def output_error(rounded: Blocks) -> float:
        return float((x @ (values(rounded, 96) - w).T).square().sum())

    assert output_error(round_weights(w, feedback, form)) < 0.7 * output_error(plain)


def test_a_width_that_no_block_divides_and_channels_that_never_spoke() -> None:
    """Fewer tokens than channels, some channels always 0: singular, and yet every weight is near what it was."""
    form, w = Format.parse("int4-zp"), weights(16, 71)
    x = correlated(20, 71, 4)
    x[:, 5:9] = 0
    feedback = error_feedback(x.T @ x / len(x), form.block)
    assert feedback.factor.shape == (96, 96)
    assert bool(feedback.factor.isfinite().all())
    made = round_weights(w, feedback, form)
    assert made.codes.shape == (16, 3, 32)
    silent = (values(made, 71) - w)[:, 5:9]
    assert float(silent.abs().max()) < 0.5 * float(made.scales[:, 0].abs().max()) * 1.01
    assert float((x @ (values(made, 71) - w).T).square().sum()) < float(
        (x @ (values(nearest(w, form), 71) - w).T).square().sum()
    )


@pytest.mark.parametrize("gram", [torch.zeros(32, 32), torch.full((32, 32), 1e-38), torch.full((32, 32), 1e30)])
def test_any_gram_matrix_has_a_factor(gram: Tensor) -> None:
    made = round_weights(weights(4, 32), error_feedback(gram, 32), Format.parse("int4"))
    assert float((values(made, 32) - weights(4, 32)).abs().max()) < 3


def test_rows_are_rounded_each_for_itself() -> None:
    form, x, w = Format.parse("int4-zp"), correlated(256, 64, 8), weights(12, 64)
    feedback = error_feedback(x.T @ x / len(x), 32)
    before = w.clone()
    whole = round_weights(w, feedback, form)
    parts = [round_weights(w[rows], feedback, form) for rows in (slice(0, 5), slice(5, 12))]
    assert torch.equal(w, before)
    agree = whole.codes == torch.cat([part.codes for part in parts])
    assert float(agree.float().mean()) > 0.99  # another number of rows sums in another order
