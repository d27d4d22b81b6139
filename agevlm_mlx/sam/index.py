"""The index of a SAM store: what ``index.json`` and the shards hold, read and checked.

::

    index.json  {"format": "agevlm-sam-store", "version": 2,
                 "meta": {"teacher", "preprocessing", "grid", "feature_channels", "prompt"},
                 "features": {"cells", "sum", "squares"},
                 "shards": [{"file", "sha256", "images", "rows"}]}
    entries     of each shard: JSON [[image key, SHA-256 of its file, its prompt keys]], in order

An image key is the image's path relative to the data folder, with forward slashes; prompt keys
stand in one string, with spaces between. Images that came after the last full shard are in the
store's `tail`. Version 1 held all images in ``index.json``: it is read, but not continued.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from .. import atomic, config
from ..errors import UserError

FORMAT = "agevlm-sam-store"
VERSION = 2
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
    #: What SAM was shown: "box" (the phrase's own box), "point", or "auto ..." with its settings.
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


class Entry(NamedTuple):
    """Where an image's labels are: from row `row` of shard `shard` on, one row a prompt key."""

    sha256: str
    shard: int
    image: int
    row: int
    #: The prompt keys, with spaces between: a tuple of strings would take three times the memory.
    text: str

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt keys."""
        return tuple(self.text.split())


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

    def copy(self) -> "Moments":
        """A copy that can grow without changing this one."""
        return dataclasses.replace(self)

    def equals(self, other: "Moments") -> bool:
        """Whether both are sums over the same features, on whatever machine."""
        sums = ((self.sum, other.sum), (self.squares, other.squares))
        return self.cells == other.cells and all(
            np.allclose(mine, its, rtol=1e-6, atol=1e-6 * self.cells) for mine, its in sums
        )

    def add(self, features: np.ndarray) -> None:
        """Count the cells of [S C] that are not padding (padding is zero in all channels)."""
        inside = features[features.any(axis=-1)].astype(np.float64)
        self.cells += len(inside)
        self.sum = self.sum + inside.sum(0)
        self.squares = self.squares + (inside**2).sum(0)


@dataclass
class Index:
    """A store's images, shards and sums."""

    meta: StoreMeta
    moments: Moments
    shards: list[Shard] = field(default_factory=list)
    images: dict[str, Entry] = field(default_factory=dict)
    version: int = VERSION
    #: The open files of the shards. They can be read even after a writer has deleted them for
    #: larger ones; empty in version 1, which no writer continues.
    files: list[Any] = field(default_factory=list)

    @classmethod
    def empty(cls, meta: StoreMeta) -> "Index":
        """The index of a store without images."""
        channels = meta.feature_channels
        return cls(meta, Moments(0, np.zeros(channels), np.zeros(channels)))

    def write(self, folder: Path) -> None:
        """Replace the folder's ``index.json`` atomically; one shard a line, for people."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "meta": dataclasses.asdict(self.meta),
            "features": {
                "cells": self.moments.cells,
                "sum": self.moments.sum.tolist(),
                "squares": self.moments.squares.tolist(),
            },
        }
        lines = ",\n".join(json.dumps(vars(shard)) for shard in self.shards)
        atomic.write_text(folder / INDEX, f'{json.dumps(head)[:-1]}, "shards": [\n{lines}\n]}}\n')


def entry_text(key: str, sha256: str, prompts: Iterable[str]) -> str:
    """An image's part of a shard's entries. ValueError for a prompt key with a space in it."""
    names = list(prompts)
    if any(not name or name.split() != [name] for name in names):
        raise ValueError(f"expected prompt keys without spaces, got {names}")
    return json.dumps([key, sha256, " ".join(names)])


def read_index(folder: Path) -> Index:
    """Read and check a store's index; ``UserError`` says what is wrong with it."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: expected a SAM store ({INDEX}); make one with `agevlm teach`")
    data = config.read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: expected the index of a SAM store (format {FORMAT!r})")
    version = data.get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise UserError(
            f"{path}: expected format version {VERSION} or 1, got {version!r}; use the "
            "agevlm-mlx that made it, or make it again with `agevlm teach`"
        )
    meta = config.from_dict(StoreMeta, data.get("meta", {}), f"{path}: meta")
    index = Index.empty(meta)
    index.version = version
    try:
        index.shards = [Shard(**shard) for shard in data["shards"]]
        sums = data["features"]
        index.moments = Moments(
            int(sums["cells"]),
            np.asarray(sums["sum"], dtype=np.float64),
            np.asarray(sums["squares"], dtype=np.float64),
        )
        wrong = _wrong_shard(index)
        if wrong is None and version == 1:
            index.images = {key: _old_entry(entry) for key, entry in data["images"].items()}
            wrong = _wrong_entry(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"{type(error).__name__} {error}"
    if wrong:
        raise damaged(path, wrong)
    if version == VERSION:
        for number, shard in enumerate(index.shards):
            file = open_shard(folder, shard, meta)
            entries = read_entries(folder / shard.file, file, shard)
            index.images.update(located(number, entries))
            index.files.append(file)
    return index


def read_entries(path: Path, file: Any, shard: Shard) -> list[tuple[str, str, str]]:
    """(image key, SHA-256, prompt keys) of the images of an open shard, in order."""
    try:
        entries = json.loads(file.get_tensor("entries").tobytes())
        for key, sha256, text in entries:
            if not (type(key) is type(sha256) is type(text) is str):
                raise TypeError(f"{key!r} {sha256!r} {text!r}")
        rows = sum(count(text) for _, _, text in entries)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(path, f"entries: {type(error).__name__} {error}") from None
    if (len(entries), rows) != (shard.images, shard.rows):
        raise damaged(
            path,
            f"entries of {len(entries)} images and {rows} rows, not {shard.images}, {shard.rows}",
        )
    return entries


def located(shard: int, entries: Iterable[Sequence[str]]) -> Iterator[tuple[str, Entry]]:
    """Image keys and entries of a shard's images, whose rows follow each other."""
    row = 0
    for image, (key, sha256, text) in enumerate(entries):
        yield key, Entry(sha256, shard, image, row, text)
        row += count(text)


def count(prompts: str) -> int:
    """How many prompt keys stand in a string."""
    return prompts.count(" ") + 1 if prompts else 0


def open_shard(folder: Path, shard: Shard, meta: StoreMeta, version: int = VERSION) -> Any:
    """The open (memory-mapped) safetensors file of a shard, its tensors' shapes checked."""
    path = folder / shard.file
    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from None
    got = {name: (part.get_dtype(), *part.get_shape()) for name, part in slices.items()}
    expected = {"coverage": ("U8", shard.rows, meta.cells), "iou": ("F16", shard.rows)}
    if meta.feature_channels:
        expected["features"] = ("F16", shard.images, meta.cells, meta.feature_channels)
    entries = got.pop("entries", ())  # of any length
    if got == expected and version > 1 and (len(entries) != 2 or entries[0] != "U8"):
        raise damaged(path, f"entries {entries} instead of bytes")
    if got != expected:
        raise damaged(path, f"tensors {got} instead of {expected}")
    return file


def damaged(path: Path, why: str) -> UserError:
    """The error for a file of a store that cannot be trusted."""
    return UserError(f"{path}: damaged ({why}); delete the store and run `agevlm teach` again")


def _wrong_shard(index: Index) -> str | None:
    for shard in index.shards:
        if not SHARD_NAME.fullmatch(shard.file):
            return f"{shard.file!r} is not the name of a shard"
        if type(shard.images) is not int or type(shard.rows) is not int:
            return f"{shard.file} has {shard.images!r} images and {shard.rows!r} rows"
        if min(shard.images, shard.rows) < 0:
            return f"{shard.file} has a negative size"
    names = [shard.file for shard in index.shards]
    if len(set(names)) < len(names):
        return "a shard is listed twice"
    for sums in (index.moments.sum, index.moments.squares):
        if sums.shape != (index.meta.feature_channels,):
            return f"feature sums of shape {sums.shape}"
        if not np.isfinite(sums).all() or index.moments.cells < 0:
            return f"feature sums that are none, over {index.moments.cells} cells"
    return None


def _old_entry(entry: Mapping[str, Any]) -> Entry:
    """An entry of version 1."""
    text = " ".join(entry["prompts"])
    place = (entry["shard"], entry["image"], entry["row"])
    if any(type(number) is not int for number in place):
        raise TypeError(f"{place}")
    return Entry(str(entry["sha256"]), *place, text)


def _wrong_entry(index: Index) -> str | None:
    """What is wrong with the images of version 1."""
    sizes = [(shard.images, shard.rows) for shard in index.shards]
    for key, entry in index.images.items():
        if not 0 <= entry.shard < len(sizes):
            return f"image {key} is in a shard that is not listed"
        images, rows = sizes[entry.shard]
        if not (0 <= entry.image < images and 0 <= entry.row <= rows - count(entry.text)):
            return f"image {key} has rows outside its shard"
    return None


def short(value: Any) -> str:
    """A fingerprint cut to 12 characters for a message; other values as they are."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{17,}", value):
        return value[:12]
    return str(value)
