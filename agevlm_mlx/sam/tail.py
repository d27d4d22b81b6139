"""The tail of a SAM store: the images after its last full shard, in a file that only grows.

So what a flush writes is what is new, and a process that is killed in the middle of one leaves
whole images and at most one piece of an image at the end, which is cut off. A tail belongs to one
state of the index: its name says which shard its images will be in, and how many images that
shard holds before them. Of each image it has::

    u32 length, u32 CRC-32, then `length` bytes: u32 n, n bytes of JSON [image key, SHA-256, prompt
    keys] as in a shard's entries, coverage u8 [rows S], iou f16 [rows], features f16 [S C] or none
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import atomic
from .index import Entry, Moments, Shard, StoreMeta, count, entry_text, located

NAME = re.compile(r"tail-\d{5,9}-\d{1,12}\.bin")
_FRAME, _HEAD = struct.Struct("<II"), struct.Struct("<I")


@dataclass(frozen=True)
class Row:
    """One image's labels as they are stored: coverage u8 [n S], iou f16 [n], features f16 [S C]."""

    key: str
    sha256: str
    prompts: tuple[str, ...]
    coverage: np.ndarray
    iou: np.ndarray
    features: np.ndarray | None

    @cached_property
    def entry(self) -> str:
        """Its part of a shard's entries."""
        return entry_text(self.key, self.sha256, self.prompts)

    @property
    def nbytes(self) -> int:
        """What it adds to a shard."""
        arrays = self.coverage.nbytes + self.iou.nbytes
        return arrays + len(self.entry) + (0 if self.features is None else self.features.nbytes)


def count_features(moments: Moments, rows: Iterable[Row], counted: set[str]) -> None:
    """Add the features of `rows` to `moments`, those of each image once: the keys of `counted`
    are in there already. An image that got more masks later has two rows with the same features."""
    for row in rows:
        if row.features is not None and row.key not in counted:
            moments.add(row.features)
            counted.add(row.key)


def placed(shard: int, rows: Iterable[Row]) -> Iterator[tuple[str, Entry]]:
    """Image keys and entries of rows that are all that shard number `shard` holds so far."""
    return located(shard, ((row.key, row.sha256, " ".join(row.prompts)) for row in rows))


def tail_path(folder: Path, shard: int, images: int) -> Path:
    """The tail whose images continue shard number `shard` after its first `images`."""
    return folder / f"tail-{shard:05d}-{images}.bin"


def current_tail(folder: Path, shards: Sequence[Shard]) -> Path | None:
    """The tail that continues the last of `shards`, or the one after it; None if there is none."""
    names = [tail_path(folder, len(shards), 0)]
    if shards:
        names.insert(0, tail_path(folder, len(shards) - 1, shards[-1].images))
    return next((path for path in names if path.is_file()), None)


def read_tail(path: Path, meta: StoreMeta) -> Iterator[tuple[Row, int]]:
    """The whole images of a tail, each with the file's length up to its end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while (row := _read(file, size, meta)) is not None:
            yield row, file.tell()


def unreadable(path: Path, meta: StoreMeta) -> int:
    """How many bytes at the end of a tail are damaged: they follow its whole images, and are not
    the beginning of one that a killed writer leaves."""
    end = max((end for _, end in read_tail(path, meta)), default=0)
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read()
    return 0 if _is_torn(rest, meta) else len(rest)


def _is_torn(rest: bytes, meta: StoreMeta) -> bool:
    """Whether bytes are the beginning of an image, as far as they go."""
    start = _FRAME.size + _HEAD.size
    if len(rest) < start:
        return True
    length, _ = _FRAME.unpack_from(rest)
    (n,) = _HEAD.unpack_from(rest, _FRAME.size)
    if length <= len(rest) - _FRAME.size:
        return False  # it is all there, and wrong
    if len(rest) < start + n:
        return True
    try:
        _, _, text = json.loads(rest[start : start + n])
        return length == _HEAD.size + n + _array_bytes(count(text), meta)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def _array_bytes(rows: int, meta: StoreMeta) -> int:
    return rows * (meta.cells + 2) + 2 * meta.cells * meta.feature_channels


def _read(file: BinaryIO, size: int, meta: StoreMeta) -> Row | None:
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    length, crc = _FRAME.unpack(head)
    if length > size - file.tell():  # before memory is taken for it
        return None
    payload = file.read(length)
    return _row(payload, meta) if zlib.crc32(payload) == crc else None


def _row(payload: bytes, meta: StoreMeta) -> Row | None:
    try:
        (n,) = _HEAD.unpack_from(payload)
        key, sha256, text = json.loads(payload[_HEAD.size : _HEAD.size + n])
        rows = count(text)
    except (struct.error, ValueError, TypeError, AttributeError, RecursionError):
        return None
    cells, channels = meta.cells, meta.feature_channels
    at = _HEAD.size + n
    if type(key) is not str or type(sha256) is not str:
        return None
    if len(payload) != at + _array_bytes(rows, meta):
        return None
    coverage = np.frombuffer(payload, np.uint8, rows * cells, at).reshape(rows, cells)
    iou = np.frombuffer(payload, np.float16, rows, at + rows * cells)
    features = None
    if channels:
        at += rows * (cells + 2)
        features = np.frombuffer(payload, np.float16, offset=at).reshape(cells, channels)
    return Row(key, sha256, tuple(text.split()), coverage, iou, features)


class TailWriter:
    """Appends images to a tail. Another's pieces after `length` are cut off first."""

    def __init__(self, path: Path, length: int):
        self.path, self._length = path, length
        self._file = path.open("ab", buffering=0)
        self._file.truncate(length)
        atomic.sync_folder(path.parent)

    def append(self, rows: Sequence[Row]) -> None:
        """Put the images on disk, all or (if the disk is full) none of them. OSError if not."""
        data = b"".join(_frame(row) for row in rows)
        try:
            view = memoryview(data)
            while len(view):
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._length)
            error.filename = error.filename or str(self.path)
            raise
        self._length += len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _frame(row: Row) -> bytes:
    entry = row.entry.encode()
    arrays = [row.coverage, row.iou, *([] if row.features is None else [row.features])]
    parts = [_HEAD.pack(len(entry)), entry, *(np.ascontiguousarray(a).tobytes() for a in arrays)]
    payload = b"".join(parts)
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
