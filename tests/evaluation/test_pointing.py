"""Each number of a map against a table worked out by hand (the arithmetic is in the comments)."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm_mlx.data.image import Geometry, Preprocessor
from agevlm_mlx.evaluation import pointing

#: A picture of 4 x 4 px whose pixels are the input's and the cells.
SQUARE = Geometry(4, 4, 4, 1, 1, 0, 0)
#: 4 x 2 px between a row of padding above and one below.
WIDE = Geometry(4, 2, 4, 1, 1, 0, 1)
#: 8 x 4 px of which the input holds columns 2 to 5.
CROPPED = Geometry(8, 4, 4, 1, 1, -2, 0)


def mask_of(geometry: Geometry, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((geometry.height, geometry.width), bool)
    mask[rows, columns] = True
    return mask


def attention_of(**cells: float) -> np.ndarray:
    """f32[1 1 4 4] with ``r0c1=0.2`` in row 0, column 1."""
    grid = np.zeros((4, 4), np.float32)
    for name, value in cells.items():
        grid[int(name[1]), int(name[3])] = value
    return grid[None, None]


def test_every_number_of_a_square_picture():
    mask = mask_of(SQUARE, slice(0, 1), slice(0, 2))
    first = attention_of(r0c0=0.1, r0c1=0.1, r1c0=0.4, r2c2=0.1, r3c3=0.1)
    second = attention_of(r0c0=0.5, r0c1=0.1, r2c2=0.1, r3c3=0.1)
    heads = np.concatenate([first, second], 1)
    # Mean of the two: .3 .1 0 0 / .2 0 0 0 / 0 0 .1 0 / 0 0 0 .1, in all .8
    found = pointing.measures(heads, mask, SQUARE, null=np.array([[0.3, 0.1]]))
    assert found == {
        "peak": [0.5, 0.5],
        "hit": True,
        "near": True,
        "energy": pytest.approx(0.5),  # (.3 + .1) / .8
        "uniform": 2 / 16,
        "gain": pytest.approx(4.0),
        "nepg": pytest.approx((0.5 - 0.125) / 0.875),
        # .3 beats all 14 others; .1 beats 11, ties with 2, loses to .2
        "auroc": pytest.approx((14 + 12) / 28),
        "iou_half": pytest.approx(1 / 3),  # .3 and .2 are lit
        "best_iou": pytest.approx(1 / 2),  # only .3; with .2: 1/3, with all .1: 2/5, all: 2/16
        # mean .05, variance (.09 + .01 + .04 + .01 + .01) / 16 - .0025 = .0075; (.2 - .05) / sd
        "nss": pytest.approx(3**0.5, abs=1e-4),
        # p = .375 .125 .25 .125 .125: .375 ln(8/3) + .375 ln 8 + .25 ln 4, over ln 16
        "entropy": pytest.approx(0.538910, abs=1e-6),
        "sink": pytest.approx(0.375),
        "on_image": pytest.approx(0.8),
        "null": pytest.approx(0.2),
        "hit_half_heads": False,  # of the first head alone: its peak is in row 1
        "energy_half_heads": pytest.approx(0.2 / 0.8),
        # exp(-1.125) = .324652 and exp(-.125) = .882497 along a side, 2.414299 in all:
        # .324652 * (.324652 + .882497) / 2.414299^2
        "centre": pytest.approx(0.0672353, abs=1e-6),
        "centre_hit": False,
        "ideal_hit": True,
    }
    assert json.loads(json.dumps(found)) == found  # plain values


def test_every_number_of_a_letterboxed_picture():
    mask = mask_of(WIDE, slice(0, 2), slice(0, 2))  # its left half
    look = attention_of(r0c0=0.2, r1c0=0.3, r2c3=0.3, r3c3=0.2)  # .4 of it on padding
    found = pointing.measures(look, mask, WIDE)
    assert found == {
        "peak": [0.5, 0.5],  # row 1 of the grid is the picture's first
        "hit": True,
        "near": True,
        "energy": pytest.approx(0.3),  # what lies on padding is lost
        "uniform": 0.5,  # of the picture, not of the input
        "gain": pytest.approx(0.6),
        "nepg": pytest.approx(-0.4),
        # Only the picture's cells: .3 0 0 0 against .3 0 0 0
        "auroc": pytest.approx(0.5),
        "iou_half": pytest.approx(1 / 5),
        "best_iou": pytest.approx(4 / 8),  # the whole picture
        "nss": pytest.approx(0),
        # of all 16 cells: .4 ln 5 + .6 ln(10/3), over ln 16
        "entropy": pytest.approx(0.492737, abs=1e-6),
        "sink": pytest.approx(0.3),
        "on_image": pytest.approx(1.0),
        "hit_half_heads": True,  # one head is its own first half
        "energy_half_heads": pytest.approx(0.3),
        "centre": pytest.approx(0.5),  # by symmetry
        "centre_hit": False,  # the middle is the corner of pixel (1, 2), the first of the right
        "ideal_hit": True,
    }


def test_the_fullest_cell_of_a_hollow_thing_misses_it():
    """A frame of 4 x 4 px around a hole of 2 x 2, in the corner of a grid of cells of 4 px."""
    mask = np.zeros((16, 16), bool)
    mask[:4, :4] = True
    mask[1:3, 1:3] = False
    look = attention_of(r0c0=1.0)
    found = pointing.measures(look, mask, Preprocessor(image_size=16).geometry(16, 16))
    assert (found["hit"], found["ideal_hit"], found["near"]) == (False, False, True)


def test_a_look_at_the_padding_is_a_miss():
    mask = np.ones((2, 4), bool)
    found = pointing.measures(attention_of(r0c1=0.9), mask, WIDE)
    assert found["peak"] == [1.5, -0.5]
    assert (found["hit"], found["near"], found["energy"]) == (False, False, 0)
    # The mask is the whole picture: nothing to be better than.
    assert (found["uniform"], found["nepg"], found["auroc"]) == (1, None, None)
    assert found["centre"] == pytest.approx(1)


def test_a_cell_that_is_half_padding_counts_by_what_it_shows():
    geometry = Preprocessor(image_size=8, resize="pad").geometry(8, 3)
    # Rows 2, 3, 4 of 8: cells of 2 px, so row 1 of the grid is full and row 2 half.
    target = pointing.Target(mask_of(geometry, slice(2, 3), slice(0, 8)), geometry, (4, 4))
    assert target.shown.sum(1).tolist() == [0, 4, 2, 0]
    assert target.coverage.sum(1).tolist() == [0, 0, 2, 0]
    assert target.half_covered.sum(1).tolist() == [0, 0, 4, 0]
    assert target.uniform == pytest.approx(8 / 24)
    # Seen from the middle row (1.5 of 3 px): cell centres at 1/3 - .5 and 1 - .5 of the height.
    upper, lower = np.exp(-((1 / 6) ** 2) / 0.125), np.exp(-(0.5**2) / 0.125)
    assert target.centre == pytest.approx(lower * 2 / (upper * 4 + lower * 2))


def test_what_a_crop_removes_is_not_asked_for():
    assert (
        pointing.measures(attention_of(r0c0=1), mask_of(CROPPED, slice(4), slice(2)), CROPPED) == {}
    )
    # Of columns 1 and 2 only the second is seen: column 0 of the grid.
    look = attention_of(r0c0=0.25, r1c0=0.25, r2c0=0.25, r3c0=0.25)
    found = pointing.measures(look, mask_of(CROPPED, slice(4), slice(1, 3)), CROPPED)
    assert found["peak"] == [2.5, 0.5]
    assert found["uniform"] == 0.25
    for name in ("hit", "energy", "auroc", "iou_half", "best_iou"):
        assert found[name] == 1, name
    assert found["nss"] == pytest.approx((1 - 0.25) / np.sqrt(0.25 * 0.75))


def test_an_empty_mask_has_no_numbers():
    assert pointing.measures(attention_of(r0c0=1), np.zeros((4, 4), bool), SQUARE) == {}


@pytest.mark.parametrize(("column", "near"), [(7, True), (21, True), (22, False)])
def test_near_is_closer_than_15_pixels_of_224(column: int, near: bool):
    """The peak is in pixel (7, 7): cells are 14 px."""
    for k in (1, 2):  # and 30 where the picture is twice as large
        geometry = Geometry(224 * k, 224 * k, 224, 1 / k, 1 / k, 0, 0)
        mask = np.zeros((224 * k, 224 * k), bool)
        mask[7 * k, column * k] = True
        look = np.zeros((1, 1, 16, 16), np.float32)
        look[0, 0, 0, 0] = 1
        found = pointing.measures(look, mask, geometry)
        assert found["near"] is near
        assert found["hit"] is (column == 7)


def test_pixels_between_cells_are_interpolated():
    # Cell centres at x = 1 and 3: pixels .5 1.5 2.5 3.5 are 1 .75 .25 0
    look = np.array([[[[0.8, 0.0]]]], np.float32)
    found = pointing.measures(look, mask_of(SQUARE, slice(4), slice(1, 2)), SQUARE)
    assert found["iou_half"] == pytest.approx(1 / 2)
    assert found["best_iou"] == pytest.approx(1 / 2)
    # mean .5, variance (.25 + .0625) / 2
    assert found["nss"] == pytest.approx(0.25 / 0.15625**0.5, abs=1e-5)


@pytest.mark.parametrize("size", [(4, 4), (37, 61), (90, 20)])
@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_looking_everywhere_is_no_better_than_even(size: tuple[int, int], resize: str):
    geometry = Preprocessor(image_size=24, resize=resize).geometry(*size)  # pyright: ignore[reportArgumentType]
    width, height = size
    middle = (slice(height // 3, height // 3 * 2), slice(width // 3, width // 2))
    mask = mask_of(geometry, *middle)
    even = np.full((1, 1, 6, 6), 0.3 / 36)
    found = pointing.measures(even, mask, geometry)
    assert (found["auroc"], found["nss"]) == (0.5, 0)
    assert found["entropy"] == pytest.approx(1)
    assert found["best_iou"] == found["iou_half"]
    seen = geometry.filled if resize == "pad" else 1  # the rest of it is on padding
    assert found["gain"] == pytest.approx(seen, abs=1e-5)
    assert (found["gain"] < 0.9) == (resize == "pad" and size != (4, 4))
    # An object in the middle gets more than its share of a centred Gaussian
    assert found["centre"] > found["uniform"]


def test_no_attention_at_all_says_nothing():
    found = pointing.measures(np.zeros((2, 2, 4, 4)), mask_of(SQUARE, slice(2), slice(2)), SQUARE)
    assert [found[k] for k in ("energy", "gain", "on_image", "sink", "iou_half", "nss")] == [0] * 6
    assert (found["auroc"], found["entropy"]) == (0.5, 1)


def test_the_last_bits_of_an_even_map_say_nothing():
    even = np.full((1, 1, 4, 4), 1 / 16) * (1 + 3e-7 * np.random.default_rng(0).random((4, 4)))
    found = pointing.measures(even, mask_of(SQUARE, slice(1), slice(2)), SQUARE)
    assert (found["nss"], found["iou_half"], found["best_iou"]) == (0, 2 / 16, 2 / 16)


def test_half_the_maximum_is_lit():
    look = attention_of(r0c0=0.6, r1c0=0.3, r2c0=0.2)
    # Two pixels of 16, both in the mask of four
    assert pointing.measures(look, mask_of(SQUARE, slice(4), slice(1)), SQUARE)["iou_half"] == 0.5


def test_a_cell_counts_as_covered_by_the_part_that_is_picture():
    # 8 x 5 px at the top of 8 x 8: of the lower cells (4 px) only the first row is picture.
    geometry = Geometry(8, 5, 8, 1, 1, 0, 0)
    target = pointing.Target(mask_of(geometry, slice(3, 5), slice(0, 8)), geometry, (2, 2))
    assert target.coverage.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert target.half_covered.tolist() == [[False, False], [True, True]]


def test_a_small_object_is_the_cells_that_it_covers_most():
    geometry = Geometry(8, 8, 8, 1, 1, 0, 0)
    mask = mask_of(geometry, slice(0, 1), slice(0, 1))  # a quarter of a cell of 2 px
    look = np.zeros((4, 4))
    look[0, 0] = 1
    assert pointing.Target(mask, geometry, (4, 4)).auroc(look) == 1
    assert pointing.Target(mask, geometry, (4, 4)).auroc(1 - look) == 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_best_threshold_is_the_best_of_all(seed: int):
    rng = np.random.default_rng(seed)
    mask, look = rng.random((4, 4)) < 0.4, rng.integers(0, 6, (4, 4)) / 10
    if not mask.any() or not look.any():
        return
    target = pointing.Target(mask, SQUARE, (4, 4))
    tried = [((look >= t) & mask).sum() / ((look >= t) | mask).sum() for t in np.unique(look)]
    assert target.best_iou(look) == pytest.approx(max(tried))
    assert target.best_iou(look) >= target.iou_half(look)


def test_a_shrunk_mask_lies_on_the_same_cells():
    geometry = Preprocessor(image_size=32, resize="pad").geometry(640, 480)
    mask = mask_of(geometry, slice(120, 240), slice(320, 480))
    small, place = pointing.shrunk(mask, geometry, 64)
    assert small.shape == (48, 64)
    assert small.sum() == 12 * 16
    assert place.mask_to_grid(small, (8, 8)) == pytest.approx(geometry.mask_to_grid(mask, (8, 8)))
    assert pointing.shrunk(small, place, 64)[0] is small
    look = np.random.default_rng(0).random((1, 1, 8, 8))
    fine, coarse = (pointing.measures(look, *pair) for pair in ((mask, geometry), (small, place)))
    assert coarse["iou_half"] == pytest.approx(fine["iou_half"], abs=0.05)
    assert coarse["energy"] == pytest.approx(fine["energy"])
