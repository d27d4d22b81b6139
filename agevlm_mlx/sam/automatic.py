"""Automatic masks: a teacher is asked about a grid of points, and each phrase gets what fits it.

The rules and their names are those of segment_anything's ``SamAutomaticMaskGenerator`` (Kirillov
et al. 2023, appendix B) without its crops: every point of the grid gives up to three masks; those
that the teacher thinks good and that hardly change with the threshold stay; of masks with nearly
the same box the best stays. numpy only; the teacher may be torch or MLX.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .protocol import Look, Prompt

#: Points that the mask decoder gets at once.
POINTS = 64


@dataclass(frozen=True, kw_only=True)
class Automatic:
    """How masks are found and matched. Defaults: Meta's, which are for its vit_h.

    Raises: ``UserError`` for a number out of its range.
    """

    points_per_side: int = 32
    #: Masks whose own estimate of their IoU is not above this are dropped.
    pred_iou_thresh: float = 0.88
    #: As are those whose IoU with themselves, thresholds +-1 apart, is below this,
    stability_score_thresh: float = 0.95
    #: and those whose box has a larger IoU than this with the box of a better one.
    box_nms_thresh: float = 0.7
    #: Holes and islands of fewer pixels are filled and removed; 0 leaves all.
    min_mask_region_area: int = 0
    #: A phrase's box takes the mask whose box is nearest, if their IoU is at least this.
    match_thresh: float = 0.5

    def __post_init__(self):
        shares = (
            self.pred_iou_thresh,
            self.stability_score_thresh,
            self.box_nms_thresh,
            self.match_thresh,
        )
        if not 1 <= self.points_per_side <= 128 or self.min_mask_region_area < 0:
            raise UserError(
                "automatic masks: expected 1 to 128 points per side and regions of 0 pixels or "
                f"more, got {self.points_per_side} and {self.min_mask_region_area}"
            )
        if not all(0 <= share <= 1 for share in shares):
            raise UserError(f"automatic masks: expected thresholds from 0 to 1, got {shares}")

    def __str__(self) -> str:
        """What the store says it was made with."""
        words = [
            f"auto {self.points_per_side}x{self.points_per_side} points",
            f"iou {self.pred_iou_thresh:g}",
            f"stability {self.stability_score_thresh:g}",
            f"nms {self.box_nms_thresh:g}",
            f"match {self.match_thresh:g}",
        ]
        small = self.min_mask_region_area
        return ", ".join([*words, *([f"regions {small}"] if small else [])])


@dataclass(frozen=True)
class Found:
    """The k masks of an image of h x w pixels, best estimate first.

    packed: u8 [k h ceil(w/8)], their bits. boxes: i64 [k 4], first and last column and row
    (x0 y0 x1 y1) of each; zeros for an empty mask. iou, stability: f32 [k].
    """

    packed: np.ndarray
    boxes: np.ndarray
    iou: np.ndarray
    stability: np.ndarray
    width: int

    def mask(self, number: int) -> np.ndarray:
        """bool [h w]."""
        return np.unpackbits(self.packed[number], axis=1, count=self.width).astype(bool)

    def choose(self, prompt: Prompt, match_thresh: float) -> int | None:
        """The number of the mask that fits a phrase, or None if none does.

        For a box (x0, y0, x1, y1) the mask whose own box has the highest IoU with it, if that
        reaches `match_thresh`; for a point (x, y) the best of the masks that contain it.
        """
        if not len(self.iou):
            return None
        if len(prompt) == 4:
            own = self.boxes + np.array([0, 0, 1, 1])  # to the far edges of the last pixels
            overlap = box_iou(np.asarray(prompt, np.float64), own)
            best = int(overlap.argmax())
            return best if overlap[best] >= match_thresh else None
        height = self.packed.shape[1]
        x = min(max(int(prompt[0]), 0), self.width - 1)
        y = min(max(int(prompt[1]), 0), height - 1)
        inside = np.flatnonzero(self.packed[:, y, x // 8] >> (7 - x % 8) & 1)
        return int(inside[0]) if len(inside) else None  # the best estimate comes first


def point_grid(points_per_side: int, height: int, width: int) -> np.ndarray:
    """f64 [n*n 2]: the middles of n x n equal parts of an image, row by row, as (x, y)."""
    middles = (np.arange(points_per_side) + 0.5) / points_per_side
    x, y = np.meshgrid(middles * width, middles * height)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def find_masks(look: Look, height: int, width: int, settings: Automatic) -> Found:
    """All good masks of an image of height x width pixels, without repetitions."""
    points = point_grid(settings.points_per_side, height, width)
    packed, boxes, iou, stability = [], [], [], []
    for start in range(0, len(points), POINTS):
        some = look.candidates(
            points[start : start + POINTS],
            min_iou=settings.pred_iou_thresh,
            min_stability=settings.stability_score_thresh,
        )
        packed.append(np.packbits(some.masks, axis=2))  # a vit_h finds hundreds, of 300 kB each
        boxes.append(mask_boxes(some.masks))
        iou.append(some.iou)
        stability.append(some.stability)
    found = Found(
        np.concatenate(packed),
        np.concatenate(boxes),
        np.concatenate(iou),
        np.concatenate(stability),
        width,
    )
    found = _take(found, suppress(found.boxes, found.iou, settings.box_nms_thresh))
    if settings.min_mask_region_area and len(found.iou):
        found = _without_small_regions(found, settings)
    return found


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """i64 [k 4]: first and last column and row (x0 y0 x1 y1) of masks bool [k h w]; 0 if empty."""
    columns, rows = np.any(masks, axis=1, keepdims=True), np.any(masks, axis=2, keepdims=True)
    x0, x1 = _ends(columns[:, 0])
    y0, y1 = _ends(rows[:, :, 0])
    return np.stack([x0, y0, x1, y1], axis=1) * rows.any(axis=1)


def _ends(filled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the first and of the last True in each row of bool [k n]."""
    return filled.argmax(axis=1), filled.shape[1] - 1 - filled[:, ::-1].argmax(axis=1)


def box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """f64 [k]: intersection over union of a box (x0 y0 x1 y1) with boxes [k 4]; 0 if both are
    empty."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    both = np.clip(high - low, 0, None).prod(axis=1)
    area = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return both / np.maximum(area - both, 1e-9)


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Non-maximum suppression: numbers i64 [n] of the boxes [k 4] that stay, best score first.

    A box goes if its IoU with a better one that stays is above `threshold`.
    """
    order = np.argsort(-scores, kind="stable")
    kept = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(best)
        order = order[box_iou(boxes[best], boxes[order]) <= threshold]
    return np.array(kept, dtype=np.int64)


def _take(found: Found, numbers: np.ndarray) -> Found:
    return Found(
        found.packed[numbers],
        found.boxes[numbers],
        found.iou[numbers],
        found.stability[numbers],
        found.width,
    )


def _without_small_regions(found: Found, settings: Automatic) -> Found:
    """Masks without small holes and islands; of those that became alike, untouched ones stay."""
    packed, changed = found.packed.copy(), np.zeros(len(found.iou), bool)
    for number in range(len(packed)):
        mask = found.mask(number)
        for island in (False, True):
            mask, touched = remove_small_regions(mask, settings.min_mask_region_area, island)
            changed[number] |= touched
        packed[number] = np.packbits(mask, axis=1)
    boxes = np.concatenate(
        [
            mask_boxes(np.unpackbits(packed[i : i + 1], axis=2, count=found.width).astype(bool))
            for i in range(len(packed))
        ]
    )
    cleaned = Found(packed, boxes, found.iou, found.stability, found.width)
    kept = suppress(boxes, (~changed).astype(np.float32), settings.box_nms_thresh)
    return _take(cleaned, kept[np.argsort(-found.iou[kept], kind="stable")])


def remove_small_regions(mask: np.ndarray, area: int, islands: bool) -> tuple[np.ndarray, bool]:
    """`mask` without islands (or else holes) of fewer than `area` pixels; whether it changed.

    Pixels hang together over edges and corners. If all islands are small the largest stays.
    """
    labels, sizes = regions(mask if islands else ~mask)
    small = sizes < area
    if not small.any():
        return mask, False
    if islands and small.all():
        small[sizes.argmax()] = False
    hit = np.concatenate([[False], small])[labels]
    return (mask & ~hit if islands else mask | hit), True


def regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected regions of mask bool [h w], over edges and corners.

    Returns labels i64 [h w], 0 outside and 1..n, and the regions' pixels i64 [n].
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    row, start = np.nonzero(steps == 1)  # runs of pixels, row by row
    stop = np.nonzero(steps == -1)[1]
    parent = np.arange(len(row))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = int(parent[run])
        return run

    first = np.searchsorted(row, np.arange(height + 1))
    for y in range(1, height):
        above, here = int(first[y - 1]), int(first[y])
        end_above, end = here, int(first[y + 1])
        while above < end_above and here < end:
            # Corners count: a run that stops where the other one starts touches it.
            if start[above] <= stop[here] and start[here] <= stop[above]:
                parent[root(here)] = root(above)
            if stop[above] < stop[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(run) for run in range(len(row))], dtype=np.int64)
    _, label = np.unique(roots, return_inverse=True)
    labels = np.zeros((height, width + 1), np.int64)
    np.add.at(labels, (row, start), label + 1)
    np.add.at(labels, (row, stop), -(label + 1))
    sizes = np.bincount(label, weights=stop - start, minlength=label.max(initial=-1) + 1)
    return labels.cumsum(axis=1)[:, :width], sizes.astype(np.int64)
