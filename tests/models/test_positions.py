"""Position tables resampled: what must hold by itself, and against torch (parity tier)."""

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.models.vision.positions import cubic, resample, triangle

WEIGHTS = pytest.mark.parametrize("weights", [cubic, triangle])
#: Length of an axis before and after: up, down, odd, by one, from and to a single cell.
RATIOS = [(4, 8), (16, 24), (24, 16), (7, 16), (16, 7), (27, 37), (14, 13), (1, 3), (5, 1)]


@WEIGHTS
@pytest.mark.parametrize(("source", "target"), RATIOS)
def test_a_constant_stays_one_and_the_axis_is_symmetric(weights, source, target):
    matrix = weights(source, target)
    assert matrix.shape == (target, source)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)


@WEIGHTS
def test_the_same_length_changes_nothing(weights):
    np.testing.assert_allclose(weights(9, 9), np.eye(9), atol=1e-12)


def test_only_the_triangle_averages_what_a_shrunk_cell_covers():
    assert (cubic(12, 3) != 0).sum(1).max() == 4
    assert (triangle(12, 3) != 0).sum(1).max() == 8


def test_rows_are_laid_out_one_after_the_other():
    rows, columns = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")
    table = mx.array(np.stack([rows, columns], -1).reshape(16, 2).astype(np.float32))
    out = np.array(resample(table, (2, 8), triangle)).reshape(2, 8, 2)
    assert (np.ptp(out[..., 0], axis=1) < 1e-6).all()
    assert (np.diff(out[..., 0], axis=0) > 1).all()
    assert (np.ptp(out[..., 1], axis=0) < 1e-6).all()
    assert (np.diff(out[..., 1], axis=1) > 0).any()


@WEIGHTS
def test_rows_that_belong_to_no_place_are_kept(weights):
    table = mx.random.normal((1 + 9, 5))
    out = resample(table, (5, 5), weights, class_rows=1)
    assert out.shape == (26, 5)
    assert mx.array_equal(out[:1], table[:1])
    assert mx.array_equal(out[1:], resample(table[1:], (5, 5), weights))


@WEIGHTS
def test_the_dtype_is_the_tables_and_the_arithmetic_is_float32(weights):
    table = mx.random.normal((16, 6)).astype(mx.bfloat16)
    out = resample(table, (7, 7), weights)
    assert out.dtype == mx.bfloat16
    exact = resample(table.astype(mx.float32), (7, 7), weights)
    assert mx.array_equal(out, exact.astype(mx.bfloat16))


@pytest.mark.parametrize(
    ("shape", "class_rows"),
    [((16, 3), 0), ((17, 3), 1), ((12, 3), 0), ((16, 3), 1), ((16,), 0), ((), 1), ((0, 3), 1)],
)
def test_a_table_that_fits_or_has_no_square_grid_is_returned_as_it_is(shape, class_rows):
    table = mx.zeros(shape)
    assert resample(table, (4, 4), cubic, class_rows) is table


@pytest.mark.parity
@pytest.mark.parametrize(
    ("weights", "options"),
    [(cubic, {"mode": "bicubic"}), (triangle, {"mode": "bilinear", "antialias": True})],
    ids=["bicubic", "antialiased bilinear"],
)
@pytest.mark.parametrize(("source", "target"), RATIOS)
def test_it_is_torchs_interpolation(weights, options, source, target):
    from torch import from_numpy
    from torch.nn.functional import interpolate

    grid = (target, max(target - 2, 1))  # another ratio across than down
    table = np.random.default_rng(0).normal(size=(source * source, 3)).astype(np.float32)
    picture = from_numpy(table.reshape(1, source, source, 3)).permute(0, 3, 1, 2)
    want = interpolate(picture, size=grid, align_corners=False, **options)
    got = np.array(resample(mx.array(table), grid, weights)).reshape(*grid, 3)
    np.testing.assert_allclose(got, want[0].permute(1, 2, 0).numpy(), atol=1e-5, rtol=0)
