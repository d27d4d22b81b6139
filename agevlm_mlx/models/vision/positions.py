"""A table of position embeddings, resampled to another grid of tokens.

Published towers were trained at one input size. For another one their libraries interpolate
the table, and so do we, once, when the weights are converted: `cubic` is what transformers
does for CLIP and SigLIP, `triangle` what it does for SigLIP 2.
"""

from collections.abc import Callable
from math import isqrt

import mlx.core as mx
import numpy as np

#: (length of an axis, its new length) -> f64 [new length, length], rows that sum to 1.
AxisWeights = Callable[[int, int], np.ndarray]


def cubic(source: int, target: int) -> np.ndarray:
    """Cubic convolution of Keys (1981) with a = -0.75, the border repeated; no antialias.

    Equals ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``.
    """
    a = -0.75
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        cells = np.floor(centres) + tap
        d = np.abs(centres - cells)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        columns = np.clip(cells, 0, source - 1).astype(int)
        weights[np.arange(target), columns] += np.where(d <= 1, near, far)
    return weights


def triangle(source: int, target: int) -> np.ndarray:
    """Linear interpolation; where the axis shrinks, the triangle is as wide as a new cell.

    Equals ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)``.
    """
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(1, keepdims=True)


def resample(
    table: mx.array, grid: tuple[int, int], weights: AxisWeights, class_rows: int = 0
) -> mx.array:
    """[class_rows + g*g D], rows of the grid one after the other -> [class_rows + Gh*Gw D].

    The first `class_rows` rows belong to no place and are kept. Lazy, in float32, with the
    dtype of the table. A table that fits already, or that is of no square grid (and so fits
    none), is returned as it is.
    """
    Gh, Gw = grid
    side = isqrt(max(table.shape[0] - class_rows, 0)) if table.ndim == 2 else 0
    if side == 0 or class_rows + side * side != table.shape[0] or (side, side) == grid:
        return table
    down, across = (mx.array(weights(side, n).astype(np.float32)) for n in grid)
    places = table[class_rows:].astype(mx.float32).reshape(side, -1)
    # The CPU's products are float32; a GPU's may be of reduced precision.
    places = mx.matmul(down, places, stream=mx.cpu).reshape(Gh, side, -1)
    places = mx.matmul(across, places, stream=mx.cpu).reshape(Gh * Gw, -1)
    return mx.concatenate([table[:class_rows], places.astype(table.dtype)])
