"""COCO captions and instances as records: `captions.json`, `instances.json` and `images/`."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..config import read_json
from ..errors import UserError
from ..sam.targets import MAX_PIXELS, rle_decode, rle_encode
from .records import CAPTION_PROMPT, Phrase, Record, Turn, inside, numbers, with_images


def read_coco(captions: Path, instances: Path, images: Path) -> list[Record]:
    """COCO captions, their words tied to the instances of the category they name.

    A category is found in a caption as a whole word, also with a plural s, the longest name
    first ("hot dog" names no dog); its phrase covers all instances of it in the picture.
    """
    where = str(instances)
    try:
        tables = read_json(instances)
        names = {c["id"]: str(c["name"]) for c in tables["categories"]}
        sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in tables["images"]}
        objects: dict[Any, dict[str, list[tuple[str, dict]]]] = {}
        for n, item in enumerate(tables["annotations"], 1):
            where = f"{instances}: annotation {n}"
            own = objects.setdefault(item["image_id"], {})
            own.setdefault(names[item["category_id"]].lower(), []).append((where, item))
        by_length = sorted(map(re.escape, names.values()), key=len, reverse=True)
        pattern = re.compile(rf"\b({'|'.join(by_length)})(?=s?\b)", re.IGNORECASE)
        where = str(captions)
        texts = read_json(captions)
        files = {i["id"]: str(i["file_name"]) for i in texts["images"]}
        records = []
        for n, item in enumerate(texts["annotations"], 1):
            where = f"{captions}: annotation {n}"
            key, text = item["image_id"], str(item["caption"])
            if not text.strip():
                raise UserError(f"{where}: the caption is empty")
            image = inside(images, files[key], where)
            turns = (Turn("user", CAPTION_PROMPT), Turn("assistant", text))
            phrases = tuple(_found(pattern, text, objects.get(key, {}), sizes.get(key)))
            records.append(Record(str(item["id"]), image, turns, phrases, "caption"))
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: not as COCO tables are: {_brief(error)}") from None
    return with_images(records, captions)


def _brief(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _found(
    pattern: re.Pattern[str],
    text: str,
    objects: Mapping[str, list[tuple[str, dict]]],
    size: tuple[int, int] | None,
) -> Iterator[Phrase]:
    """A phrase for the first mention of every category that the picture has."""
    first: dict[str, tuple[int, int]] = {}
    for match in pattern.finditer(text):
        first.setdefault(match[1].lower(), match.span())
    for name, (start, end) in first.items():
        if name not in objects or size is None:
            continue
        mask = np.any([instance_mask(item, size, where) for where, item in objects[name]], axis=0)
        corners = np.array([_corners(item, size, where) for where, item in objects[name]])
        low, high = corners[:, :2].min(axis=0).tolist(), corners[:, 2:].max(axis=0).tolist()
        yield Phrase(text[start:end], 1, start, end, (*low, *high), None, rle_encode(mask))


def _corners(item: dict, size: tuple[int, int], where: str) -> tuple[float, ...]:
    """x0 y0 x1 y1 of a COCO box; COCO's own reach a hundredth of a pixel out of the picture."""
    x, y, width, height = numbers(item, "bbox", 4, where) or (0.0, 0.0, 0.0, 0.0)
    if not (width > 0 and height > 0 and x < size[1] and y < size[0] and x + width > 0):
        raise UserError(f"{where}: expected a bbox x y width height, got {item.get('bbox')!r}")
    return max(x, 0.0), max(y, 0.0), min(x + width, size[1]), min(y + height, size[0])


def instance_mask(item: dict, size: tuple[int, int], where: str) -> np.ndarray:
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
    canvas = Image.new("1", (size[1], size[0]))
    for polygon in segmentation:
        ImageDraw.Draw(canvas).polygon([float(v) for v in polygon], fill=1)
    return np.asarray(canvas)
