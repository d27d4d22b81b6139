"""The index of a SAM store: what ``index.json`` holds, and how files get on disk safely.

::

    {"format": "agevlm-sam-store", "version": 1,
     "meta": {"teacher", "preprocessing", "grid", "feature_channels", "prompt"},
     "shards": [{"file", "sha256", "images", "rows"}],
     "features": {"cells", "sum", "squares"},
     "images": {image key: {"sha256", "shard", "image", "row", "prompts": [prompt key]}}}

An image key is the image's path relative to the data folder, with forward slashes.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .. import atomic, config
from ..errors import UserError

FORMAT = "agevlm-sam-store"
VERSION = 1
INDEX = "index.json"
#: The number of the shard and how many images it holds: a grown shard is a new file.
SHARD_NAME = re.compile(r"shard-\d{5,9}-\d{1,12}\.safetensors")


def prompt_key(prompt: Sequence[float]) -> str:
    """The name of a prompt: ``box:x0,y0,x1,y1`` or ``point:x,y`` in source pixels."""
    kinds = {4: "box", 2: "point"}
    if len(prompt) not in kinds:
        raise ValueError(f"expected a box of 4 or a point of 2 numbers, got {prompt!r}")
    return f"{kinds[len(prompt)]}:" + ",".join(f"{round(float(v), 2):g}" for v in prompt)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What a store was made with. All of it has to agree before images may be added."""

    #: SHA-256 of the teacher's weights.
    teacher: str
    #: `Preprocessor.fingerprint()` of the student.
    preprocessing: str
    #: Token grid (Gh, Gw) of the student; S = Gh * Gw.
    grid: tuple[int, int]
    #: Channels C of the stored features, 0 for none.
    feature_channels: int = 0
    #: What SAM was shown: the phrase's own box, or a point.
    prompt: str = "box"

    def __post_init__(self):
        if min(self.grid) < 1 or max(self.grid) > 4096 or self.feature_channels < 0:
            raise UserError(f"expected a token grid of 1x1 or more, got {self.grid}")

    @property
    def cells(self) -> int:
        """S, the number of token cells."""
        return self.grid[0] * self.grid[1]

    def difference(self, other: "StoreMeta") -> str | None:
        """The first field in which `other` differs, in words, or None."""
        for spec in dataclasses.fields(self):
            mine, its = getattr(self, spec.name), getattr(other, spec.name)
            if mine != its:
                name = spec.name.replace("_", " ")
                return f"another {name} ({short(mine)}, this run has {short(its)})"
        return None


@dataclass(frozen=True)
class Entry:
    """Where an image's labels are: rows ``row .. row + len(prompts)`` of shard `shard`."""

    sha256: str
    shard: int
    image: int
    row: int
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: `rows` masks and `images` feature maps."""

    file: str
    sha256: str
    images: int
    rows: int


@dataclass
class Moments:
    """Running sums over feature cells, from which mean and scale are made."""

    cells: int
    sum: np.ndarray
    squares: np.ndarray

    def add(self, features: np.ndarray) -> None:
        """Count the cells of [S C] that are not padding (padding is zero in all channels)."""
        inside = features[features.any(axis=-1)].astype(np.float64)
        self.cells += len(inside)
        self.sum = self.sum + inside.sum(0)
        self.squares = self.squares + (inside**2).sum(0)


@dataclass
class Index:
    """Everything in ``index.json``."""

    meta: StoreMeta
    moments: Moments
    shards: list[Shard] = field(default_factory=list)
    images: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def empty(cls, meta: StoreMeta) -> "Index":
        """The index of a store without images."""
        channels = meta.feature_channels
        return cls(meta, Moments(0, np.zeros(channels), np.zeros(channels)))

    def copy(self) -> "Index":
        """A copy that can grow without changing this one."""
        moments = dataclasses.replace(self.moments)
        return Index(self.meta, moments, list(self.shards), dict(self.images))

    def write(self, folder: Path) -> None:
        """Replace the folder's index atomically; one image a line, for people and diffs."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "meta": dataclasses.asdict(self.meta),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "features": {
                "cells": self.moments.cells,
                "sum": self.moments.sum.tolist(),
                "squares": self.moments.squares.tolist(),
            },
        }
        lines = (f"{json.dumps(key)}: {json.dumps(vars(e))}" for key, e in self.images.items())
        text = json.dumps(head)[:-1] + ', "images": {\n' + ",\n".join(lines) + "\n}}\n"
        atomic.write_bytes(folder / INDEX, text.encode("utf-8"))


def read_index(folder: Path) -> Index:
    """Read and check a store's index; ``UserError`` says what is wrong with it."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: expected a SAM store ({INDEX}); make one with `agevlm teach`")
    data = config.read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: expected the index of a SAM store (format {FORMAT!r})")
    if data.get("version") != VERSION:
        raise UserError(
            f"{path}: expected format version {VERSION}, got {data.get('version')!r}; use the "
            "agevlm-mlx that made it, or make it again with `agevlm teach`"
        )
    meta = config.from_dict(StoreMeta, data.get("meta", {}), f"{path}: meta")
    try:
        index = Index.empty(meta)
        index.shards = [Shard(**shard) for shard in data["shards"]]
        index.images = {
            key: Entry(**{**entry, "prompts": tuple(entry["prompts"])})
            for key, entry in data["images"].items()
        }
        index.moments = Moments(
            int(data["features"]["cells"]),
            np.asarray(data["features"]["sum"], dtype=np.float64),
            np.asarray(data["features"]["squares"], dtype=np.float64),
        )
        wrong = _inconsistency(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"{type(error).__name__} {error}"
    if wrong:
        raise damaged(path, wrong)
    return index


def open_shard(folder: Path, shard: Shard, meta: StoreMeta) -> Any:
    """The open (memory-mapped) safetensors file of a shard, its tensors' shapes checked."""
    path = folder / shard.file
    expected = {"coverage": [shard.rows, meta.cells], "iou": [shard.rows]}
    if meta.feature_channels:
        expected["features"] = [shard.images, meta.cells, meta.feature_channels]
    try:
        file = safe_open(path, framework="numpy")
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from None
    if shapes != expected:
        raise damaged(path, f"tensors {shapes} instead of {expected}")
    return file


def damaged(path: Path, why: str) -> UserError:
    """The error for a file of a store that cannot be trusted."""
    return UserError(f"{path}: damaged ({why}); delete the store and run `agevlm teach` again")


def _inconsistency(index: Index) -> str | None:
    for shard in index.shards:
        if not SHARD_NAME.fullmatch(shard.file):
            return f"{shard.file!r} is not the name of a shard"
        if min(shard.images, shard.rows) < 0:
            return f"{shard.file} has a negative size"
    for moments in (index.moments.sum, index.moments.squares):
        if moments.shape != (index.meta.feature_channels,):
            return f"feature sums of shape {moments.shape}"
    sizes = [(shard.images, shard.rows) for shard in index.shards]
    for key, entry in index.images.items():
        if not 0 <= entry.shard < len(sizes):
            return f"image {key} is in a shard that is not listed"
        images, rows = sizes[entry.shard]
        if not (0 <= entry.image < images and 0 <= entry.row <= rows - len(entry.prompts)):
            return f"image {key} has rows outside its shard"
    return None


def short(value: Any) -> str:
    """A fingerprint cut to 12 characters for a message; other values as they are."""
    return value[:12] if isinstance(value, str) and len(value) > 16 else str(value)
