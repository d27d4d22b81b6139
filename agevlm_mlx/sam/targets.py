"""From masks and SAM features to what the student is trained on, numpy only.

Masks travel as COCO run-length encodings (RLE, as in pycocotools' ``maskApi.c``): column
by column, alternating runs of 0 and 1 that start with 0; ``counts`` is the list of run
lengths or the compressed string COCO files use. Files are untrusted, so decoding checks
everything before it allocates.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ..errors import UserError

#: The largest mask decoded, in pixels: a hostile size must not allocate gigabytes.
MAX_PIXELS = 50_000_000


class Placement(Protocol):
    """What pooling needs of `data.image.Geometry`."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    def to_source(self, points: np.ndarray, /) -> np.ndarray: ...


def rle_encode(
    mask: np.ndarray,
    *,
    compressed: bool = True,
    size: tuple[int, int] | None = None,
    corner: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """COCO RLE of mask bool[h w]: ``{"size": [h, w], "counts": str | list[int]}``.

    size: h and w of a larger picture that has `mask` at `corner` (row, column) and nothing else:
    cheaper than a mask of the whole picture.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 2:
        raise ValueError(f"expected a mask of shape [h w], got {mask.shape}")
    height, width = size or mask.shape
    (rows, columns), (top, left) = mask.shape, corner
    strip = np.zeros((columns, height), bool)  # only the columns that the mask is in
    strip[:, top : top + rows] = mask.T
    padded = np.zeros(strip.size + 2, bool)
    padded[1:-1] = strip.ravel()
    changes = np.flatnonzero(padded[1:] != padded[:-1]) + left * height
    edges = np.concatenate([[0], changes, [height * width]]).astype(np.int64)
    counts = np.diff(edges)
    if counts.size > 1 and not counts[-1]:
        counts = counts[:-1]
    return {
        "size": [int(height), int(width)],
        "counts": _pack(counts) if compressed else counts.tolist(),
    }


def rle_decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Mask bool[h w] of a COCO RLE, compressed or not; ``UserError`` if it is malformed."""
    size, counts = _field(rle, "size"), _field(rle, "counts")
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    ):
        raise UserError(f"mask size: expected [height, width] above 0, got {size!r}")
    height, width = size
    if height * width > MAX_PIXELS:
        raise UserError(
            f"mask size: expected at most {MAX_PIXELS} pixels, got {height} x {width}; "
            "make the image smaller"
        )
    runs = _unpack(counts) if isinstance(counts, str | bytes) else _runs(counts)
    # The limits on each run come first: a sum of huge runs could wrap around to the right total.
    if runs.size and (runs.min() < 0 or runs.max() > height * width):
        raise UserError(
            f"mask counts: expected runs of 0 to {height * width} pixels, got "
            f"{int(runs.min())} to {int(runs.max())}; write the mask again"
        )
    if int(runs.sum()) != height * width:
        raise UserError(
            f"mask counts: expected runs that add up to {height} x {width} = "
            f"{height * width} pixels, got {int(runs.sum())}; write the mask again"
        )
    values = np.arange(runs.size) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def _field(rle: Any, name: str) -> Any:
    if not isinstance(rle, Mapping) or name not in rle:
        raise UserError(f"mask: expected a COCO RLE with 'size' and 'counts', got {rle!r:.80}")
    return rle[name]


def _runs(counts: Any) -> np.ndarray:
    if not isinstance(counts, list | tuple) or not all(type(n) is int for n in counts):
        raise UserError(f"mask counts: expected whole numbers or a COCO string, got {counts!r:.60}")
    try:
        return np.asarray(counts, dtype=np.int64)
    except OverflowError:
        raise UserError("mask counts: a run is longer than any image") from None


def _pack(counts: np.ndarray) -> str:
    """COCO's compressed string: differences to the run two before, 5 bits a character."""
    deltas = counts.copy()
    deltas[3:] -= counts[1:-2]
    columns, alive = [], np.ones(deltas.size, dtype=bool)
    while alive.any():
        low = deltas & 31
        deltas = deltas >> 5
        more = np.where(low & 16, deltas != -1, deltas != 0)
        columns.append(np.where(alive, low + np.where(more, 32, 0) + 48, 0))
        alive = alive & more
    text = np.stack(columns, axis=1).ravel() if columns else np.zeros(0)
    return text[text > 0].astype(np.uint8).tobytes().decode("ascii")


def _unpack(text: str | bytes) -> np.ndarray:
    """The runs of a compressed string, the inverse of `_pack`."""
    raw = text.encode("utf-8") if isinstance(text, str) else text
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if codes.size and (codes.min() < 0 or codes.max() > 63):
        raise UserError(f"mask counts: a character COCO's encoding does not use in {text!r:.60}")
    ends = np.flatnonzero(codes < 32)
    if codes.size and (not ends.size or ends[-1] != codes.size - 1):
        raise UserError(f"mask counts: the string stops inside a number: {text[-20:]!r}")
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    lengths = ends - starts + 1
    if lengths.size and lengths.max() > 8:
        raise UserError("mask counts: a run is longer than any image")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    deltas = np.add.reduceat((codes & 31) << (5 * place), starts) if starts.size else starts
    negative = codes[ends] & 16 != 0
    deltas = deltas - np.where(negative, np.int64(1) << (5 * lengths), 0)
    # Runs 1 and 2 are written whole, each later one as the difference to the run two before.
    runs = deltas.astype(np.int64)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of masks bool[... h w]; 0 where both are empty. f32[...]."""
    both = np.logical_and(a, b).sum((-2, -1))
    either = np.logical_or(a, b).sum((-2, -1))
    return (both / np.maximum(either, 1)).astype(np.float32)


def quantise(coverage: np.ndarray) -> np.ndarray:
    """Coverage f32[..] in 0..1 as uint8[..] in 0..255, the form in which it is stored."""
    return np.rint(np.clip(coverage, 0.0, 1.0) * 255.0).astype(np.uint8)


def dequantise(stored: np.ndarray) -> np.ndarray:
    """Stored uint8[..] coverage as f32[..] in 0..1."""
    return stored.astype(np.float32) / np.float32(255.0)


def pool_features(features: np.ndarray, geometry: Placement, grid: tuple[int, int]) -> np.ndarray:
    """SAM's image embedding averaged over the cells of the student's token grid.

    `features` f32[Gs Gs C] covers a square whose side is the longer side of the image: SAM
    resizes that side to its input and pads to the right and below. Each student cell is
    carried back to the source image with `geometry`, cut off at the image's edges, and
    averages the SAM cells it overlaps, by area; so neither SAM's padding nor the student's
    contributes. Returns f32[Gh*Gw C]; cells that lie in the student's padding are zero.
    """
    side = features.shape[0]
    longest = max(geometry.width, geometry.height)
    columns = np.linspace(0.0, geometry.image_size, grid[1] + 1)
    rows = np.linspace(0.0, geometry.image_size, grid[0] + 1)
    x = geometry.to_source(np.stack([columns, np.zeros_like(columns)], axis=1))[:, 0]
    y = geometry.to_source(np.stack([np.zeros_like(rows), rows], axis=1))[:, 1]
    across = _overlap(np.clip(x, 0, geometry.width) * side / longest, side)
    down = _overlap(np.clip(y, 0, geometry.height) * side / longest, side)
    pooled = np.einsum("gr,hc,rck->ghk", down, across, features, optimize=True)
    return pooled.reshape(grid[0] * grid[1], -1).astype(np.float32)


def _overlap(edges: np.ndarray, side: int) -> np.ndarray:
    """f64[cells side]: the share of interval ``edges[i:i+2]`` that lies in unit cell j."""
    cells = np.arange(side)
    low = np.maximum(edges[:-1, None], cells[None])
    high = np.minimum(edges[1:, None], cells[None] + 1)
    length = np.clip(high - low, 0.0, None)
    return length / np.maximum(length.sum(1, keepdims=True), 1e-12)
