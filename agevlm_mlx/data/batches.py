"""Training batches: images, the texts drawn for them, and what their phrases should look at.

A batch is a pure function of the seed and the step number, so that a resumed run sees
exactly what an undisturbed one would have seen.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UserError
from ..sam.index import prompt_key
from ..sam.targets import rle_decode
from .chat import Encoded, encode
from .image import Geometry, Preprocessor, load_image
from .records import Phrase, Record

#: Lengths are padded to multiples of these, so that few different shapes occur.
_TOKENS, _ROWS = 4, 32
_PIXEL_BYTES = 1 << 30
#: Masks below half a cell or above this share of the picture guide nothing.
_SMALLEST, _LARGEST = 0.5, 0.9


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """`n` texts an image, drawn from these kinds; texts of one group are padded together."""

    kinds: tuple[str, ...]
    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1 or not self.kinds:
            raise UserError(
                f"texts: expected kinds and n >= 1, got {list(self.kinds)} and {self.n}"
            )


@dataclass
class TextGroup:
    """R texts for each of B images. P guided positions, padded with weight 0.

    ids, labels (the next token): i32 [B R T]; loss_mask: f32 [B R T], 1 where the label counts.
    rows (b*R + r), cols: i32 [P]; target: f32 [P S], mask coverage 0..1; weight: f32 [P].
    """

    ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    target: np.ndarray
    weight: np.ndarray


@dataclass
class Batch:
    """pixels f32 [B Hi Wi 3]; sam_features f32 [B S C] or None."""

    pixels: np.ndarray
    groups: tuple[TextGroup, ...]
    sam_features: np.ndarray | None
    record_ids: list[str]
    step: int


class Targets(Protocol):
    """What is needed of a ``sam.store.Store``."""

    meta: Any

    def target(self, image_key: str, prompt: str) -> np.ndarray: ...

    def features(self, image_key: str) -> np.ndarray | None: ...


class Batches:
    """Draws batches from records.

    Each epoch goes once through the images in a random order; each image brings `n` texts of
    every group. Targets come from `store`, else from the records' own masks.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        preprocessor: Preprocessor,
        grid: tuple[int, int],
        *,
        batch_size: int,
        groups: Sequence[GroupSpec],
        seed: int,
        store: Targets | None = None,
        flip: bool = False,
        root: Path | None = None,
    ) -> None:
        self.tokenizer, self.preprocessor, self.grid = tokenizer, preprocessor, grid
        self.batch_size, self.groups, self.seed = batch_size, tuple(groups), seed
        self.store, self.flip = store, flip
        self.by_image: dict[Path, dict[str, list[Record]]] = {}
        for record in records:
            self.by_image.setdefault(record.image, {}).setdefault(record.kind, []).append(record)
        kinds = {record.kind for record in records}
        for group in self.groups:
            if not kinds.intersection(group.kinds):
                raise UserError(
                    f"texts: the data has no texts of kind {' or '.join(group.kinds)}; "
                    f"it has {', '.join(sorted(kinds)) or 'none'}"
                )
        wanted = {kind for group in self.groups for kind in group.kinds}
        self.images = [i for i, texts in self.by_image.items() if wanted.intersection(texts)]
        self.root = root or _common_root(self.images)
        self._pixels: OrderedDict[Path, tuple[np.ndarray, Geometry]] = OrderedDict()
        self._encode = lru_cache(maxsize=1 << 16)(self._encode_text)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def batch(self, step: int) -> Batch:
        """Batch number `step`, the same for the same seed."""
        first = step * self.batch_size
        images = [self._image(first + slot) for slot in range(self.batch_size)]
        seen = [self._look(image) for image in images]
        flips = [
            self.flip and bool(self._rng(step, slot, 0).random() < 0.5)
            for slot in range(self.batch_size)
        ]
        pixels = [self.preprocessor.normalise(*looked) for looked in seen]
        pixels = np.stack([p[:, ::-1] if f else p for p, f in zip(pixels, flips, strict=True)])
        drawn: list[str] = []
        groups = tuple(
            self._group(step, g, images, [geometry for _, geometry in seen], flips, drawn)
            for g in range(len(self.groups))
        )
        return Batch(pixels, groups, self._features(images, flips), drawn, step)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, 77]).permutation(len(self.images))

    def _image(self, draw: int) -> Path:
        epoch, place = divmod(draw, len(self.images))
        return self.images[self._order(epoch)[place]]

    def _look(self, image: Path) -> tuple[np.ndarray, Geometry]:
        """uint8 pixels in the input's size, kept in memory up to a budget, and their geometry."""
        if image not in self._pixels:
            squeezed, geometry = self.preprocessor.resized(load_image(image))
            self._pixels[image] = np.asarray(squeezed), geometry
            while len(self._pixels) * self._pixels[image][0].nbytes > _PIXEL_BYTES:
                self._pixels.popitem(last=False)
        return self._pixels[image]

    def _encode_text(self, turns: tuple, phrases: tuple[Phrase, ...]) -> Encoded:
        return encode(self.tokenizer, turns, phrases)

    def _texts(self, step: int, slot: int, group: int, image: Path) -> list[Record]:
        spec, own = self.groups[group], self.by_image[image]
        pool = [record for kind in spec.kinds for record in own.get(kind, ())]
        chosen = self._rng(step, slot, group + 1).permutation(len(pool))[: spec.n]
        return [pool[i] for i in chosen]

    def _group(
        self,
        step: int,
        group: int,
        images: list[Path],
        geometries: list[Geometry],
        flips: list[bool],
        drawn: list[str],
    ) -> TextGroup:
        R = self.groups[group].n
        rows: list[tuple[int, Encoded]] = []
        guided: list[tuple[int, int, np.ndarray]] = []
        for slot, (image, geometry) in enumerate(zip(images, geometries, strict=True)):
            for r, record in enumerate(self._texts(step, slot, group, image)):
                # Boxes differ from picture to picture, the tokens of a text do not.
                bare = tuple(Phrase(p.text, p.turn, p.start, p.end) for p in record.phrases)
                encoded = self._encode(record.turns, bare)
                rows.append((slot * R + r, encoded))
                drawn.append(record.id)
                for phrase, span in zip(record.phrases, encoded.spans, strict=True):
                    target = self._target(record, phrase, geometry)
                    if target is None:
                        continue
                    if flips[slot]:
                        target = target.reshape(self.grid)[:, ::-1].reshape(-1)
                    last = len(encoded.ids) - 1  # is predicted, but predicts nothing
                    guided += [(slot * R + r, at, target) for at in span if at < last]
        return _pack(rows, guided, len(images), R, self.grid, self._pad_id())

    def _pad_id(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) else 0

    def _target(self, record: Record, phrase: Phrase, geometry: Geometry) -> np.ndarray | None:
        """f32 [S] coverage, or None for a mask that should not guide."""
        where = phrase.box or phrase.point
        if where and (where[-2] > geometry.width or where[-1] > geometry.height):
            what = "box" if phrase.box else "point"
            raise UserError(
                f"record {record.id}: the {what} {list(where)} of {phrase.text!r} is outside "
                f"{record.image} ({geometry.width}x{geometry.height})"
            )
        if self.store is not None and where:
            key = record.image.relative_to(self.root).as_posix()
            try:
                target = self.store.target(key, prompt_key(where))
            except KeyError:
                raise UserError(
                    f"record {record.id}: the store has no mask for {phrase.text!r} in {key}; "
                    "run `agevlm teach` on this data again"
                ) from None
        elif phrase.mask is not None:
            try:
                mask = rle_decode(phrase.mask)
            except UserError as error:
                raise UserError(f"record {record.id}: {phrase.text!r}: {error}") from None
            if mask.shape != (geometry.height, geometry.width):
                raise UserError(
                    f"record {record.id}: the mask of {phrase.text!r} is {mask.shape[1]}x"
                    f"{mask.shape[0]}, {record.image} is {geometry.width}x{geometry.height}"
                )
            target = geometry.mask_to_grid(mask, self.grid)
        else:
            return None
        usable = _SMALLEST <= target.sum() <= _LARGEST * geometry.filled * target.size
        return target if usable else None

    def _features(self, images: list[Path], flips: list[bool]) -> np.ndarray | None:
        if self.store is None or not self.store.meta.feature_channels:
            return None
        rows = []
        for image, flipped in zip(images, flips, strict=True):
            key = image.relative_to(self.root).as_posix()
            try:
                row = self.store.features(key)
            except KeyError:
                row = None
            if row is None:
                raise UserError(
                    f"the store has no features for {key}; run `agevlm teach` on this data again"
                )
            grid = row.reshape(*self.grid, -1)
            rows.append((grid[:, ::-1] if flipped else grid).reshape(row.shape))
        return np.stack(rows)


def _common_root(images: Sequence[Path]) -> Path:
    """The data folder: that of `images/` when all pictures lie in one, else their parent."""
    parents = {image.parent for image in images}
    if len(parents) == 1:
        parent = parents.pop()
        return parent.parent if parent.name == "images" else parent
    return Path(os.path.commonpath(parents))


def _round_up(n: int, step: int) -> int:
    return max(step, -(-n // step) * step)


def _pack(
    rows: Sequence[tuple[int, Encoded]],
    guided: Sequence[tuple[int, int, np.ndarray]],
    B: int,
    R: int,
    grid: tuple[int, int],
    pad: int,
) -> TextGroup:
    """Arrays of the encoded texts; a row that no text fills has no loss."""
    T = _round_up(max((len(e.ids) for _, e in rows), default=1) - 1, _TOKENS)
    ids, labels = (np.full((B * R, T), pad, np.int32) for _ in range(2))
    loss_mask = np.zeros((B * R, T), np.float32)
    for row, encoded in rows:
        n = len(encoded.ids) - 1
        ids[row, :n], labels[row, :n] = encoded.ids[:-1], encoded.ids[1:]
        loss_mask[row, :n] = encoded.loss_mask[1:]
    P = _round_up(len(guided), _ROWS)
    place = np.zeros((2, P), np.int32)
    target = np.zeros((P, grid[0] * grid[1]), np.float32)
    weight = np.zeros(P, np.float32)
    for p, (row, column, coverage) in enumerate(guided):
        place[:, p], target[p], weight[p] = (row, column), coverage, 1
    shape = (B, R, T)
    return TextGroup(
        ids.reshape(shape),
        labels.reshape(shape),
        loss_mask.reshape(shape),
        place[0],
        place[1],
        target,
        weight,
    )
