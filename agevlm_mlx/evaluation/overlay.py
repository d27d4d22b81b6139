"""Attention maps over their picture: one overlay, and the sheet with one overlay per word.

A map lives on the token grid of what the model was given; the picture is the user's own file.
`Geometry` holds the resize, crop or padding between the two, and its inverse places the map.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.image import Geometry
from .grounding import grounding_score
from .metrics import peak_cell

#: Viridis (matplotlib, CC0) at 17 even steps: perceptually uniform, safe for colour-blind eyes.
_VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
_COLOURS = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _VIRIDIS.split()], float)

#: Pictures smaller than this are enlarged, so that a map over a 64 px picture can be seen.
TILE = 288
_MARGIN, _GAP, _LINE = 20, 14, 20
_INK, _QUIET, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)


def colours(values: np.ndarray) -> np.ndarray:
    """The colour map: f[...] in 0..1 -> u8[... 3]."""
    steps = np.linspace(0, 1, len(_COLOURS))
    rgb = [np.interp(values, steps, _COLOURS[:, c]) for c in range(3)]
    return np.stack(rgb, -1).round().astype(np.uint8)


def display_size(width: int, height: int, tile: int = TILE) -> tuple[int, int]:
    """(width, height) at which a picture is shown: its longer side is `tile` pixels."""
    scale = tile / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def heat(attn_map: np.ndarray, geometry: Geometry, size: tuple[int, int]) -> np.ndarray:
    """The map f[Gh Gw] on a display of `size` (width, height) pixels -> f32[h w].

    The display is the whole source picture, enlarged or reduced: parts that the model did not
    see (cropped away) get the border value of `Geometry.grid_to_source`.
    """
    width, height = size
    across, down = width / geometry.width, height / geometry.height
    shown = dataclasses.replace(
        geometry,
        width=width,
        height=height,
        scale_x=geometry.scale_x / across,
        scale_y=geometry.scale_y / down,
    )
    return shown.grid_to_source(np.asarray(attn_map, np.float32))


def levels(
    attn_map: np.ndarray, geometry: Geometry, size: tuple[int, int], top: float
) -> np.ndarray:
    """`heat` as it is drawn: smooth, and 0..1 with 1 for the attention `top` -> f[h w]."""
    values = np.clip(heat(attn_map, geometry, size) / max(top, 1e-12), 0, 1)
    rows, columns = np.shape(attn_map)
    side = geometry.image_size
    down = side / rows / geometry.scale_y * size[1] / geometry.height
    across = side / columns / geometry.scale_x * size[0] / geometry.width
    return _smooth(values, 0.3 * down, 0.3 * across)


def overlay(
    image: Image.Image,
    attn_map: np.ndarray,
    geometry: Geometry,
    *,
    tile: int = TILE,
    top: float | None = None,
    peak: bool = True,
) -> Image.Image:
    """The picture with the map f[Gh Gw] laid over it, its longer side `tile` pixels.

    `top` is the attention shown in the brightest colour (default: the map's own maximum), so
    that several maps can share a scale. `peak` marks the centre of the strongest cell.
    """
    attn_map = np.asarray(attn_map, np.float32)
    size = display_size(*image.size, tile)
    picture = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)
    top = float(attn_map.max()) if top is None else top
    values = levels(attn_map, geometry, size, top)
    # Low attention darkens and greys the picture; high attention leaves it clear under a tint.
    grey = picture.mean(-1, keepdims=True)
    dimmed = 0.45 * (0.4 * picture + 0.6 * grey) + 0.25 * colours(np.zeros(()))
    strength = values[..., None] ** 0.8
    tinted = 0.62 * picture + 0.38 * colours(values)
    out = Image.fromarray(
        np.clip((1 - strength) * dimmed + strength * tinted, 0, 255).astype(np.uint8)
    )
    if peak:
        _mark(out, peak_point(attn_map, geometry), size, geometry)
    return out


def peak_point(attn_map: np.ndarray, geometry: Geometry) -> tuple[float, float]:
    """Centre of the strongest cell of the map f[Gh Gw], (x, y) in source pixels."""
    rows, columns = np.shape(attn_map)
    column, row = peak_cell(attn_map, (rows, columns))
    side = geometry.image_size
    centre = np.array([[column * side / columns, row * side / rows]])
    x, y = np.asarray(geometry.to_source(centre), np.float64)[0]
    return float(x), float(y)


def _smooth(values: np.ndarray, down: float, across: float) -> np.ndarray:
    """Gaussian blur by a fraction of a cell: hides the facets of bilinear interpolation.

    down, across: the standard deviation along each axis, in pixels.

    The maximum stays what it was, so that the scale does not change.
    """
    rows, columns = values.shape
    blurred = _blur(rows, down) @ values @ _blur(columns, across).T
    return blurred * (float(values.max()) / max(float(blurred.max()), 1e-12))


@lru_cache(maxsize=8)
def _blur(length: int, radius: float) -> np.ndarray:
    """f32[length length]: the share of each pixel (column) in each blurred one (row)."""
    gap = np.arange(length)[:, None] - np.arange(length)[None]
    weights = np.exp(-0.5 * (gap / radius) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _mark(
    out: Image.Image, point: tuple[float, float], size: tuple[int, int], geometry: Geometry
) -> None:
    x = float(np.clip(point[0] / geometry.width * size[0], 0, size[0] - 1))
    y = float(np.clip(point[1] / geometry.height * size[1], 0, size[1] - 1))
    # Drawn four times larger and reduced: PIL's own lines are not anti-aliased.
    radius, factor = 8, 4
    side = 2 * (radius + 4)
    stamp = Image.new("L", (side * factor, side * factor))
    pen, middle = ImageDraw.Draw(stamp), side * factor / 2
    left, top = round(x - side / 2), round(y - side / 2)
    for colour, width in ((20, 5), (255, 2)):
        r = radius * factor + width * factor / 2
        box = (middle - r, middle - r, middle + r, middle + r)
        stamp.paste(0, (0, 0, *stamp.size))
        pen.ellipse(box, outline=255, width=width * factor)
        out.paste((colour,) * 3, (left, top), stamp.resize((side, side), Image.Resampling.LANCZOS))


# --- the sheet of one answer -------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A source image and how it was given to the model."""

    image: Image.Image
    geometry: Geometry


@dataclass(frozen=True)
class WordMap:
    """Where one word looked: a map f32[Gh Gw] for each picture, and whose word it is."""

    word: str
    maps: tuple[np.ndarray, ...]
    role: str = "assistant"

    @property
    def on_image(self) -> float:
        """The share of the attention that went to the pictures, 0..1."""
        return float(sum(m.sum() for m in self.maps))

    @property
    def grounding(self) -> float:
        """How definite the look was, 0..1; see `grounding_score`."""
        return grounding_score(np.concatenate([m.ravel() for m in self.maps]))

    def describe(self, geometries: Sequence[Geometry]) -> dict[str, Any]:
        """JSON values: the picture looked at most, where in it (its pixels), the share of
        attention that each picture got, and the grounding."""
        strongest = int(np.argmax([m.max() for m in self.maps]))
        return {
            "image": strongest,
            "peak": list(peak_point(self.maps[strongest], geometries[strongest])),
            "on_image": [float(m.sum()) for m in self.maps],
            "grounding": self.grounding,
        }


def word_sheet(
    pictures: Sequence[Picture],
    words: Sequence[WordMap],
    *,
    question: str = "",
    answer: str = "",
    tile: int = TILE,
    columns: int = 4,
) -> Image.Image:
    """The picture(s) as given, then one overlay per word with the word below it.

    With several pictures the maps of a word stand side by side and share one scale, so that a
    word that looked at the second picture leaves the first one dark.
    """
    strips = [(_strip([_plain(p, tile) for p in pictures]), "picture", "")]
    for word in words:
        top = max(float(np.max(m)) for m in word.maps)
        tiles = [
            overlay(p.image, m, p.geometry, tile=tile, top=top, peak=float(np.max(m)) >= top)
            for p, m in zip(pictures, word.maps, strict=True)
        ]
        said = "asked" if word.role == "user" else "answered"
        strips.append((_strip(tiles), word.word, said))
    per_row = max(1, min(columns // len(pictures), len(strips)))
    width = max(s.width for s, _, _ in strips)
    height = max(s.height for s, _, _ in strips)
    inner = max(per_row * width + (per_row - 1) * _GAP, 2 * TILE)
    heading = _wrap([("Question", question), ("Answer", answer)], inner)
    top_margin = _MARGIN + len(heading) * (_LINE + 4) + (10 if heading else 0)
    rows = -(-len(strips) // per_row)
    cell = height + 2 * _LINE + 6
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, top_margin + rows * cell + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, (label, text) in enumerate(heading):
        y = _MARGIN + n * (_LINE + 4)
        pen.text((_MARGIN, y), label, fill=_QUIET, font=_font(16))
        pen.text((_MARGIN + 84, y), text, fill=_INK, font=_font(16))
    for n, (strip, word, said) in enumerate(strips):
        row, column = divmod(n, per_row)
        x, y = _MARGIN + column * (width + _GAP), top_margin + row * cell
        sheet.paste(strip, (x, y))
        pen.text((x, y + strip.height + 6), word, fill=_INK, font=_font(17))
        if said:
            offset = pen.textlength(word + "  ", font=_font(17))
            pen.text((x + offset, y + strip.height + 9), said, fill=_QUIET, font=_font(13))
    return sheet


def _plain(picture: Picture, tile: int) -> Image.Image:
    size = display_size(*picture.image.size, tile)
    return picture.image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _strip(tiles: Sequence[Image.Image]) -> Image.Image:
    width = sum(t.width for t in tiles) + 4 * (len(tiles) - 1)
    strip = Image.new("RGB", (width, max(t.height for t in tiles)), _PAPER)
    x = 0
    for one in tiles:
        strip.paste(one, (x, 0))
        x += one.width + 4
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(parts: Sequence[tuple[str, str]], width: int, limit: int = 6) -> list[tuple[str, str]]:
    """Lines of (label, text) that fit `width`; a part longer than `limit` lines is cut."""
    lines: list[tuple[str, str]] = []
    for label, text in parts:
        rows, current = [], ""
        for word in text.split():
            longer = f"{current} {word}".strip()
            if current and _font(16).getlength(longer) > width - 84:
                rows.append(current)
                current = word
            else:
                current = longer
        rows = [row for row in [*rows, current] if row]
        if len(rows) > limit:
            rows = [*rows[: limit - 1], rows[limit - 1] + " ..."]
        lines += [(label if n == 0 else "", row) for n, row in enumerate(rows)]
    return lines
