"""Outlines of things, as COCO's annotations have them: boxes, polygons and run lengths (RLE)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import UserError
from ..sam.targets import MAX_PIXELS, rle_decode, rle_encode
from .records import numbers

#: A corner of an outline is at most so far from the picture, in pixels.
_FAR = 1e6
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
    # Whole pixels that the box touches: a polygon's last row and column belong to it.
    x0, y0, x1, y1 = int(box[0]), int(box[1]), int(np.ceil(box[2])) - 1, int(np.ceil(box[3])) - 1
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _drawn(polygons: Iterable[Any], width: int, height: int) -> np.ndarray:
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        draw.polygon([float(v) for v in polygon], fill=1)
    return np.frombuffer(canvas.tobytes(), np.bool_).reshape(height, width)


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
