"""The SAM store: a teacher's masks and features on disk, read without torch.

A folder of safetensors shards of bounded size, one ``index.json`` that lists them (see `index`),
and, where a writer is at work or was killed, a `tail`::

    entries   uint8 [bytes]          the shard's images, in JSON
    coverage  uint8 [rows S]         share of each token cell that the mask covers, 0..255
    iou       f16   [rows]           the teacher's own estimate of the mask's IoU
    features  f16   [images S C]     optional; the image embedding pooled to the token grid

Made by `writer.StoreWriter`, which may be killed at any moment.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.image_files import image_bytes, image_exists
from ..errors import UserError
from .index import (
    INDEX,
    VERSION,
    Entry,
    Index,
    Moments,
    StoreMeta,
    damaged,
    file_sha256,
    open_shard,
    prompt_key,
    read_entries,
    read_index,
    short,
)
from .tail import Row, count_features, current_tail, placed, read_tail, unreadable
from .targets import dequantise
from .writer import StoreWriter

__all__ = ["Store", "StoreMeta", "StoreWriter", "file_sha256", "image_sha256", "prompt_key"]


def image_sha256(path: Path) -> str:
    """SHA-256 of a picture's bytes, hex, wherever they lie. ``UserError`` if it cannot be read."""
    return hashlib.sha256(image_bytes(path)).hexdigest()


class Store:
    """Read access to a store, whose tensors stay on disk. ``UserError`` if it cannot be used."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._index = read_index(self.path)
        #: The images of the tail; their shard is the one after the last.
        self._tail: list[Row] = []
        if (tail := current_tail(self.path, self._index.shards)) is not None:
            self._tail = [row for row, _ in read_tail(tail, self.meta)]
            count_features(self._index.moments, self._tail, set(self._index.images))
            self._index.images.update(placed(len(self._index.shards), self._tail))
        self._slices: dict[int, dict[str, Any]] = {}

    @property
    def meta(self) -> StoreMeta:
        """Fingerprints, grid and feature channels that the store was made with."""
        return self._index.meta

    def __len__(self) -> int:
        return len(self._index.images)

    def __contains__(self, image_key: object) -> bool:
        return image_key in self._index.images

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.images)

    def prompts(self, image_key: str) -> tuple[str, ...]:
        """The prompt keys that an image has masks for. KeyError if the image is not here."""
        return self._index.images[image_key].prompts

    def sha256(self, image_key: str) -> str:
        """SHA-256 of the image file that was labelled. KeyError if it is not here."""
        return self._index.images[image_key].sha256

    def target(self, image_key: str, prompt: str) -> np.ndarray:
        """Coverage f32[S] in 0..1 of a prompt's mask. KeyError if the store lacks it."""
        entry, row = self._locate(image_key, prompt)
        return dequantise(self._rows(entry, "coverage", row, row + 1)[0])

    def iou(self, image_key: str, prompt: str) -> float:
        """The teacher's estimate of the mask's IoU. KeyError if the store lacks it."""
        entry, row = self._locate(image_key, prompt)
        return float(self._rows(entry, "iou", row, row + 1)[0])

    def features(self, image_key: str) -> np.ndarray | None:
        """SAM features f32[S C] on the token grid, or None if the store holds none.

        Standardised over the whole store: `feature_mean` is subtracted (raw features share
        a large common part) and the rest divided by `feature_scale`. Cells in the student's
        padding are exactly zero in all channels: leave them out of the loss. KeyError if
        the image is not here.
        """
        entry = self._index.images[image_key]
        if not self.meta.feature_channels:
            return None
        raw = self._raw_features(entry).astype(np.float32)
        inside = raw.any(axis=-1, keepdims=True)
        return np.where(inside, (raw - self.feature_mean) / self.feature_scale, np.float32(0))

    @property
    def feature_mean(self) -> np.ndarray:
        """f32[C], mean of all raw feature cells of the store."""
        moments = self._index.moments
        return (moments.sum / max(moments.cells, 1)).astype(np.float32)

    @property
    def feature_scale(self) -> np.float32:
        """Root of the channels' mean variance: one scale for all, so directions survive."""
        moments = self._index.moments
        cells = max(moments.cells, 1)
        variance = moments.squares / cells - (moments.sum / cells) ** 2
        return np.float32(np.sqrt(max(float(variance.mean()), 1e-12)))

    def check(
        self, preprocessing: str, grid: tuple[int, int], images: Mapping[str, str] | None = None
    ) -> None:
        """``UserError`` unless the store fits a training run.

        `preprocessing` is the student's `Preprocessor.fingerprint()`, `grid` its token grid,
        `images` a sample of image key -> SHA-256 of the files about to be used.
        """
        advice = "make a store for this run with `agevlm teach`"
        if tuple(grid) != self.meta.grid:
            raise UserError(
                f"{self.path}: expected a store on a {grid[0]}x{grid[1]} token grid, got "
                f"{self.meta.grid[0]}x{self.meta.grid[1]}; {advice}"
            )
        if preprocessing != self.meta.preprocessing:
            raise UserError(
                f"{self.path}: expected the preprocessing {short(preprocessing)}, got a store "
                f"made with {short(self.meta.preprocessing)} (image size, resize or "
                f"normalisation differ); {advice}"
            )
        for key, sha256 in (images or {}).items():
            if key not in self:
                raise UserError(f"{self.path}: holds no labels for image {key}; {advice}")
            if self.sha256(key) != sha256:
                raise UserError(
                    f"{self.path}: image {key} is another file than the one labelled "
                    f"(SHA-256 {short(sha256)}, labelled {short(self.sha256(key))}); {advice}"
                )

    def verify(
        self, data: Path | None = None, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Hash all shards, and the images under `data`, again, and sum the features up again.

        ``UserError`` at a mismatch. `progress` is called with (files done, files in all).
        """
        shards, images = self._index.shards, self._index.images if data else {}
        total = len(shards) + len(images)
        for number, shard in enumerate(shards):
            self._open(number)
            if file_sha256(self.path / shard.file) != shard.sha256:
                raise damaged(self.path / shard.file, f"its SHA-256 is not the one in {INDEX}")
            if progress:
                progress(number + 1, total)
        tail = current_tail(self.path, shards)
        if tail is not None and (size := unreadable(tail, self.meta)):
            raise UserError(
                f"{tail}: damaged (the last {size} bytes are no images); run the same "
                "`agevlm teach` again, which labels those images again"
            )
        if self._index.version == VERSION and not self._sums().equals(self._index.moments):
            raise damaged(self.path / INDEX, "its feature sums are not those of the shards")
        for number, (key, entry) in enumerate(images.items(), start=len(shards)):
            path = (data or Path()) / key
            if not image_exists(path):
                raise UserError(f"{path}: labelled in {self.path}, but there is no such file")
            if image_sha256(path) != entry.sha256:
                raise UserError(
                    f"{path}: changed since it was labelled in {self.path}; make a new store "
                    "with `agevlm teach`"
                )
            if progress:
                progress(number + 1, total)

    def rows(self, image_key: str) -> dict[str, Any]:
        """One image's stored arrays, as `StoreWriter.add` takes them. For merging stores."""
        entry = self._index.images[image_key]
        prompts = entry.prompts
        return {
            "sha256": entry.sha256,
            "prompts": prompts,
            "coverage": dequantise(self._rows(entry, "coverage", 0, len(prompts))),
            "iou": self._rows(entry, "iou", 0, len(prompts)),
            "features": self._raw_features(entry) if self.meta.feature_channels else None,
        }

    def _sums(self) -> Moments:
        """The sums over all features, from the shards and the tail."""
        moments, counted = Index.empty(self.meta).moments, set[str]()
        if not self.meta.feature_channels:
            return moments
        for shard, file in zip(self._index.shards, self._index.files, strict=True):
            entries = read_entries(self.path / shard.file, file, shard)
            table = file.get_slice("features")
            for image, (key, _, _) in enumerate(entries):
                if key not in counted:
                    counted.add(key)
                    moments.add(table[image])
        count_features(moments, self._tail, counted)
        return moments

    def _locate(self, image_key: str, prompt: str) -> tuple[Entry, int]:
        entry = self._index.images[image_key]
        prompts = entry.prompts
        if prompt not in prompts:
            raise KeyError(f"{image_key} {prompt}")
        return entry, prompts.index(prompt)

    def _rows(self, entry: Entry, table: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of an image's own rows."""
        if entry.shard == len(self._index.shards):
            return getattr(self._tail[entry.image], table)[start:stop]
        return self._open(entry.shard)[table][entry.row + start : entry.row + stop]

    def _raw_features(self, entry: Entry) -> np.ndarray:
        if entry.shard == len(self._index.shards):
            return np.asarray(self._tail[entry.image].features)
        return self._open(entry.shard)["features"][entry.image]

    def _open(self, shard: int) -> dict[str, Any]:
        """The tensors of a shard, of which parts are read when they are asked for."""
        if shard not in self._slices:
            if self._index.files:
                file = self._index.files[shard]
            else:
                listed = self._index.shards[shard]
                file = open_shard(self.path, listed, self.meta, self._index.version)
            self._slices[shard] = {n: file.get_slice(n) for n in file.keys()}  # noqa: SIM118
        return self._slices[shard]
