"""Other ways to draw the embedded pictures, to see what holds beyond the look of train.

``plain`` is what train looks like. ``varied`` is to train with: every object in a look of its
own, none of which is a style that is tested. ``recoloured``, ``outlined``, ``blurred`` and
``scaled`` are to test with; all but ``scaled`` leave every object where it is, with the same mask.
"""

from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

Style = Literal["plain", "recoloured", "outlined", "blurred", "scaled", "varied"]
STYLES: tuple[Style, ...] = get_args(Style)

Size = Literal["small", "big"]
#: Sides in px of a sprite before it is tilted, the end exclusive; the gap keeps "big or small"
#: answerable.
SIZES: dict[Size, tuple[int, int]] = {"small": (29, 37), "big": (45, 58)}
#: Below and above everything that train shows.
_OTHER_SIZES: dict[Size, tuple[int, int]] = {"small": (18, 26), "big": (64, 77)}
#: Of ``varied``: a little beyond train, clear of `_OTHER_SIZES`.
_VARIED_SIZES: dict[Size, tuple[int, int]] = {"small": (27, 38), "big": (43, 63)}
#: The looks of ``varied``, and how often each is drawn.
_LOOKS = {"plain": 0.4, "grey": 0.1, "duotone": 0.2, "flat": 0.1, "relief": 0.2}
_BLUR = 2.0  # px, the standard deviation over the picture
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_PAPER, _INK = np.array([[250, 248, 242], [25, 25, 30]], np.float32)


def sizes(style: Style) -> dict[Size, tuple[int, int]]:
    """The sides of small and of big sprites, in px."""
    return {"scaled": _OTHER_SIZES, "varied": _VARIED_SIZES}.get(style, SIZES)


def draw_sprite(sprite: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """A sprite f32[h w 4] (0 .. 255, alpha premultiplied) in the style; its alpha is kept."""
    if style == "recoloured":
        return _recoloured(sprite, rng)
    if style == "outlined":
        return _outlined(sprite)
    if style == "varied":
        look = rng.choice(list(_LOOKS), p=list(_LOOKS.values()))
        return _VARIED[look](sprite, rng) if look != "plain" else sprite
    return sprite


def finish(image: np.ndarray, style: Style) -> np.ndarray:
    """The whole picture u8[h w 3] in the style."""
    if style != "blurred":
        return image
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(_BLUR)))


def _recoloured(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every hue turned by one angle, far from none, and a tint, which greys take too; the
    brightness stays."""
    angle = rng.uniform(np.pi / 3, 5 * np.pi / 3)
    tint = rng.uniform(-1, 1, 3).astype(np.float32)
    grey, all_of_it = np.tile(_LUMA, (3, 1)), np.eye(3, dtype=np.float32)
    # A turn about the grey axis (Rodrigues), of what a colour has beside its brightness.
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(angle) * all_of_it + np.sin(angle) * axis + (1 - np.cos(angle)) / 3
    change = (grey + (all_of_it - grey) @ turn).astype(np.float32)
    # Not @: libraries for it round in different ways, and bytes should not depend on that.
    colours, alpha = np.einsum("...j,ij->...i", sprite[..., :3], change), sprite[..., 3:]
    colours += 0.35 * np.minimum(_brightness(colours), 160) * (tint - _brightness(tint))
    return np.concatenate([np.clip(colours, 0, alpha), alpha], -1)


def _outlined(sprite: np.ndarray) -> np.ndarray:
    """A line drawing on paper: ink where the sprite is almost black, as its own lines are, and
    where its brightness changes or it ends."""
    alpha = sprite[..., 3:] / 255
    over_paper = _brightness(sprite[..., :3]) / 255 + 1 - alpha
    slope = sum(np.linalg.norm(np.gradient(v, axis=(0, 1)), axis=0) for v in (over_paper, alpha))
    ink = alpha * np.clip(np.maximum(3 * slope - 0.4, 2 - 8 * over_paper), 0, 1)
    return np.concatenate([(alpha - ink) * _PAPER + ink * _INK, sprite[..., 3:]], -1)


def _grey(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Without colour."""
    return np.concatenate([np.repeat(_brightness(sprite[..., :3]), 3, -1), sprite[..., 3:]], -1)


def _duotone(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark to bright becomes one colour to another one; as often inverted as not."""
    alpha = sprite[..., 3:] / 255
    bright = np.clip(_brightness(sprite[..., :3]) / 255, 0, alpha)  # premultiplied
    ends = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    if abs(float(_brightness(ends[0] - ends[1])[0])) < 90:  # too alike to tell anything
        ends[1] = 255 - ends[0] if abs(float(_brightness(ends[0])[0]) - 127) > 45 else (20, 20, 20)
    return np.concatenate([(alpha - bright) * ends[0] + bright * ends[1], sprite[..., 3:]], -1)


def _flat(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One colour, with its own lights and shades left faint."""
    alpha, own = sprite[..., 3:] / 255, rng.uniform(0, 255, 3).astype(np.float32)
    shade = 0.25 * (_brightness(sprite[..., :3]) - 127 * alpha)
    return np.concatenate([np.clip(alpha * own + shade, 0, 255 * alpha), sprite[..., 3:]], -1)


def _relief(sprite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Embossed in a material of one colour, lit from a random side."""
    alpha = sprite[..., 3:] / 255
    height = _brightness(sprite[..., :3]) / 255 + 0.6 * alpha
    down, right = np.gradient(height, axis=(0, 1))
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(200, 400)
    lit = strength * (np.cos(angle) * right + np.sin(angle) * down).astype(np.float32)
    material = rng.uniform(60, 200, 3).astype(np.float32)
    return np.concatenate([np.clip(alpha * (material + lit), 0, 255 * alpha), sprite[..., 3:]], -1)


_VARIED = {"grey": _grey, "duotone": _duotone, "flat": _flat, "relief": _relief}


def _brightness(colours: np.ndarray) -> np.ndarray:
    """f32[... 3] -> f32[... 1]: the luma."""
    return np.einsum("...i,i->...", colours, _LUMA)[..., None]
