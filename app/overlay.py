"""A word's attention as the page draws it: a transparent layer over each picture, and its peak.

A map lives on the token grid of what the model was given; the page knows the whole upright
picture. `Geometry` takes one to the other. No Gradio, no MLX.
"""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from agevlm_mlx.data.image import Geometry
from agevlm_mlx.evaluation.grounding import grounding_score
from agevlm_mlx.evaluation.overlay import colours, display_size, levels

if TYPE_CHECKING:  # its module needs MLX
    from agevlm_mlx.evaluation.words import Look

#: A picture with less than this share of the word's strongest attention gets no layer.
_NOTHING = 0.02
#: The attention of each colour in a layer. A few colours make a small file; they lie closer
#: together where there is little of it, or their edges would show.
_STEPS = np.linspace(0, 1, 64) ** 1.6


def layer(attn_map: np.ndarray, geometry: Geometry, top: float, longest: int = 192) -> bytes:
    """The map f32[Gh Gw] as a PNG to lay over the picture, its longer side `longest` pixels.

    It has the shape of the whole upright picture. Viridis, ever more opaque with the attention:
    nothing is transparent, `top` is the brightest. What a crop kept from the model is transparent.
    """
    size = display_size(geometry.width, geometry.height, longest)
    values = levels(_finite(attn_map), geometry, size, top) * _seen(geometry, size)
    borders = (_STEPS[1:] + _STEPS[:-1]) / 2
    shown = Image.fromarray(np.searchsorted(borders, values).astype(np.uint8))
    shown.putpalette(colours(_STEPS).tobytes())
    file = io.BytesIO()
    opacity = np.round(255 * _STEPS**0.8).astype(np.uint8)
    shown.save(file, "PNG", transparency=opacity.tobytes())
    return file.getvalue()


def peak(attn_map: np.ndarray, geometry: Geometry) -> dict[str, Any]:
    """The strongest cell of the map f32[Gh Gw] among those that show some of the picture.

    {"x", "y", "box": [x0, y0, x1, y1]}: the middle and the borders of what the cell shows of the
    picture, in fractions of the upright source picture.
    """
    attn_map = _finite(attn_map)
    xs, ys = _borders(geometry, attn_map.shape)
    row, column = divmod(int(np.where(_within(xs, ys), attn_map, -1).argmax()), attn_map.shape[1])
    x0, x1, y0, y1 = *xs[column : column + 2], *ys[row : row + 2]
    return {
        "x": _number((x0 + x1) / 2),
        "y": _number((y0 + y1) / 2),
        "box": [_number(border) for border in (x0, y0, x1, y1)],
    }


def word_json(
    look: "Look", geometries: Sequence[Geometry], layer: int | None = None, head: int | None = None
) -> dict[str, Any]:
    """What the page needs to light up one word; JSON values.

    geometries: of the conversation's pictures, in the order of the look's maps. layer, head:
    indices; None for the mean. "layers" has a data URL for each picture, all on one scale, or
    None where the word looked next to nowhere; "peak" is None if it did so in all of them.
    """
    maps = _finite(look.attention(layer, head))
    tops = [_top(m, g) for m, g in zip(maps, geometries, strict=True)]
    top = max(tops, default=0.0)
    strongest = tops.index(top) if top > 0 else None
    return {
        "role": look.role,
        "start": look.start,
        "end": look.end,
        "text": look.word,
        "names": look.names,
        "grounding": _number(grounding_score(maps)),
        "on_image": _number(maps.sum()),
        "peak": None
        if strongest is None
        else {"picture": strongest, **peak(maps[strongest], geometries[strongest])},
        "layers": [
            _data_url(m, g, top) if own > _NOTHING * top else None
            for m, g, own in zip(maps, geometries, tops, strict=True)
        ],
    }


def _data_url(attn_map: np.ndarray, geometry: Geometry, top: float) -> str:
    png = base64.b64encode(layer(attn_map, geometry, top)).decode()
    return f"data:image/png;base64,{png}"


def _top(attn_map: np.ndarray, geometry: Geometry) -> float:
    """The strongest attention of f32[Gh Gw] on a cell that shows some of the picture."""
    return float(attn_map[_within(*_borders(geometry, attn_map.shape))].max(initial=0))


def _borders(geometry: Geometry, grid: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The cells' borders f64[Gw + 1] and f64[Gh + 1] in fractions of the picture, cut to it."""
    steps = np.arange(max(grid) + 1)[:, None] * geometry.image_size / np.array(grid[::-1])
    at = geometry.to_source(steps) / (geometry.width, geometry.height)
    xs, ys = np.clip(at, 0, 1).T
    return xs[: grid[1] + 1], ys[: grid[0] + 1]


def _within(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """bool[Gh Gw]: the cells between these borders that are not wholly in the padding."""
    return (np.diff(ys)[:, None] > 1e-9) & (np.diff(xs) > 1e-9)


def _seen(geometry: Geometry, size: tuple[int, int]) -> np.ndarray:
    """bool[h w]: the pixels of a display of `size` of which the model's input shows a part."""
    width, height = size
    steps = np.arange(max(size) + 1)[:, None] * (geometry.width / width, geometry.height / height)
    at = geometry.to_input(steps)
    x, y = ((at[1:] > 0) & (at[:-1] < geometry.image_size)).T
    return y[:height, None] & x[:width]


def _finite(values: np.ndarray) -> np.ndarray:
    """f32, where a model that overflowed gave no number: 0."""
    return np.nan_to_num(np.asarray(values, np.float32), nan=0, posinf=0, neginf=0)


def _number(value: float) -> float:
    """Four decimals are a third of a pixel of the largest picture shown."""
    return round(float(value), 4)
