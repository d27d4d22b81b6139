"""Automatic masks: the grid, what is dropped, and which mask a phrase gets."""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.automatic import (
    Automatic,
    box_iou,
    find_masks,
    mask_boxes,
    point_grid,
    regions,
    remove_small_regions,
    suppress,
)
from agevlm_mlx.sam.protocol import Candidates

HEIGHT, WIDTH = 30, 50


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@dataclass
class Things:
    """A look at an image of things: a point gives the masks of all things that it is in."""

    things: list[tuple[np.ndarray, float, float]]
    asked: int = 0
    calls: int = 0

    features = np.zeros((4, 4, 2), np.float32)

    def candidates(self, points, *, min_iou, min_stability, offset=1.0):
        self.asked += len(points)
        self.calls += 1
        hit = [
            (mask, iou, stability)
            for x, y in points
            for mask, iou, stability in self.things
            if mask[int(y), int(x)] and iou > min_iou and stability >= min_stability
        ]
        masks = np.array([mask for mask, _, _ in hit], bool).reshape(-1, HEIGHT, WIDTH)
        scores = np.array([s for _, *s in hit], np.float32).reshape(-1, 2)
        return Candidates(masks, scores[:, 0], scores[:, 1])


BIG, SMALL, OTHER = rectangle(2, 2, 30, 28), rectangle(10, 8, 20, 18), rectangle(33, 5, 49, 25)


def found(*things, **settings):
    look = Things([(mask, *scores) for mask, *scores in things])
    return find_masks(look, HEIGHT, WIDTH, Automatic(points_per_side=10, **settings))


def test_the_grid_is_the_middles_of_equal_parts():
    grid = point_grid(2, 30, 50)
    assert grid.tolist() == [[12.5, 7.5], [37.5, 7.5], [12.5, 22.5], [37.5, 22.5]]


def test_every_point_is_asked_about_in_pieces():
    look = Things([(BIG, 0.9, 1.0)])
    find_masks(look, HEIGHT, WIDTH, Automatic(points_per_side=10))
    assert (look.asked, look.calls) == (100, 2)


def test_each_thing_is_found_once_the_best_estimate_first():
    masks = found((BIG, 0.91, 0.99), (SMALL, 0.95, 0.97), (OTHER, 0.93, 0.96))
    np.testing.assert_allclose(masks.iou, [0.95, 0.93, 0.91], rtol=1e-6)
    np.testing.assert_allclose(masks.stability, [0.97, 0.96, 0.99], rtol=1e-6)
    for number, mask in enumerate((SMALL, OTHER, BIG)):
        assert np.array_equal(masks.mask(number), mask)
    assert masks.boxes.tolist() == [[10, 8, 19, 17], [33, 5, 48, 24], [2, 2, 29, 27]]


def test_uncertain_and_unstable_masks_are_dropped():
    scores = [(BIG, 0.88, 1.0), (SMALL, 0.9, 0.94), (OTHER, 0.9, 0.95)]
    masks = found(*scores)
    assert len(masks.iou) == 1
    assert np.array_equal(masks.mask(0), OTHER)
    assert len(found(*scores, pred_iou_thresh=0.5, stability_score_thresh=0.5).iou) == 3


def test_of_nearly_the_same_box_the_better_mask_stays():
    wider = rectangle(2, 2, 32, 28)  # IoU 28/30 with the other
    masks = found((BIG, 0.9, 1.0), (wider, 0.92, 1.0))
    assert len(masks.iou) == 1
    assert np.array_equal(masks.mask(0), wider)
    assert len(found((BIG, 0.9, 1.0), (wider, 0.92, 1.0), box_nms_thresh=0.95).iou) == 2


def test_a_box_takes_the_nearest_mask_and_none_that_is_far():
    masks = found((BIG, 0.91, 1.0), (SMALL, 0.95, 1.0), (OTHER, 0.93, 1.0))
    for prompt, mask in [((1, 1, 30, 28), BIG), ((10, 8, 20, 18), SMALL), ((30, 5, 50, 25), OTHER)]:
        chosen = masks.choose(prompt, 0.5)
        assert chosen is not None
        assert np.array_equal(masks.mask(chosen), mask)
    assert masks.choose((10, 8, 20, 18), 1.0) is not None  # the very box
    assert masks.choose((10, 8, 21, 18), 1.0) is None
    assert masks.choose((0, 0, 5, 5), 0.5) is None
    assert masks.choose((0, 0, 5, 5), 0.0) is not None


def test_a_point_takes_the_best_of_the_masks_it_is_in():
    masks = found((BIG, 0.91, 1.0), (SMALL, 0.95, 1.0), (OTHER, 0.93, 1.0))
    for point, mask in [((12.5, 9), SMALL), ((3, 3), BIG), ((48.9, 24.5), OTHER)]:
        chosen = masks.choose(point, 0.5)
        assert chosen is not None
        assert np.array_equal(masks.mask(chosen), mask)
    assert masks.choose((31, 1), 0.5) is None
    assert masks.choose((WIDTH, HEIGHT), 0.5) is None  # the corner, a pixel of the image


def test_an_image_without_masks_gives_none():
    masks = found()
    assert len(masks.iou) == 0
    assert masks.choose((1, 1, 5, 5), 0.5) is None
    assert masks.choose((1, 1), 0.5) is None


def test_boxes_of_masks():
    masks = np.stack(
        [rectangle(3, 4, 9, 5), np.zeros((HEIGHT, WIDTH), bool), rectangle(0, 0, 1, 1)]
    )
    assert mask_boxes(masks).tolist() == [[3, 4, 8, 4], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mask_boxes(masks[:0]).shape == (0, 4)


def test_overlap_of_boxes():
    overlap = box_iou(
        np.array([0, 0, 4, 4.0]), np.array([[0, 0, 4, 4], [2, 2, 6, 6], [4, 0, 8, 4], [1, 1, 1, 1]])
    )
    np.testing.assert_allclose(overlap, [1, 4 / 28, 0, 0])


def test_non_maximum_suppression_keeps_the_best_of_each_heap():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [0, 0, 10, 9.0]])
    scores = np.array([0.5, 0.9, 0.1, 0.6])
    assert suppress(boxes, scores, 0.5).tolist() == [1, 2]
    assert suppress(boxes, scores, 0.85).tolist() == [1, 3, 2]
    assert suppress(boxes, scores, 0.95).tolist() == [1, 3, 0, 2]
    assert suppress(boxes[:0], scores[:0], 0.5).tolist() == []


def flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The regions of a mask by flooding, over edges and corners."""
    left = set(zip(*(part.tolist() for part in np.nonzero(mask)), strict=True))
    pieces = []
    while left:
        piece, front = set(), deque([left.pop()])
        while front:
            y, x = front.popleft()
            piece.add((y, x))
            for near in [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    front.append(near)
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("seed", range(40))
def test_regions_are_those_of_flooding(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 14, 2)
    mask = rng.random(shape) < rng.choice([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
    labels, sizes = regions(mask)
    pieces = flooded(mask)
    assert len(sizes) == len(pieces)
    assert np.array_equal(labels > 0, mask)
    for piece in pieces:
        (label,) = {int(labels[at]) for at in piece}
        assert sizes[label - 1] == len(piece)


def test_small_islands_and_holes_go_and_the_largest_island_stays():
    mask = rectangle(5, 5, 25, 25)
    mask[10:12, 10:12] = False
    mask[1, 1:4] = True
    islands, changed = remove_small_regions(mask, 4, islands=True)
    assert changed
    assert not islands[1].any()
    assert not islands[10, 10]
    holes, changed = remove_small_regions(islands, 5, islands=False)
    assert changed
    assert np.array_equal(holes, rectangle(5, 5, 25, 25))
    assert not remove_small_regions(holes, 5, islands=True)[1]
    assert not remove_small_regions(mask, 3, islands=True)[1]  # three pixels are not fewer
    only, _ = remove_small_regions(rectangle(1, 1, 3, 2) | rectangle(9, 9, 12, 10), 9, islands=True)
    assert np.array_equal(only, rectangle(9, 9, 12, 10))


def test_masks_that_cleaning_makes_alike_are_one():
    dotted = BIG.copy()
    dotted[0, 45:47] = True  # an island far away: another box
    masks = found((BIG, 0.9, 1.0), (dotted, 0.95, 1.0), box_nms_thresh=0.6)
    assert len(masks.iou) == 2
    masks = found((BIG, 0.9, 1.0), (dotted, 0.95, 1.0), box_nms_thresh=0.6, min_mask_region_area=5)
    assert len(masks.iou) == 1
    assert np.array_equal(masks.mask(0), BIG)
    assert masks.iou[0] == np.float32(0.9)  # the one that needed no cleaning


@pytest.mark.parametrize(
    "settings",
    [
        {"points_per_side": 0},
        {"points_per_side": 1000},
        {"pred_iou_thresh": 1.5},
        {"match_thresh": -0.1},
        {"min_mask_region_area": -1},
        {"box_nms_thresh": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="automatic masks: expected"):
        Automatic(**settings)


def test_the_settings_in_words_tell_stores_apart():
    assert str(Automatic()) == "auto 32x32 points, iou 0.88, stability 0.95, nms 0.7, match 0.5"
    assert str(Automatic(min_mask_region_area=9)).endswith(", regions 9")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A file like Meta's: the embedded teacher, its one mask a point made into three."""
    import torch

    from agevlm_mlx.sam.architecture import META
    from agevlm_mlx.sam.teacher import Teacher

    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = Teacher(device="cpu")
    monkeypatch.setitem(META, "vit_b", replace(teacher.architecture, multimask=True))
    decoder: Any = teacher.sam.mask_decoder
    for k in (1, 2, 3):
        token = decoder.mask_tokens.weight.data
        token[k] = token[0] + 0.02 * torch.randn_like(token[0])
        mlps = decoder.output_hypernetworks_mlps
        mlps[k].load_state_dict(mlps[0].state_dict())
        mlps[k].layers[-1].bias.data += 0.1 * torch.randn_like(mlps[k].layers[-1].bias.data)
        head = decoder.iou_prediction_head.layers[-1]
        head.weight.data[k] = head.weight.data[0] * (1 + 0.05 * k)
        head.bias.data[k] = head.bias.data[0]
    torch.save(teacher.sam.state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


def picture(height: int, width: int) -> np.ndarray:
    """Part of a drawn scene."""
    scene = Image.fromarray(make_scene(4_000_000, "nouns", 3).image)
    side = max(height, width)
    return np.asarray(scene.resize((side, side)).crop((0, 0, width, height)))


@pytest.mark.parity
@pytest.mark.parametrize("size", [(128, 128), (60, 130), (200, 120)])
def test_the_masks_are_those_of_segment_anything(checkpoint, size):
    from segment_anything import (  # pyright: ignore[reportMissingImports]
        SamAutomaticMaskGenerator,
    )

    from agevlm_mlx.sam.teacher import Teacher

    teacher = Teacher(checkpoint, device="cpu")
    shares: Any = {"pred_iou_thresh": 0.05, "stability_score_thresh": 0.05, "box_nms_thresh": 0.8}
    settings = Automatic(points_per_side=8, **shares)
    image = picture(*size)
    generator = SamAutomaticMaskGenerator(teacher.sam, points_per_side=8, **shares)
    theirs = sorted(generator.generate(image), key=lambda mask: -mask["predicted_iou"])
    ours = find_masks(teacher.look(image), size[0], size[1], settings)
    assert len(theirs) >= 2
    assert len(ours.iou) == len(theirs)
    np.testing.assert_allclose(ours.iou, [m["predicted_iou"] for m in theirs], atol=1e-5)
    np.testing.assert_allclose(ours.stability, [m["stability_score"] for m in theirs], atol=1e-2)
    for number, mask in enumerate(theirs):
        assert (ours.mask(number) == mask["segmentation"]).mean() > 0.999
        x, y, width, height = mask["bbox"]
        np.testing.assert_allclose(ours.boxes[number], [x, y, x + width, y + height], atol=1)


@pytest.mark.parity
def test_mlx_finds_the_masks_that_torch_finds(checkpoint):
    from agevlm_mlx.sam.mlx_teacher import MlxTeacher
    from agevlm_mlx.sam.teacher import Teacher

    settings = Automatic(points_per_side=6, pred_iou_thresh=0.05, stability_score_thresh=0.05)
    image = picture(90, 128)
    torchs = find_masks(Teacher(checkpoint, device="cpu").look(image), 90, 128, settings)
    mlxs = find_masks(MlxTeacher(checkpoint).look(image), 90, 128, settings)
    assert len(torchs.iou) == len(mlxs.iou) >= 2
    np.testing.assert_allclose(mlxs.iou, torchs.iou, atol=1e-3)
    for number in range(len(torchs.iou)):
        assert (mlxs.mask(number) == torchs.mask(number)).mean() > 0.995
