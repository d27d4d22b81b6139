"""What the phrases of a record should look at: a teacher's masks from a store, or their own."""

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import UserError
from ..sam.index import prompt_key
from ..sam.jobs import image_key
from ..sam.targets import rle_decode
from .image import Geometry
from .records import Phrase

#: Masks below half a cell or above this share of the picture guide nothing.
_SMALLEST, _LARGEST = 0.5, 0.9


class Targets(Protocol):
    """What is needed of a ``sam.store.Store``, in any thread."""

    meta: Any

    def target(self, image_key: str, prompt: str) -> np.ndarray: ...

    def features(self, image_key: str) -> np.ndarray | None: ...


def check_place(phrase: Phrase, image: Path, width: int, height: int) -> None:
    """``UserError`` if the phrase's box or point is outside its image of width x height px."""
    where = phrase.box or phrase.point
    if where and (where[-2] > width or where[-1] > height):
        what = "box" if phrase.box else "point"
        raise UserError(
            f"the {what} {list(where)} of {phrase.text!r} is outside {image} ({width}x{height})"
        )


def own_mask(phrase: Phrase, image: Path, width: int, height: int) -> np.ndarray:
    """bool [height width], the phrase's mask; ``UserError`` if it is not one of its image."""
    assert phrase.mask is not None
    try:
        mask = rle_decode(phrase.mask)
    except UserError as error:
        raise UserError(f"{phrase.text!r}: {error}") from None
    if mask.shape != (height, width):
        raise UserError(
            f"the mask of {phrase.text!r} is {mask.shape[1]}x{mask.shape[0]}, "
            f"{image} is {width}x{height}"
        )
    return mask


def unfit(covered: float, geometry: Geometry, cells: int) -> Literal["small", "large"] | None:
    """Why a mask that covers so many of the grid's `cells` guides nothing; None if it guides."""
    if covered < _SMALLEST:
        return "small"
    return "large" if covered > _LARGEST * geometry.filled * cells else None


class Guidance:
    """Targets on the token grid `grid`, from the masks of the records, and for phrases without
    one from `store` (image keys relative to `root`) if given."""

    def __init__(self, store: Targets | None, root: Path, grid: tuple[int, int]) -> None:
        self._store, self._root, self._grid = store, root, grid

    def target(
        self, phrase: Phrase, image: Path, geometry: Geometry, flip: bool
    ) -> np.ndarray | None:
        """f32 [S] coverage, mirrored if `flip`, or None for a mask that should not guide.

        ``UserError`` for a place that is not in the image, or that the store does not have.
        """
        width, height = geometry.width, geometry.height
        check_place(phrase, image, width, height)
        where = phrase.box or phrase.point
        if phrase.mask is not None:  # exact, and two phrases may share a box
            target = geometry.mask_to_grid(own_mask(phrase, image, width, height), self._grid)
        elif self._store is not None and where:
            key = image_key(image, self._root)
            try:
                target = self._store.target(key, prompt_key(where))
            except KeyError:
                raise UserError(
                    f"the store has no mask for {phrase.text!r} in {key}; run `agevlm teach` "
                    "on this data again"
                ) from None
        else:
            return None
        if unfit(float(target.sum()), geometry, target.size):
            return None
        return self._turned(target, flip)

    def features(self, image: Path, flip: bool) -> np.ndarray | None:
        """f32 [S C], the teacher's features; None if the store holds none of any image.

        ``UserError`` if it lacks this one.
        """
        if self._store is None or not self._store.meta.feature_channels:
            return None
        key = image_key(image, self._root)
        try:
            rows = self._store.features(key)
        except KeyError:
            rows = None
        if rows is None:
            raise UserError(
                f"the store has no features for {key}; run `agevlm teach` on this data again"
            )
        return self._turned(rows, flip)

    def _turned(self, cells: np.ndarray, flip: bool) -> np.ndarray:
        """[S ...] of the token grid, mirrored left to right if `flip`."""
        if not flip:
            return cells
        return cells.reshape(*self._grid, *cells.shape[1:])[:, ::-1].reshape(cells.shape)
