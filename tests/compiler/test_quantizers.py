"""Rounding against float64 arithmetic and brute force; packing bit by bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dsopt.compiler.quantizers import (
    Blocks,
    for_row_chunks,
    pack_nibbles,
    quantize_blocks,
    quantize_columns,
)

KINDS = [(bits, zero_points) for bits in (4, 8) for zero_points in (False, True)]


def normal(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (rows, width)).astype(np.float32)


def heavy(rows: int, width: int) -> np.ndarray:
    """Weights with outliers, as trained ones have."""
    return np.random.default_rng(1).standard_t(3, (rows, width)).astype(np.float32)


def quantize(x: np.ndarray, bits: int, block: int, zero_points: bool, importance: np.ndarray | None = None) -> Blocks:
    weight = None if importance is None else torch.from_numpy(importance)
    return quantize_blocks(torch.from_numpy(x), bits, block, zero_points=zero_points, importance=weight)


def steps(made: Blocks) -> np.ndarray:
    """code - zero point, as the kernels compute it."""
    return made.codes.numpy().astype(np.float64) - made.zero_points.numpy()[..., None].astype(np.float64)


def dequantize(made: Blocks, width: int) -> np.ndarray:
    values = made.scales.numpy()[..., None].astype(np.float64) * steps(made)
    return values.reshape(len(values), -1)[:, :width]


def error(x: np.ndarray, made: Blocks, block: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Weighted squared error of each block, [rows, blocks]."""
    squares = (dequantize(made, x.shape[1]) - x.astype(np.float64)) ** 2
    if importance is not None:
        squares *= importance
    squares = np.pad(squares, ((0, 0), (0, -x.shape[1] % block)))
    return squares.reshape(len(x), -1, block).sum(-1)


def rounded_to_the_extreme(x: np.ndarray, bits: int, block: int, zero_points: bool) -> np.ndarray:
    """Squared error per block of plain rounding: the range of the codes is the range of the weights."""
    x = np.pad(x.astype(np.float64), ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)
    top = 2**bits - 1
    if zero_points:
        low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        scale = (high - low)[..., None] / top
        zero = np.round(-low[..., None] / scale)
    else:
        extreme = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
        scale, zero = -extreme / 2 ** (bits - 1), 2 ** (bits - 1)
    codes = np.clip(np.round(x / scale) + zero, 0, top)
    return ((scale * (codes - zero) - x) ** 2).sum(-1)


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_is_the_least_squares_one(bits: int, zero_points: bool, weighted: bool) -> None:
    x = heavy(16, 96)
    importance = np.random.default_rng(2).uniform(0.1, 9, 96).astype(np.float32) if weighted else None
    made = quantize(x, bits, 32, zero_points, importance)
    q, blocks = steps(made), x.reshape(16, 3, 32).astype(np.float64)
    w = (np.ones(96) if importance is None else importance).reshape(3, 32)
    expected = (w * blocks * q).sum(-1) / (w * q * q).sum(-1)
    np.testing.assert_allclose(made.scales.numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
@pytest.mark.parametrize("make", [normal, heavy])
@pytest.mark.parametrize("width", [64, 71])
def test_never_worse_than_plain_rounding(
    bits: int, zero_points: bool, make: Callable[..., np.ndarray], width: int
) -> None:
    x = make(64, width)
    plain = rounded_to_the_extreme(x, bits, 32, zero_points)
    found = error(x, quantize(x, bits, 32, zero_points), 32)
    assert np.all(found <= plain * (1 + 1e-5) + 1e-12)
    assert found.mean() < plain.mean() * (0.97 if bits == 4 else 1)


def test_close_to_the_best_scale_there_is() -> None:
    """4 bits, symmetric: brute force over two thousand scales of both signs."""
    x = normal(64, 32)
    found = error(x, quantize(x, 4, 32, False), 32)[:, 0]
    exact = x.astype(np.float64)
    best = np.full(64, np.inf)
    for fraction in np.linspace(0.4, 1.2, 1000):
        for sign in (-1, 1):
            scale = sign * fraction * np.abs(exact).max(1, keepdims=True) / 8
            q = np.clip(np.round(exact / scale), -8, 7)
            scale = (exact * q).sum(1, keepdims=True) / (q * q).sum(1, keepdims=True)
            best = np.minimum(best, ((scale * q - exact) ** 2).sum(1))
    assert np.all(found >= best * (1 - 1e-6))
    assert found.mean() < 1.1 * best.mean()


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
def test_importance_buys_precision_where_it_matters(bits: int, zero_points: bool) -> None:
    x = heavy(64, 32)
    importance = np.where(np.arange(32) < 4, 100, 1).astype(np.float32)
    plain, weighted = quantize(x, bits, 32, zero_points), quantize(x, bits, 32, zero_points, importance)
    before, after = error(x, plain, 32, importance).mean(), error(x, weighted, 32, importance).mean()
    assert after < before * (0.8 if bits == 4 else 1)


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
def test_channels_of_no_importance_keep_their_weights(bits: int, zero_points: bool) -> None:
    """A channel that calibration never saw active may be active later."""
    x = normal(4, 64)
    importance = np.repeat(np.float32([1, 0]), 32)
    made = quantize(x, bits, 32, zero_points, importance)
    np.testing.assert_allclose(dequantize(made, 64), x, atol=0.6 if bits == 4 else 0.05)


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
def test_codes_and_zero_points_are_in_range(bits: int, zero_points: bool) -> None:
    made = quantize(heavy(32, 128), bits, 16, zero_points)
    assert made.codes.dtype == made.zero_points.dtype == torch.uint8
    assert made.codes.shape == (32, 8, 16)
    assert made.scales.shape == made.zero_points.shape == (32, 8)
    assert int(made.codes.max()) == 2**bits - 1
    if not zero_points:
        assert set(made.zero_points.unique().tolist()) == {2 ** (bits - 1)}


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
def test_zero_stays_exactly_zero(bits: int, zero_points: bool) -> None:
    """The padding of the last block too: the kernel multiplies it with what stands behind the activations."""
    x = normal(8, 40)
    x[:, 3] = 0
    made = quantize(x, bits, 32, zero_points)
    assert np.all(dequantize(made, 40)[:, 3] == 0)
    assert np.all(steps(made)[:, 1, 8:] == 0)


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(np.zeros(32), id="zeros"),
        pytest.param(np.full(32, 0.7), id="constant"),
        pytest.param(np.full(32, -0.7), id="negative constant"),
        pytest.param(np.r_[1000, np.zeros(31)], id="one outlier"),
        pytest.param(np.r_[-3e-7, np.zeros(31)], id="one tiny"),
        pytest.param(np.linspace(-1e-39, 1e-39, 32), id="denormal"),
        pytest.param(np.linspace(-1e30, 1e30, 32), id="huge"),
        pytest.param(np.linspace(3, 4, 32), id="far from zero"),
    ],
)
def test_odd_blocks(x: np.ndarray, bits: int, zero_points: bool) -> None:
    x = x.astype(np.float32)[None]
    made = quantize(x, bits, 32, zero_points)
    assert np.isfinite(made.scales.numpy()).all()
    steps_in_the_range = 2 ** (bits - 1) - 1
    largest = np.abs(x).max().astype(np.float64)
    off = np.abs(dequantize(made, 32) - x).max()
    assert off <= max(largest / steps_in_the_range, 1.2e-38)  # below that ONNX Runtime takes all for zero


def test_columns_are_the_nearest_of_255_steps() -> None:
    x = np.concatenate([heavy(16, 50), np.zeros((1, 50), np.float32)])
    codes, scales = quantize_columns(torch.from_numpy(x))
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (
        torch.int8,
        torch.float32,
        (17, 50),
        (17,),
    )
    assert int(codes.min()) >= -127
    back = codes.numpy().astype(np.float64) * scales.numpy()[:, None].astype(np.float64)
    assert np.all(np.abs(back - x) <= scales.numpy()[:, None] * 0.5001)
    np.testing.assert_allclose(scales.numpy()[:16], np.abs(x[:16]).max(1) / 127, rtol=1e-6)
    assert scales[16] == 0


@pytest.mark.parametrize(
    ("codes", "packed"),
    [
        ([[1, 2, 3, 4]], [[0x21, 0x43]]),
        ([[15, 0, 0, 15]], [[0x0F, 0xF0]]),
        ([[8, 9, 10]], [[0x98, 0x0A]]),  # an odd count: the last high nibble is empty
        ([[7]], [[7]]),
    ],
)
def test_the_first_of_two_codes_is_in_the_low_nibble(codes: list[list[int]], packed: list[list[int]]) -> None:
    result = pack_nibbles(torch.tensor(codes, dtype=torch.uint8))
    assert result.dtype == np.uint8
    assert result.tolist() == packed


def test_every_row_is_worked_on_once() -> None:
    seen: list[int] = []
    for_row_chunks(1000, 4096, lambda start, stop: seen.extend(range(start, stop)))
    assert sorted(seen) == list(range(1000))


def test_a_failure_in_a_chunk_comes_out_and_leaves_the_thread_count() -> None:
    threads = torch.get_num_threads()

    def work(start: int, stop: int) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        for_row_chunks(10, 4096, work)
    assert torch.get_num_threads() == threads
