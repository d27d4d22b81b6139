"""Other ways to draw the embedded pictures, to see what holds beyond the look of train.

``plain`` is what train looks like. All others but ``scaled`` leave every object where it is, with
the same mask.
"""

from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

Style = Literal["plain", "recoloured", "outlined", "blurred", "scaled"]
STYLES: tuple[Style, ...] = get_args(Style)

Size = Literal["small", "big"]
#: Sides in px of a sprite before it is tilted, the end exclusive; the gap keeps "big or small"
#: answerable.
SIZES: dict[Size, tuple[int, int]] = {"small": (29, 37), "big": (45, 58)}
#: Below and above everything that train shows.
_OTHER_SIZES: dict[Size, tuple[int, int]] = {"small": (18, 26), "big": (64, 77)}
_BLUR = 2.0  # px, the standard deviation over the picture
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_PAPER, _INK = np.array([[250, 248, 242], [25, 25, 30]], np.float32)


def sizes(style: Style) -> dict[Size, tuple[int, int]]:
    """The sides of small and of big sprites, in px."""
    return _OTHER_SIZES if style == "scaled" else SIZES


def draw_sprite(sprite: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """A sprite f32[h w 4] (0 .. 255, alpha premultiplied) in the style; its alpha is kept."""
    if style == "recoloured":
        return _recoloured(sprite, rng)
    if style == "outlined":
        return _outlined(sprite)
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


def _brightness(colours: np.ndarray) -> np.ndarray:
    """f32[... 3] -> f32[... 1]: the luma."""
    return np.einsum("...i,i->...", colours, _LUMA)[..., None]
