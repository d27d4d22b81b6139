"""Run-length masks (COCO), coverage and pooled features."""

import contextlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from agevlm_mlx.errors import UserError
from agevlm_mlx.sam import targets

#: The example of pycocotools' own tests (9 x 10 pixels), runs and compressed string.
COCO_RUNS = [6, 1, 40, 4, 5, 4, 5, 4, 21]
COCO_STRING = "61X13mN000`0"


def from_runs(runs: list[int], height: int, width: int) -> np.ndarray:
    """A mask filled pixel by pixel down the columns, as COCO's format says."""
    values = [i % 2 == 1 for i, run in enumerate(runs) for _ in range(run)]
    mask = np.zeros((height, width), dtype=bool)
    for position, value in enumerate(values):
        mask[position % height, position // height] = value
    return mask


def test_runs_go_down_the_columns_and_start_with_zeros():
    mask = np.array([[0, 1, 1], [1, 1, 0]], dtype=bool)  # columns: 01 11 10
    assert targets.rle_encode(mask, compressed=False) == {"size": [2, 3], "counts": [1, 4, 1]}
    np.testing.assert_array_equal(targets.rle_decode({"size": [2, 3], "counts": [1, 4, 1]}), mask)


def test_a_mask_that_starts_with_one_has_an_empty_first_run():
    mask = np.array([[1, 0], [1, 0]], dtype=bool)
    assert targets.rle_encode(mask, compressed=False)["counts"] == [0, 2, 2]
    assert targets.rle_encode(mask)["counts"] == "022"


def test_the_compressed_string_is_the_one_of_coco():
    mask = from_runs(COCO_RUNS, 9, 10)
    assert targets.rle_encode(mask) == {"size": [9, 10], "counts": COCO_STRING}
    assert targets.rle_encode(mask, compressed=False)["counts"] == COCO_RUNS
    for counts in (COCO_STRING, COCO_STRING.encode(), COCO_RUNS):
        np.testing.assert_array_equal(targets.rle_decode({"size": [9, 10], "counts": counts}), mask)


@settings(max_examples=60, deadline=None)
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70)), st.booleans())
def test_encoding_and_decoding_give_the_mask_back(mask, compressed):
    np.testing.assert_array_equal(
        targets.rle_decode(targets.rle_encode(mask, compressed=compressed)), mask
    )


def test_long_runs_take_several_characters():
    mask = np.zeros((1000, 2000), dtype=bool)
    mask[100:900, 700] = True
    mask[:, 1999] = True
    np.testing.assert_array_equal(targets.rle_decode(targets.rle_encode(mask)), mask)


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ({"size": [2, 2]}, "'counts'"),
        (None, "COCO RLE"),
        ({"size": [2], "counts": [4]}, "height, width"),
        ({"size": [0, 2], "counts": []}, "height, width"),
        ({"size": [True, 2], "counts": [2]}, "height, width"),
        ({"size": [100_000, 100_000], "counts": [1]}, "at most"),
        ({"size": [2, 2], "counts": [3]}, "add up to 2 x 2 = 4"),
        ({"size": [2, 2], "counts": [-1, 5]}, "runs of 0 to 4"),
        ({"size": [2, 2], "counts": [2**62, 2**62, 2**62, 2**62, 4]}, "runs of 0 to 4"),
        ({"size": [2, 2], "counts": [2**70]}, "longer than any image"),
        ({"size": [2, 2], "counts": [1.0, 3]}, "whole numbers"),
        ({"size": [2, 2], "counts": {}}, "whole numbers"),
        ({"size": [2, 2], "counts": "é4"}, "a character"),
        ({"size": [2, 2], "counts": "!4"}, "a character"),
        ({"size": [2, 2], "counts": "X"}, "stops inside a number"),
        ({"size": [2, 2], "counts": "o" * 20 + "0"}, "longer than any image"),
        ({"size": [2, 2], "counts": ""}, "add up to"),
    ],
)
def test_a_malformed_mask_is_one_line_that_says_what_is_wrong(rle, says):
    with pytest.raises(UserError, match=says) as caught:
        targets.rle_decode(rle)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.lists(st.integers(-5, 2**65), max_size=6))
def test_no_counts_do_anything_but_decode_or_explain(counts):
    with contextlib.suppress(UserError):
        assert targets.rle_decode({"size": [3, 3], "counts": counts}).shape == (3, 3)


def test_iou_of_masks():
    a = np.zeros((3, 4, 4), dtype=bool)
    b = a.copy()
    a[0, :2], b[0, 1:3] = True, True
    a[1], b[1] = True, True
    np.testing.assert_allclose(targets.mask_iou(a, b), [1 / 3, 1, 0], rtol=1e-6)


def test_stored_coverage_is_close_and_keeps_empty_and_full():
    coverage = np.linspace(0, 1, 333, dtype=np.float32)
    back = targets.dequantise(targets.quantise(coverage))
    np.testing.assert_allclose(back, coverage, atol=0.5 / 255 + 1e-6)
    assert (back[0], back[-1]) == (0.0, 1.0)


@dataclass(frozen=True)
class Placement:
    """A geometry with one scale: input = source * scale + offset."""

    width: int
    height: int
    image_size: int
    scale: float
    offset: tuple[float, float] = (0.0, 0.0)

    def to_source(self, points: np.ndarray) -> np.ndarray:
        return (points - np.asarray(self.offset)) / self.scale


def test_a_square_image_on_a_coarser_grid_is_block_averaged():
    features = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
    pooled = targets.pool_features(features, Placement(100, 100, 64, 0.64), (4, 2))
    expected = features.reshape(4, 2, 2, 4, 3).mean((1, 3)).reshape(8, 3)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


@pytest.mark.parametrize("upright", [False, True])
def test_neither_sams_padding_nor_the_students_contributes(upright):
    # 100 x 50: SAM's lower half is padding; the student pads above and below.
    features = np.full((8, 8, 2), 1e9, dtype=np.float32)
    features[:4] = 1.0 + np.arange(8)[None, :, None]
    geometry = Placement(100, 50, 64, 0.64, offset=(0.0, 16.0))
    expected = features[:4].copy()
    if upright:
        features = features.swapaxes(0, 1)
        geometry = Placement(50, 100, 64, 0.64, offset=(16.0, 0.0))
    pooled = targets.pool_features(features, geometry, (8, 8)).reshape(8, 8, 2)
    if upright:
        pooled = pooled.swapaxes(0, 1)
    np.testing.assert_allclose(pooled[2:6], expected, atol=1e-5)
    assert not pooled[:2].any()
    assert not pooled[6:].any()


def test_a_crop_pools_the_part_of_the_image_that_the_student_sees():
    # The student crops the middle half of a 100 x 50 image.
    features = np.zeros((8, 8, 1), dtype=np.float32)
    features[:4] = np.arange(8)[None, :, None]
    geometry = Placement(100, 50, 64, 1.28, offset=(-32.0, 0.0))
    pooled = targets.pool_features(features, geometry, (1, 4)).ravel()
    np.testing.assert_allclose(pooled, [2, 3, 4, 5], atol=1e-5)
