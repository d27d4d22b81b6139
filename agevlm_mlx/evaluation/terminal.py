"""An attention map over its picture as text, for a terminal.

In colour a character is two pixels, one above the other: an upper half block in one colour on
the other, so that pixels are about square. Without colour the map alone is drawn, in letters
that get denser with attention.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, TextIO

import numpy as np
from PIL import Image

from ..data.image import Geometry
from .overlay import Picture, WordMap, heat, overlay, peak_point

Rendering = Literal["truecolor", "256", "shades"]

#: Lines of the terminal that stay free for the caption, the command and the next prompt.
_FREE_LINES = 4
#: Higher drawings push the conversation off the screen and show no more of a map.
_MOST_ROWS = 40
#: Maps are drawn so much larger and reduced, so that no cell falls between two characters.
_FACTOR = 4
_SHADES = " .:-=+*#%@"
_UPPER_HALF, _RESET = "\u2580", "\x1b[0m"
#: The strongest cell's centre: white on black, which stands out from every picture.
_MARK, _WHITE, _BLACK = "+", (255, 255, 255), (0, 0, 0)
#: The steps of the 6 x 6 x 6 colours that start at number 16, and the greys after them.
_CUBE = np.array([0, 95, 135, 175, 215, 255])
_GREYS = np.arange(8, 239, 10)


def rendering(stream: TextIO, environ: Mapping[str, str] = os.environ) -> Rendering:
    """What `stream` can show. Colour needs a terminal, UTF-8 and no NO_COLOR (no-color.org)."""
    plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
    utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
    if plain or not utf8 or not stream.isatty():
        return "shades"
    return "truecolor" if environ.get("COLORTERM") in ("truecolor", "24bit") else "256"


def room() -> tuple[int, int]:
    """(columns, rows) that a drawing may take in the terminal."""
    columns, lines = shutil.get_terminal_size()
    return max(4, columns - 1), max(4, min(lines - _FREE_LINES, _MOST_ROWS))


def draw(
    image: Image.Image,
    attn_map: np.ndarray,
    geometry: Geometry,
    how: Rendering,
    size: tuple[int, int],
) -> str:
    """The RGB picture with the map f[Gh Gw] laid over it, within `size` (columns, rows).

    Lines joined by newlines, without one at the end; every coloured line ends in a reset.
    """
    columns, rows = size
    if how == "shades":
        wide, high = _fitted(image, columns - 2, rows - 2)  # inside the frame
        values = heat(attn_map, geometry, (_FACTOR * wide, _FACTOR * high))
        return _shades(values.reshape(high, _FACTOR, wide, _FACTOR).mean((1, 3)))
    wide, high = _fitted(image, columns, rows)
    # Without the overlay's ring: this small it would hide what it is around.
    tile = _FACTOR * max(wide, 2 * high)
    shown = overlay(image, attn_map, geometry, tile=tile, peak=False)
    pixels = np.asarray(shown.resize((wide, 2 * high), Image.Resampling.BOX))
    x, y = peak_point(attn_map, geometry)
    column = min(max(int(x / image.width * wide), 0), wide - 1)
    row = min(max(int(y / image.height * high), 0), high - 1)
    return _half_blocks(pixels, how, (row, column))


def caption(word: WordMap, pictures: Sequence[Picture], names: Sequence[str]) -> str:
    """One line: the word, its attention on each picture, and where in pixels it looked most."""
    at = strongest(word)
    said = "asked" if word.role == "user" else "answered"
    shares = [float(m.sum()) for m in word.maps]
    if len(names) == 1:
        where = f"{shares[0]:.0%} of the attention on {names[0]}"
    else:
        each = ", ".join(f"{s:.0%} on {n}" for s, n in zip(shares, names, strict=True))
        where = f"attention {each}; most in {names[at]}"
    width, height = pictures[at].image.size
    x, y = peak_point(word.maps[at], pictures[at].geometry)
    place = f"at ({x:.0f}, {y:.0f}) of {width}x{height} px"
    if not (0 <= x <= width and 0 <= y <= height):
        place = "in the padding beside the picture"
    return f"{word.word} ({said}): {where}, strongest {place}"


def strongest(word: WordMap) -> int:
    """The number of the picture in which the word's map has its peak."""
    return int(np.argmax([np.max(m) for m in word.maps]))


def _fitted(image: Image.Image, columns: int, rows: int) -> tuple[int, int]:
    """(columns, rows) of the largest drawing that fits, where a row is as high as two columns."""
    scale = min(max(1, columns) / image.width, 2 * max(1, rows) / image.height)
    wide, high = image.width * scale, image.height * scale / 2
    return max(1, round(wide)), max(1, round(high))


def _shades(values: np.ndarray) -> str:
    """f[h w] as letters in a frame, the largest value as the densest."""
    steps = values / max(float(values.max()), 1e-12) * (len(_SHADES) - 1)
    edge = "+" + "-" * values.shape[1] + "+"
    inside = ["|" + "".join(_SHADES[round(v)] for v in row) + "|" for row in steps.tolist()]
    return "\n".join([edge, *inside, edge])


def _half_blocks(pixels: np.ndarray, how: Rendering, mark: tuple[int, int]) -> str:
    """u8[2h w 3] as h lines of half blocks, with a mark in the cell (row, column).

    Colours are named only where they change.
    """
    lines = []
    for row, (upper, lower) in enumerate(zip(pixels[::2], pixels[1::2], strict=True)):
        text, before = "", None
        for column, pair in enumerate(zip(upper.tolist(), lower.tolist(), strict=True)):
            marked = (row, column) == mark
            pair = (_WHITE, _BLACK) if marked else (tuple(pair[0]), tuple(pair[1]))
            if pair != before:
                text += _colour(38, pair[0], how) + _colour(48, pair[1], how)
                before = pair
            text += _MARK if marked else _UPPER_HALF
        lines.append(text + _RESET)
    return "\n".join(lines)


@lru_cache(maxsize=1 << 14)
def _colour(code: int, rgb: tuple[int, ...], how: Rendering) -> str:
    """The sequence that sets the colour of a character (code 38) or of its ground (48)."""
    if how == "truecolor":
        return f"\x1b[{code};2;{rgb[0]};{rgb[1]};{rgb[2]}m"
    return f"\x1b[{code};5;{_nearest(rgb)}m"


def _nearest(rgb: tuple[int, ...]) -> int:
    """The number, 16 to 255, of the nearest of the 256 terminal colours."""
    wanted = np.array(rgb)
    cube = np.abs(_CUBE[:, None] - wanted).argmin(0)
    grey = int(np.abs(_GREYS - wanted.mean()).argmin())
    if ((_GREYS[grey] - wanted) ** 2).sum() < ((_CUBE[cube] - wanted) ** 2).sum():
        return 232 + grey
    return 16 + int(cube @ (36, 6, 1))
