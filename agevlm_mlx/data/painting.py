"""Paint one embedded picture: OpenMoji sprites on a procedural background, with exact masks."""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
from PIL import Image

from .nouns import ALL_NOUNS, SPLITS, Split, sample_nouns

SIDE = 128  # px of a picture
ATLAS, ATLAS_COLUMNS, TILE = "openmoji.png", 13, 96
#: Sprite sides in px; the gap keeps "big or small" answerable.
SIZES: dict[str, tuple[int, int]] = {"small": (30, 40), "big": (50, 65)}
_MAX_OVERLAP = 0.10  # of the smaller sprite's square
_MIN_VISIBLE = 0.75  # of a sprite's own pixels


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is true about it.

    image: uint8 [128 128 3]; masks: bool [n 128 128], the visible pixels; boxes: int
    [n 4], x0 y0 x1 y1 around them (x1, y1 exclusive). Objects are listed back to front.
    """

    image: np.ndarray
    nouns: tuple[str, ...]
    sizes: tuple[Literal["small", "big"], ...]
    masks: np.ndarray
    boxes: np.ndarray

    def left_to_right(self) -> list[int]:
        """Object indices by the centre of their boxes."""
        return [int(i) for i in np.argsort(self.boxes[:, 0] + self.boxes[:, 2], kind="stable")]


@cache
def _sprites() -> dict[str, Image.Image]:
    with (resources.files("agevlm_mlx") / "assets" / ATLAS).open("rb") as file:
        atlas = Image.open(file).convert("RGBA")
    corners = [(i % ATLAS_COLUMNS * TILE, i // ATLAS_COLUMNS * TILE) for i in range(len(ALL_NOUNS))]
    tiles = [atlas.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    return dict(zip(ALL_NOUNS, tiles, strict=True))


@cache
def _ramps() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE - 0.5
    return x, y


def _background(rng: np.random.Generator) -> np.ndarray:
    """f32 [SIDE SIDE 3]: a gradient of two colours, blotches, sometimes stripes, fine noise."""
    x, y = _ramps()
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle, dtype=np.float32) * x + np.sin(angle, dtype=np.float32) * y
    one, other = rng.integers(60, 235, (2, 3)).astype(np.float32)
    image = one + (np.clip(along + 0.5, 0, 1))[..., None] * (other - one)
    cells = int(rng.choice((4, 8, 16)))
    blotches = rng.standard_normal((3, cells, cells), np.float32) * np.float32(rng.uniform(4, 22))
    for channel in range(3):
        patch = Image.fromarray(blotches[channel])
        image[..., channel] += np.asarray(patch.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    if rng.random() < 0.4:
        frequency, height = rng.uniform(25, 75), np.float32(rng.uniform(5, 16))
        image += (np.sin(along * np.float32(frequency)) * height)[..., None]
    return image + 4 * rng.standard_normal((SIDE, SIDE, 1), np.float32)


def _colours(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness and a slight tint, so that no object has one exact colour."""
    tint = rng.uniform(0.82, 1.12) * rng.uniform(0.93, 1.07, 3)
    return rgb * tint.astype(np.float32)


def _place(
    rng: np.random.Generator, side: int, taken: list[tuple[int, int, int]]
) -> tuple[int, int] | None:
    """A corner where a square of `side` px overlaps no other by much, or None."""
    for _ in range(40):
        x, y = (int(v) for v in rng.integers(0, SIDE - side + 1, 2))
        for ox, oy, other in taken:
            wide = min(x + side, ox + other) - max(x, ox)
            high = min(y + side, oy + other) - max(y, oy)
            if wide > 0 and high > 0 and wide * high > _MAX_OVERLAP * min(side, other) ** 2:
                break
        else:
            return x, y
    return None


def make_scene(seed: int, split: Split, index: int) -> Scene:
    """Picture `index` of a split: depends on these three numbers only."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    nouns = sample_nouns(rng, split)
    while True:
        scene = _paint(rng, nouns)
        if scene is not None:
            return scene


def _paint(rng: np.random.Generator, nouns: list[str]) -> Scene | None:
    """The nouns in places that leave all of them visible; None when the dice did not allow it."""
    canvas = _background(rng)
    masks: list[np.ndarray] = []
    sizes, areas, taken = [], [], []
    for noun in nouns:
        size: Literal["small", "big"] = "big" if rng.random() < 0.5 else "small"
        side = int(rng.integers(*SIZES[size]))
        corner = _place(rng, side, taken)
        if corner is None:
            return None
        x, y = corner
        sprite = _sprites()[noun]
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        angle = float(rng.uniform(-20, 20))
        sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        sprite = sprite.resize((side, side), Image.Resampling.BILINEAR)
        rgba = np.asarray(sprite, np.float32)
        alpha = rgba[..., 3:] / 255
        spot = canvas[y : y + side, x : x + side]
        spot += alpha * (_colours(rgba[..., :3], rng) - spot)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y : y + side, x : x + side] = alpha[..., 0] > 0.5
        masks = [m & ~mask for m in masks]
        masks.append(mask)
        areas.append(mask.sum())
        sizes.append(size)
        taken.append((x, y, side))
    if any(m.sum() < _MIN_VISIBLE * area for m, area in zip(masks, areas, strict=True)):
        return None
    boxes = []
    for mask in masks:
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, tuple(nouns), tuple(sizes), np.stack(masks), np.array(boxes))
