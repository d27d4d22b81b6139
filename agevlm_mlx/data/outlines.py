"""Outlines of things, as COCO's annotations have them: boxes, polygons and run lengths (RLE)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..sam.targets import MAX_PIXELS, rle_decode, rle_encode
from .records import numbers

#: A corner of an outline is at most so far from the picture, in pixels.
_FAR = 1e6
#: Edges crossed by rows at a time.
_CROSSINGS = 1 << 20
Box = tuple[float, float, float, float]


def instance_box(item: Mapping[str, Any], size: tuple[int, int], where: str) -> Box | None:
    """x0 y0 x1 y1 of an annotation's bbox (x y width height), cut at the picture: COCO's own reach
    a hundredth of a pixel out of it. None for a box without area."""
    x, y, width, height = numbers(item, "bbox", 4, where) or (0.0, 0.0, -1.0, -1.0)
    outside = x >= size[1] or y >= size[0] or x + width < 0 or y + height < 0
    if width < 0 or height < 0 or outside:
        raise UserError(
            f"{where}: expected a bbox x y width height in a picture of {size[1]}x{size[0]}, "
            f"got {item.get('bbox')!r}"
        )
    box = max(x, 0.0), max(y, 0.0), min(x + width, size[1]), min(y + height, size[0])
    return box if box[0] < box[2] and box[1] < box[3] else None


def check_outline(segmentation: Any, size: tuple[int, int], where: str) -> None:
    """``UserError`` unless it is RLE of a picture of `size` (h, w), polygons, or nothing."""
    if segmentation is None or segmentation == []:
        return
    if isinstance(segmentation, dict):
        got = segmentation.get("size")
        if got != list(size):
            raise UserError(f"{where}: expected a mask of {list(size)}, got {got!r:.40}")
        try:
            rle_decode(segmentation)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return
    try:
        if not isinstance(segmentation, list):
            raise TypeError(f"got {segmentation!r:.40}")
        for polygon in segmentation:
            corners = np.array(polygon, np.float64)
            if corners.ndim != 1 or corners.size % 2 or corners.size < 4:
                raise ValueError("expected x y x y ...")
            if not (np.abs(corners) < _FAR).all():
                raise ValueError("far outside of any picture")
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: not as COCO tables are: expected polygons or RLE in 'segmentation': {error}"
        ) from None


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around all boxes."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def boxes_mask(boxes: Sequence[Box], size: tuple[int, int]) -> dict[str, Any] | None:
    """RLE of the pixels in any of the boxes, of a picture of `size` (h, w)."""
    return union([(box, {"segmentation": [_rectangle(box)]}, "") for box in boxes], size)


def union(
    things: Sequence[tuple[Box, Mapping[str, Any], str]], size: tuple[int, int]
) -> dict[str, Any] | None:
    """RLE of all things (box, checked annotation, where), None if none of them has an outline."""
    outlines = [item.get("segmentation") for _, item, _ in things]
    if not any(outlines):
        return None
    if any(isinstance(outline, dict) for outline in outlines):
        masks = [
            instance_mask({"segmentation": outline or [_rectangle(box)]}, size, where)
            for outline, (box, _, where) in zip(outlines, things, strict=True)
        ]
        return rle_encode(np.any(masks, axis=0))
    polygons = [
        np.array(polygon, np.float64).reshape(-1, 2)
        for outline, (box, _, _) in zip(outlines, things, strict=True)
        for polygon in (outline or [_rectangle(box)])
    ]
    # Drawn on as much of the picture as they need: a fraction of the time of the whole.
    corners = np.concatenate(polygons)
    (x0, y0), (x1, y1) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    left, top = min(max(int(x0) - 1, 0), size[1] - 1), min(max(int(y0) - 1, 0), size[0] - 1)
    right, bottom = (
        min(max(int(x1) + 2, left + 1), size[1]),
        min(max(int(y1) + 2, top + 1), size[0]),
    )
    moved = [(polygon - (left, top)).ravel().tolist() for polygon in polygons]
    return rle_encode(_drawn(moved, right - left, bottom - top), size=size, corner=(top, left))


def _rectangle(box: Box) -> list[float]:
    # Whole pixels that the box touches.
    x0, y0, x1, y1 = int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3]))
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _drawn(polygons: Iterable[Any], width: int, height: int) -> np.ndarray:
    """bool [height width] of the pixels whose middle is in a polygon; one that overlaps itself
    has holes there. As pycocotools counts them, but for rounding on the border."""
    inside = np.zeros((height, width), np.bool_)
    for polygon in polygons:
        corners = np.array(polygon, np.float64).reshape(-1, 2)
        if not np.isfinite(corners).all():
            raise ValueError("expected finite corners")
        # Of those columns and rows is the part of the picture that has to be looked at.
        (left, top), (right, bottom) = (
            np.clip(np.ceil(end - 0.5), 0, (width, height)).astype(int)
            for end in (corners.min(axis=0), corners.max(axis=0))
        )
        part = inside[top:bottom, left:right]
        if part.size:
            part |= _filled(corners - (left, top), right - left, bottom - top)
    return inside


def _filled(corners: np.ndarray, width: int, height: int) -> np.ndarray:
    """The same of one polygon, f64 [corners 2]: a row changes sides where it crosses an edge."""
    ends = np.roll(corners, -1, axis=0)
    upper, lower = np.minimum(corners, ends)[:, 1], np.maximum(corners, ends)[:, 1]
    first, last = (np.clip(np.ceil(y - 0.5), 0, height).astype(int) for y in (upper, lower))
    crossed = last - first
    changes = np.zeros((height, width + 1), np.bool_)
    # Some edges at a time: many long ones cross more rows than there is memory for.
    for some in np.array_split(np.arange(len(corners)), 1 + int(crossed.sum()) // _CROSSINGS):
        edge = np.repeat(some, crossed[some])
        rows = np.arange(edge.size) - np.repeat(
            np.cumsum(crossed[some]) - crossed[some], crossed[some]
        )
        rows += first[edge]
        (x0, y0), (x1, y1) = corners[edge].T, ends[edge].T
        x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
        np.logical_xor.at(changes, (rows, columns), True)
    return np.logical_xor.accumulate(changes[:, :width], axis=1)


def instance_mask(item: Mapping[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """bool [h w] of an annotation's segmentation: RLE, or polygons of x y x y ... .

    item: the annotation; size: (h, w) of its image; `where` begins the error.
    """
    segmentation = item["segmentation"]
    if isinstance(segmentation, dict):
        try:
            mask = rle_decode(segmentation)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if mask.shape != size:
            raise UserError(f"{where}: expected a mask of {list(size)}, got {list(mask.shape)}")
        return mask
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        raise UserError(f"{where}: expected an image with pixels, got {size[1]}x{size[0]}")
    return _drawn(segmentation, size[1], size[0])
