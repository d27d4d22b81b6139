"""Writing a SAM store, so that it can be killed at any moment and continued.

A shard is complete on disk, under a name of its own, before the index mentions it, and the
index is replaced atomically. Files that the index does not mention are deleted by the next
writer, which labels those images again. The bytes of a finished store depend on the images
and their order only, not on when the writer flushed or died.
"""

import fcntl
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from .. import atomic
from ..errors import UserError
from .index import (
    INDEX,
    SHARD_NAME,
    Entry,
    Index,
    Shard,
    StoreMeta,
    open_shard,
    read_index,
)
from .targets import quantise

#: A shard is closed at this size.
SHARD_BYTES = 64 * 2**20
#: A killed run loses about this many seconds of labelling at most.
FLUSH_SECONDS = 15.0


@dataclass
class _Table:
    """The rows of a shard that is still growing, as parts to be concatenated."""

    images: int = 0
    rows: int = 0
    nbytes: int = 0
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def append(self, images: int, tensors: Mapping[str, np.ndarray]) -> None:
        self.images += images
        self.rows += len(tensors["iou"])
        self.nbytes += _size(tensors)
        for name, tensor in tensors.items():
            self.parts.setdefault(name, []).append(tensor)

    def copy(self) -> "_Table":
        parts = {name: list(tensors) for name, tensors in self.parts.items()}
        return _Table(self.images, self.rows, self.nbytes, parts)


class StoreWriter:
    """Adds images to a new or an unfinished store; a context manager, one writer at a time.

    `add` keeps images in memory and flushes every `FLUSH_SECONDS`; `flush` and `close`
    put the rest on disk. ``UserError`` if the store was made with another `meta`.
    """

    def __init__(self, path: Path | str, meta: StoreMeta, *, shard_bytes: int = SHARD_BYTES):
        self.path = Path(path)
        self.meta = meta
        self.shard_bytes = shard_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._index, self._table = self._resume()
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"{self.path}: another `agevlm teach` is writing this store; wait for it"
            ) from None
        except BaseException:
            self._lock.close()
            raise
        self._pending: list[tuple[str, str, tuple[str, ...], dict[str, np.ndarray]]] = []
        self._pending_bytes = 0
        self._flushed = time.monotonic()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> set[str]:
        """Keys of the images added so far, in this run or an earlier one."""
        return set(self._index.images) | {key for key, *_ in self._pending}

    def sha256(self, image_key: str) -> str:
        """SHA-256 of an image on disk in this store. KeyError if it is not here."""
        return self._index.images[image_key].sha256

    def prompts(self, image_key: str) -> tuple[str, ...]:
        """Prompt keys of an image on disk in this store. KeyError if it is not here."""
        return self._index.images[image_key].prompts

    def add(
        self,
        image_key: str,
        sha256: str,
        prompts: Sequence[str],
        coverage: np.ndarray,
        iou: np.ndarray,
        features: np.ndarray | None = None,
    ) -> None:
        """Take one image: coverage f32[n S], iou f32[n], features [S C] if the store has them.

        An image that the store holds already is replaced (its old rows stay, unused).
        """
        cells, channels = self.meta.cells, self.meta.feature_channels
        got = (coverage.shape, iou.shape, None if features is None else features.shape)
        expected = ((len(prompts), cells), (len(prompts),), (cells, channels) if channels else None)
        if got != expected:
            raise ValueError(f"{image_key}: expected arrays of shapes {expected}, got {got}")
        tensors = {"coverage": quantise(coverage), "iou": iou.astype(np.float16)}
        if features is not None:
            tensors["features"] = features.astype(np.float16)[None]
        self._pending.append((image_key, sha256, tuple(prompts), tensors))
        self._pending_bytes += _size(tensors)
        if (
            self._pending_bytes > self.shard_bytes
            or time.monotonic() - self._flushed > FLUSH_SECONDS
        ):
            self.flush()

    def flush(self) -> None:
        """Put everything added so far on disk: the shards, then the index that names them."""
        if self._pending or not (self.path / INDEX).exists():
            index, table = self._index.copy(), self._table.copy()
            number = max(len(index.shards) - 1, 0)
            for key, sha256, prompts, tensors in self._pending:
                if table.images and table.nbytes + _size(tensors) > self.shard_bytes:
                    self._write(index, number, table)
                    number, table = number + 1, _Table()
                index.images[key] = Entry(sha256, number, table.images, table.rows, prompts)
                table.append(1, tensors)
                if "features" in tensors:
                    index.moments.add(tensors["features"][0])
            if table.images:
                self._write(index, number, table)
            index.write(self.path)
            self._index, self._table = index, table
            self._pending, self._pending_bytes = [], 0
            self._sweep()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and let another writer in."""
        if not self._lock.closed:
            try:
                self.flush()
            finally:
                self._lock.close()

    def _resume(self) -> tuple[Index, _Table]:
        """The index on disk and the rows of its last shard, which may grow further."""
        if not (self.path / INDEX).exists():
            foreign = [p.name for p in self.path.iterdir() if not _ours(p.name)]
            if foreign:
                raise UserError(
                    f"{self.path}: expected a new folder or a SAM store, got a folder with "
                    f"{foreign[0]}; choose another --out"
                )
            index, table = Index.empty(self.meta), _Table()
        else:
            index, table = read_index(self.path), _Table()
            difference = index.meta.difference(self.meta)
            if difference:
                raise UserError(
                    f"{self.path}: this store was made with {difference}; choose another --out "
                    "or delete it"
                )
            if index.shards:
                last = index.shards[-1]
                file = open_shard(self.path, last, self.meta)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                table.append(last.images, tensors)
        self._index = index
        self._sweep()
        return index, table

    def _write(self, index: Index, number: int, table: _Table) -> None:
        name = f"shard-{number:05d}-{table.images}.safetensors"
        if number < len(index.shards) and index.shards[number].file == name:
            return
        # safetensors writes the memory as it lies, so it has to lie in C order.
        tensors = {k: np.ascontiguousarray(np.concatenate(p)) for k, p in table.parts.items()}
        data = save(tensors)
        atomic.write_bytes(self.path / name, data)
        shard = Shard(name, hashlib.sha256(data).hexdigest(), table.images, table.rows)
        index.shards[number:] = [shard]

    def _sweep(self) -> None:
        """Delete what no index mentions: grown shards' older files, leftovers of a crash."""
        known = {INDEX, ".lock"} | {shard.file for shard in self._index.shards}
        for path in self.path.iterdir():
            if path.name not in known and _ours(path.name):
                path.unlink(missing_ok=True)


def _ours(name: str) -> bool:
    return name == ".lock" or name.startswith(atomic.TEMPORARY) or bool(SHARD_NAME.fullmatch(name))


def _size(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
