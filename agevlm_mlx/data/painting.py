"""Paint one embedded picture: OpenMoji sprites on a procedural background, with exact masks."""

import math
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image, ImageOps

from .nouns import ALL_NOUNS, SPLITS, Split, counterfactual, sample_nouns
from .styles import Size, Style, draw_sprite, finish, sizes

SIDE = 128  # px of a picture
ATLAS, ATLAS_COLUMNS, TILE = "openmoji.png", 13, 96
_MAX_OVERLAP = 0.10  # of the smaller sprite's square
_MIN_VISIBLE = 0.75  # of a sprite's own pixels
_TILT = math.radians(20)


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is true about it.

    image: uint8 [128 128 3]; masks: bool [n 128 128], the visible pixels; boxes: int
    [n 4], x0 y0 x1 y1 around them (x1, y1 exclusive). Objects are listed back to front.
    """

    image: np.ndarray
    nouns: tuple[str, ...]
    sizes: tuple[Size, ...]
    masks: np.ndarray
    boxes: np.ndarray

    def left_to_right(self) -> list[int]:
        """Object indices by the centre of their boxes."""
        return [int(i) for i in np.argsort(self.boxes[:, 0] + self.boxes[:, 2], kind="stable")]


@cache
def _sprites() -> dict[str, Image.Image]:
    """The atlas' tiles with premultiplied alpha, which resampling needs."""
    with (resources.files("agevlm_mlx") / "assets" / ATLAS).open("rb") as file:
        atlas = Image.open(file).convert("RGBA").convert("RGBa")
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


def make_scene(seed: int, split: Split, index: int, style: Style = "plain") -> Scene:
    """Picture `index` of a split: depends on these only, and its nouns not on the style.

    The second picture of ``pairs`` is the first once more, with another noun for one of it.
    """
    twin = split == "pairs" and index % 2 == 1
    rng = np.random.default_rng([seed, SPLITS.index(split), index - twin])
    nouns = sample_nouns(rng, split)
    if twin:
        nouns = counterfactual(nouns, np.random.default_rng([seed, SPLITS.index(split), index, 3]))
    while True:
        scene = _paint(rng, nouns, style)
        if scene is not None:
            return scene


@dataclass(frozen=True)
class _Pose:
    """How a sprite stands: the length of its side, the tilted square around it, and its place."""

    inner: int
    angle: float
    mirrored: bool
    side: int
    x: int = 0
    y: int = 0


def _pose(rng: np.random.Generator, sides: tuple[int, int]) -> _Pose:
    inner, angle = int(rng.integers(*sides)), float(rng.uniform(-_TILT, _TILT))
    side = math.ceil(inner * (math.cos(angle) + abs(math.sin(angle))))
    return _Pose(inner, angle, bool(rng.random() < 0.5), side)


def _place(rng: np.random.Generator, side: int, others: list[_Pose]) -> tuple[int, int] | None:
    """A corner where a square of `side` px overlaps no other by much, or None."""
    for _ in range(40):
        x, y = (int(v) for v in rng.integers(0, SIDE - side + 1, 2))
        for other in others:
            wide = min(x + side, other.x + other.side) - max(x, other.x)
            high = min(y + side, other.y + other.side) - max(y, other.y)
            if wide > 0 and high > 0 and wide * high > _MAX_OVERLAP * min(side, other.side) ** 2:
                break
        else:
            return x, y
    return None


def _paint(rng: np.random.Generator, nouns: list[str], style: Style = "plain") -> Scene | None:
    """The nouns in places that leave all of them visible; None when the dice did not allow it."""
    size: list[Size] = []
    poses: list[_Pose] = []
    for _ in nouns:
        size.append("big" if rng.random() < 0.5 else "small")
        pose = _pose(rng, sizes(style)[size[-1]])
        corner = _place(rng, pose.side, poses)
        if corner is None:
            return None
        poses.append(replace(pose, x=corner[0], y=corner[1]))
    spots = [(slice(p.y, p.y + p.side), slice(p.x, p.x + p.side)) for p in poses]
    cutouts = [_cutout(noun, pose) for noun, pose in zip(nouns, poses, strict=True)]
    masks, areas = np.zeros((len(nouns), SIDE, SIDE), bool), []
    for i, (spot, cutout) in enumerate(zip(spots, cutouts, strict=True)):
        opaque = cutout[..., 3] > 127.5
        masks[:i, *spot] &= ~opaque
        masks[i, *spot] = opaque
        areas.append(opaque.sum())
    if any(m.sum() < _MIN_VISIBLE * area for m, area in zip(masks, areas, strict=True)):
        return None
    boxes = []
    for mask in masks:
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    canvas = _background(rng)
    for spot, cutout in zip(spots, cutouts, strict=True):
        # Brightness and a slight tint, so that no object has one exact colour.
        tint = rng.uniform(0.82, 1.12) * rng.uniform(0.93, 1.07, 3)
        canvas[spot] *= 1 - cutout[..., 3:] / 255
        drawn = draw_sprite(cutout, style, rng)[..., :3]
        canvas[spot] += drawn * tint.astype(np.float32)
    image = finish(np.clip(canvas, 0, 255).astype(np.uint8), style)
    return Scene(image, tuple(nouns), tuple(size), masks, np.array(boxes))


def _cutout(noun: str, pose: _Pose) -> np.ndarray:
    """f32 [side side 4]: the noun's sprite as it stands, alpha premultiplied."""
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    # Shrunk first, with antialiasing, then turned.
    small = _sprites()[noun].resize((pose.inner, pose.inner), Image.Resampling.BILINEAR)
    small = ImageOps.expand(small, 1)  # a clear rim, so that turned edges come out smooth
    flip, to, half = -1 if pose.mirrored else 1, pose.side / 2, pose.inner / 2 + 1
    # Output to input pixels: x' = a x + b y + c, y' = d x + e y + f, about the centres.
    turn = (
        *(flip * cos, flip * sin, half - flip * to * (cos + sin)),
        *(-sin, cos, half + to * (sin - cos)),
    )
    square = (pose.side, pose.side)
    turned = small.transform(square, Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC)
    return np.asarray(turned, np.float32)
