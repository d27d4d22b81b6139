"""Inside a model of mlx-vlm: its hidden states, its attention, and where its image tokens lie.

Nothing of mlx-vlm is imported here: what is listened to is found in the model that is given.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .data.image import Geometry
from .errors import UserError
from .kernels.guided_attention import guided_attention
from .models.hidden_states import hidden_states as listening

_NAME = "scaled_dot_product_attention"


@contextmanager
def attention_rows(language_model: Any, columns: Sequence[int]) -> Iterator[list[mx.array | None]]:
    """A list that fills with a layer's attention, fp32 [P N T], in each call inside the block:
    where the text at these P positions of a whole sequence looks; None where it cannot be told.

    Every architecture calls the ``scaled_dot_product_attention`` of its own module. In the block
    it is one that calls the same function and computes the rows besides.
    """
    rows: list[mx.array | None] = []
    names = {type(part).__module__ for part in language_model.modules()}
    fused = {n: getattr(sys.modules[n], _NAME) for n in names if hasattr(sys.modules.get(n), _NAME)}

    def listening(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def attend(*args: Any, **kwargs: Any) -> Any:
            rows.append(_rows(signature.bind(*args, **kwargs).arguments, columns))
            return function(*args, **kwargs)

        return attend

    try:
        for name, function in fused.items():
            setattr(sys.modules[name], _NAME, listening(function))
        yield rows
    finally:
        for name, function in fused.items():
            setattr(sys.modules[name], _NAME, function)


def _rows(called: Mapping[str, Any], columns: Sequence[int]) -> mx.array | None:
    q, keys, scale = (called.get(name) for name in ("queries", "keys", "scale"))
    if not (isinstance(q, mx.array) and isinstance(keys, mx.array)) or scale is None:
        return None
    T = q.shape[2]
    # Keys of something else than this sequence, or a softmax over more than the keys.
    if len(q) != 1 or keys.shape[2] != T or called.get("sinks") is not None:
        return None
    at, mask = mx.array(list(columns)), called.get("mask")
    if isinstance(mask, mx.array):
        mask = mask if mask.dtype == mx.bool_ else mask > -1e4
        shape = (1, *mask.shape[-3:-2], T, T) if mask.ndim > 2 else (1, 1, T, T)
        allowed = mx.broadcast_to(mask, shape)[0, 0, at]
    elif mask is None:
        allowed = None
    else:  # "causal"
        allowed = mx.arange(T)[None] <= at[:, None]
    return guided_attention(q, keys, mx.zeros_like(at), at, q.shape[1], float(scale), allowed)


@contextmanager
def hidden_states(language_model: Any) -> Iterator[list[mx.array]]:
    """A list that fills with layers+1 hidden states [1 T D] in one call inside the block: what
    enters the first decoder layer, and what leaves each (before the last norm).

    ``UserError`` for an architecture without a list of layers that are called one after another.
    """
    layers = getattr(language_model, "layers", None)
    layers = layers or getattr(getattr(language_model, "model", None), "layers", None)
    if not layers:
        raise UserError(
            f"{type(language_model).__module__}: expected decoder layers to listen to, found none"
        )
    with listening(layers) as states:
        yield states
    if len(states) != len(layers) + 1:
        raise UserError(
            f"{type(language_model).__module__}: expected its {len(layers)} layers to be called "
            f"once each, got {max(len(states) - 1, 0)} calls"
        )


def grid(config: Any, inputs: Mapping[str, Any], tokens: int) -> tuple[int, int] | None:
    """Gh, Gw of one image's tokens, if they are a grid of the whole input; else None.

    Qwen's families say their grid. Elsewhere one square input with a square number of tokens is
    taken for one; several inputs (tiles of a picture) are not.
    """
    sizes = inputs.get("image_grid_thw")
    if sizes is not None:
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None) or 1
        if len(sizes) != 1:
            return None
        frames, high, wide = (int(n) for n in sizes[0])
        Gh, Gw = high // merge, wide // merge
        return (Gh, Gw) if frames == 1 and Gh * Gw == tokens else None
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens and plane(inputs) is not None else None


def plane(inputs: Mapping[str, Any]) -> np.ndarray | None:
    """f32 [Hi Hi 3]: the pixels, if they are one square input; else None."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return None
    if isinstance(pixels, list):
        if len(pixels) != 1:
            return None
        pixels = pixels[0]
    pixels = pixels.astype(mx.float32) if isinstance(pixels, mx.array) else pixels
    values: Any = np.asarray(pixels, np.float32)
    if values.ndim < 3 or math.prod(values.shape[:-3]) != 1:
        return None
    values = values.reshape(values.shape[-3:])
    if values.shape[0] == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    return values if values.shape[2] == 3 and values.shape[0] == values.shape[1] else None


def geometry(
    see: Callable[[Image.Image], Mapping[str, Any]], width: int, height: int
) -> Geometry | None:
    """How a processor brings a width x height picture into its square input, measured; None if
    that is no resize with one crop or padding.

    see: a picture -> the processor's inputs. It is shown a picture whose red grows from left to
    right and green from top to bottom, so that each pixel of the input says where it comes from;
    black and white ones undo the normalisation and show what is padding.
    """
    ramp = np.full((height, width, 3), 128, np.float64)
    ramp[..., 0] = (np.arange(width) + 0.5) / width * 255
    ramp[..., 1] = ((np.arange(height) + 0.5) / height * 255)[:, None]
    pictures = [np.zeros_like(ramp), np.full_like(ramp, 255), ramp]
    planes = [plane(see(Image.fromarray(p.round().astype(np.uint8)))) for p in pictures]
    black, white, ramp = planes
    if black is None or white is None or ramp is None:
        return None
    span = white - black
    shown = np.abs(span[..., 0]) > 1e-3
    place = (ramp - black) / np.where(np.abs(span) > 1e-3, span, 1)
    size, fits = len(ramp), []
    for channel, axis, length in ((0, 0, width), (1, 1, height)):
        fit = _line(place[..., channel], shown, axis)
        if fit is None:
            return None
        slope, start = fit
        # Whole pixels: a picture is resized to them and placed on them.
        fits += [max(round(1 / slope), 1) / length, float(round(-start / slope))]
    return Geometry(width, height, size, fits[0], fits[2], fits[1], fits[3])


def _line(place: np.ndarray, shown: np.ndarray, axis: int) -> tuple[float, float] | None:
    """Slope and start of ``place = slope * (pixel + 0.5) + start`` along the other axis, from the
    middle half of what is shown (a filter blurs the ends); None if it is no line."""
    seen = np.flatnonzero(shown.any(axis))
    across = np.flatnonzero(shown.any(1 - axis))
    middle = seen[len(seen) // 4 : len(seen) - len(seen) // 4]
    if len(middle) < 2:
        return None
    lines = place[across] if axis == 0 else place[:, across].T
    values = lines[:, middle].astype(np.float64)
    slope, start = np.polyfit(middle + 0.5, values.mean(0), 1)
    straight = np.abs(slope * (middle + 0.5) + start - values).max() < 0.02
    return (float(slope), float(start)) if straight and slope > 0 else None
