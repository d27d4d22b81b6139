"""Pages of pictures with the attention over them and the outline of what should be looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .data.image import Geometry
from .evaluation.overlay import TILE, overlay

_MARGIN, _GAP, _LINE = 20, 14, 20
_LEGEND = "outline: what the words name     %: share of the attention inside it"
#: Width that the heading needs.
_LEAST = 520
_INK, _QUIET, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)


@dataclass(frozen=True)
class Look:
    """Words about a picture, and what they should look at."""

    #: The picture at the size in which it is shown, and where its pixels go in the model's input.
    image: Image.Image
    geometry: Geometry
    #: f32 [Hi Wi 3]
    pixels: np.ndarray
    ids: tuple[int, ...]
    #: The positions whose attention is shown: those that guidance supervises.
    columns: tuple[int, ...]
    phrase: str
    #: f32 [h w] of `image`, above one half on the object; None where nothing is known about it.
    outline: np.ndarray | None
    #: f32 [S], 1 at the cell that the object fills most: the weights of training's mass.
    target: np.ndarray | None


def tile(look: Look, attn_map: np.ndarray, side: int = TILE) -> Image.Image:
    """The picture with the map f[Gh Gw] over it and the object's outline."""
    small = side < TILE  # the ring would hide what it is around
    shown = overlay(look.image, attn_map, look.geometry, tile=side, peak=not small)
    if look.outline is not None:
        level = Image.fromarray(look.outline).resize(shown.size, Image.Resampling.BILINEAR)
        level = np.asarray(level)
        steepness = np.hypot(*np.gradient(level)) if min(level.shape) > 1 else level
        away = np.abs(level - 0.5) / np.maximum(steepness, 1e-3)  # pixels from the outline
        for colour, width in ((20, 2.0), (255, 1.0)) if small else ((20, 3.5), (255, 1.6)):
            line = np.clip(width / 2 + 0.5 - away, 0, 1)
            shown.paste((colour,) * 3, (0, 0), Image.fromarray((255 * line).astype(np.uint8)))
    return shown


def inside(look: Look, attn_map: np.ndarray) -> str:
    """The share of the attention inside the outline, as it is written."""
    if look.target is None:
        return ""
    return f"{float((attn_map.astype(np.float32).reshape(-1) * look.target).sum()):.0%}"


def sheet(looks: Sequence[Look], maps: np.ndarray, title: str) -> Image.Image:
    """A page with every look: its picture, its words, and how much of the attention is inside."""
    columns = min(3, len(looks))
    rows = -(-len(looks) // columns)
    tiles = [tile(look, m) for look, m in zip(looks, maps, strict=True)]
    step_x, step_y = TILE + _GAP, TILE + 2 * _LINE + _GAP
    top = _MARGIN + 2 * _LINE + _GAP
    width = 2 * _MARGIN + max(columns * step_x - _GAP, _LEAST)
    page = Image.new("RGB", (width, top + rows * step_y), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN - 4), title, fill=_INK, font=_font(20))
    pen.text((_MARGIN, _MARGIN + _LINE + 4), _LEGEND, fill=_QUIET, font=_font(13))
    for n, (look, attn_map, shown) in enumerate(zip(looks, maps, tiles, strict=True)):
        row, column = divmod(n, columns)
        x, y = _MARGIN + column * step_x, top + row * step_y
        page.paste(shown, (x, y + TILE - shown.height))
        share = inside(look, attn_map)
        end = x + TILE - pen.textlength(share, font=_font(17))
        pen.text((end, y + TILE + 6), share, fill=_INK, font=_font(17))
        words = _shortened(pen, look.phrase, end - x - 8, 17)
        pen.text((x, y + TILE + 6), words, fill=_INK, font=_font(17))
    return page


def strip(looks: Sequence[Look], maps: Mapping[int, np.ndarray]) -> Image.Image:
    """The looks one below the other, each at every step of `maps` from left to right."""
    side = TILE * 5 // 9
    step_x, step_y = side + _GAP, side + _LINE + _GAP
    top = _MARGIN + 3 * _LINE + _GAP
    label = 110
    width = 2 * _MARGIN + max(label + len(maps) * step_x - _GAP, _LEAST)
    page = Image.new("RGB", (width, top + len(looks) * step_y + _MARGIN // 2), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN - 4), "The looks as it learns", fill=_INK, font=_font(20))
    pen.text((_MARGIN, _MARGIN + _LINE + 4), _LEGEND, fill=_QUIET, font=_font(13))
    for n, look in enumerate(looks):
        y = top + n * step_y
        words = _shortened(pen, look.phrase, label - 8, 15)
        pen.text((_MARGIN, y + side / 2 - 9), words, fill=_INK, font=_font(15))
        for column, (step, now) in enumerate(maps.items()):
            x = _MARGIN + label + column * step_x
            if n == 0:
                name = f"{'step ' if column == 0 else ''}{step:,}"
                pen.text((x, top - _LINE - 2), name, fill=_INK, font=_font(15))
            shown = tile(look, now[n], side)
            page.paste(shown, (x, y + (side - shown.height) // 2))
            share = inside(look, now[n])
            pen.text((x, y + side + 2), share, fill=_QUIET, font=_font(13))
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shortened(pen: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    if pen.textlength(text, font=_font(size)) <= width:
        return text
    while text and pen.textlength(text + "...", font=_font(size)) > width:
        text = text[:-1]
    return text + "..."
