"""Blanking a part of a picture, and where to blank as much for comparison."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

WAYS = ("mean colour", "blur")
PLACES = ("object", "elsewhere")


def altered(pixels: np.ndarray, area: np.ndarray, way: str) -> np.ndarray:
    """A picture u8[h w 3] with the pixels of `area` bool[h w] blanked in one of `WAYS`."""
    if way == "mean colour":
        cover = pixels.mean((0, 1)).round().astype(np.uint8)
    else:
        rows, columns = np.nonzero(area)
        side = max(int(np.ptp(rows)), int(np.ptp(columns))) + 1
        blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(side / 2))
        cover = np.asarray(blurred)
    return np.where(area[..., None], cover, pixels)


def shifted(mask: np.ndarray, shifts: Sequence[Sequence[int]]) -> np.ndarray:
    """The same shape (down, right) pixels away, all of it inside the picture: by the one shift, or
    each of its `parts` by a shift of its own."""
    moved = np.zeros_like(mask)
    for part, (down, right) in zip(
        [mask] if len(shifts) == 1 else parts(mask), shifts, strict=True
    ):
        rows, columns = np.nonzero(part)
        moved[rows + down, columns + right] = True
    return moved


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask bool[h w] (corners connect), the largest first."""
    labels, parents = np.zeros(mask.shape, int), [0]

    def root(label: int) -> int:
        while parents[label] != label:
            label = parents[label]
        return label

    for y, row in enumerate(mask):
        ends = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            above = labels[y - 1, max(start - 1, 0) : end + 1] if y else np.zeros(0, int)
            met = sorted({root(label) for label in above[above > 0].tolist()})
            label = met[0] if met else len(parents)
            parents += [] if met else [label]
            for other in met[1:]:
                parents[other] = label
            labels[y, start:end] = label
    roots = np.array([root(label) for label in range(len(parents))])[labels]
    found = [roots == label for label in np.unique(roots[mask])]
    return sorted(found, key=lambda part: -int(part.sum()))


def elsewhere(mask: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """Shifts (down, right) to a place inside the picture where the mask bool[h w] neither
    overlaps nor touches itself, each such place being as likely; see `shifted`.

    One for the whole shape, or where that has no room (several things in several corners) one for
    each of its parts; None if they have none either.
    """
    blocked = _around(mask)
    whole = _place(mask, blocked, rng)
    if whole is not None:
        return [whole]
    shifts = []
    for part in parts(mask):
        shift = _place(part, blocked, rng)
        if shift is None:
            return None
        shifts.append(shift)
        blocked = blocked | shifted(part, [shift])
    return shifts if len(shifts) > 1 else None


def _around(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels that touch it."""
    around = mask.copy()
    around[1:] |= mask[:-1]
    around[:-1] |= mask[1:]
    high = around.copy()
    around[:, 1:] |= high[:, :-1]
    around[:, :-1] |= high[:, 1:]
    return around


def _place(
    mask: np.ndarray, blocked: np.ndarray, rng: np.random.Generator
) -> tuple[int, int] | None:
    """A shift to where nothing of the mask is on what is blocked; None if there is no such."""
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    shape = mask[top : rows.max() + 1, left : columns.max() + 1]
    # How many pixels the shape shares with what is blocked, at every place.
    spectrum = np.fft.rfft2(blocked) * np.conj(np.fft.rfft2(shape, mask.shape))
    shared = np.fft.irfft2(spectrum, mask.shape)
    inside = shared[: mask.shape[0] - shape.shape[0] + 1, : mask.shape[1] - shape.shape[1] + 1]
    places = np.argwhere(inside < 0.5)
    if not len(places):
        return None
    down, right = places[rng.integers(len(places))] - (top, left)
    return int(down), int(right)
