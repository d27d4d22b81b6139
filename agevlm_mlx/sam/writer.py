"""Writing a SAM store, so that it can be killed at any moment and continued.

New images are appended to the store's tail. When the tail has the size of a shard it becomes one:
the shard is complete on disk, under a name of its own, before the index mentions it, and the
index, which lists shards only, is replaced atomically. Files that are no longer part of the store
are deleted. The bytes of a finished store depend on the images and their order only, not on when
the writer flushed or died.
"""

import dataclasses
import fcntl
import hashlib
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from .. import atomic
from ..errors import UserError
from .index import (
    INDEX,
    SHARD_NAME,
    VERSION,
    Entry,
    Index,
    Shard,
    StoreMeta,
    open_shard,
    read_entries,
    read_index,
)
from .tail import NAME as TAIL_NAME
from .tail import Row, TailWriter, count_features, current_tail, placed, read_tail, tail_path
from .targets import quantise

#: A shard is closed at this size.
SHARD_BYTES = 64 * 2**20
#: A killed run loses about this many seconds of labelling at most.
FLUSH_SECONDS = 5.0
#: Images that could not be labelled, one JSON object a line.
BAD_RECORDS = "bad_records.jsonl"
_LOCK = ".lock"


class StoreWriter:
    """Adds images to a new or an unfinished store; a context manager, one writer at a time.

    `add` keeps images in memory and flushes every `FLUSH_SECONDS`; `flush` and `close`
    put the rest on disk. ``UserError`` if the store was made with another `meta`.
    """

    def __init__(self, path: Path | str, meta: StoreMeta, *, shard_bytes: int = SHARD_BYTES):
        self.path = Path(path)
        self.meta = meta
        self.shard_bytes = shard_bytes
        #: Images on disk and in memory, by image key.
        self._known: dict[str, Entry] = {}
        #: Images whose features are in the index's sums, where the store has features.
        self._counted: set[str] = set()
        #: The images of the shard that is growing. The first `_sealed` are in its file already,
        #: `_pending` at the end are in memory only, those between are in the tail.
        self._rows: list[Row] = []
        self._nbytes = self._masks = self._sealed = self._pending = 0
        self._tail: TailWriter | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("w")
        except OSError as error:
            raise UserError(
                f"{self.path}: expected a folder to write to, got: {error.strerror}; choose "
                "another --out"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._index, self._number = self._resume()
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"{self.path}: another `agevlm teach` is writing this store; wait for it"
            ) from None
        except BaseException:
            self._lock.close()
            raise
        self._flushed = time.monotonic()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> Collection[str]:
        """Keys of the images added so far, in this run or an earlier one."""
        return self._known.keys()

    def sha256(self, image_key: str) -> str:
        """SHA-256 of an image of this store. KeyError if it is not here."""
        return self._known[image_key].sha256

    def prompts(self, image_key: str) -> tuple[str, ...]:
        """Prompt keys of an image of this store. KeyError if it is not here."""
        return self._known[image_key].prompts

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

        An image that the store holds already gets the masks that it lacks, and keeps its others
        and its features. (It is stored anew; its old rows stay, unused.) ``UserError`` if it was
        another file then.
        """
        cells, channels = self.meta.cells, self.meta.feature_channels
        got = (coverage.shape, iou.shape, None if features is None else features.shape)
        expected = ((len(prompts), cells), (len(prompts),), (cells, channels) if channels else None)
        if got != expected:
            raise ValueError(f"{image_key}: expected arrays of shapes {expected}, got {got}")
        half = None if features is None else features.astype(np.float16)
        row = Row(
            image_key, sha256, tuple(prompts), quantise(coverage), iou.astype(np.float16), half
        )
        if image_key not in self._known:
            self._take(row)
        elif sha256 != self.sha256(image_key):
            raise UserError(
                f"{self.path}: image {image_key} changed since it was labelled; delete the store "
                "or choose another --out"
            )
        elif new := [i for i, name in enumerate(prompts) if name not in self.prompts(image_key)]:
            self._take(_joined(self._row(image_key), row, new))

    def flush(self) -> None:
        """Put everything added so far on disk. It costs what is new."""
        if not (self.path / INDEX).exists():
            self._index.write(self.path)
        if self._pending:
            if self._tail is None:
                self._tail = TailWriter(tail_path(self.path, self._number, self._sealed), 0)
            self._tail.append(self._rows[-self._pending :])
            self._pending = 0
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Make a shard of what is left, and let another writer in."""
        if not self._lock.closed:
            try:
                self.flush()
                self._seal()
            finally:
                if self._tail is not None:
                    self._tail.close()
                self._lock.close()

    def _take(self, row: Row) -> None:
        size = row.nbytes
        if self._rows and self._nbytes + size > self.shard_bytes:
            self._seal()
            self._rows = []
            self._nbytes = self._masks = self._sealed = self._pending = 0
            self._number = len(self._index.shards)
        self._known[row.key] = Entry(
            row.sha256, self._number, len(self._rows), self._masks, " ".join(row.prompts)
        )
        self._rows.append(row)
        self._nbytes += size
        self._masks += len(row.prompts)
        self._pending += 1
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _seal(self) -> None:
        """Write the growing shard, then the index that names it; its tail is of no use then."""
        if len(self._rows) == self._sealed:
            return
        name = f"shard-{self._number:05d}-{len(self._rows)}.safetensors"
        data = save(self._tensors())
        atomic.write_bytes(self.path / name, data)
        rows = sum(len(row.prompts) for row in self._rows)
        shard = Shard(name, hashlib.sha256(data).hexdigest(), len(self._rows), rows)
        shards = [*self._index.shards[: self._number], shard]
        moments = self._index.moments.copy()
        count_features(moments, self._rows[self._sealed :], self._counted)
        index = Index(self.meta, moments, shards)
        index.write(self.path)
        self._index, self._sealed, self._pending = index, len(self._rows), 0
        if self._tail is not None:
            self._tail.close()
            self._tail = None
        self._sweep()

    def _tensors(self) -> dict[str, np.ndarray]:
        entries = f"[{','.join(row.entry for row in self._rows)}]".encode()
        tensors = {
            "entries": np.frombuffer(entries, np.uint8),
            "coverage": np.concatenate([row.coverage for row in self._rows]),
            "iou": np.concatenate([row.iou for row in self._rows]),
        }
        features = [row.features for row in self._rows if row.features is not None]
        if features:
            tensors["features"] = np.stack(features)
        # safetensors writes the memory as it lies, so it has to lie in C order.
        return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

    def _resume(self) -> tuple[Index, int]:
        """The index on disk and the number of the shard that grows, whose images are read."""
        if not (self.path / INDEX).exists():
            foreign = [p.name for p in self.path.iterdir() if not _ours(p.name)]
            if foreign:
                raise UserError(
                    f"{self.path}: expected a new folder or a SAM store, got a folder with "
                    f"{foreign[0]}; choose another --out"
                )
            index = Index.empty(self.meta)
        else:
            index = read_index(self.path)
            if not index.shards and current_tail(self.path, []) is None:
                index = Index.empty(self.meta)  # a run that stored nothing binds nobody
                index.write(self.path)
        difference = index.meta.difference(self.meta)
        if difference:
            raise UserError(
                f"{self.path}: this store was made with {difference}; choose another --out "
                "or delete it"
            )
        if index.version != VERSION:
            raise UserError(
                f"{self.path}: its format is version {index.version}, which is read but not "
                f"continued; copy it with `agevlm teach --merge {self.path} --out NEW`"
            )
        self._index, number = index, len(index.shards)
        tail = current_tail(self.path, index.shards)
        if index.shards and tail != tail_path(self.path, number, 0):
            number -= 1
            self._rows = list(self._last_shard(index.shards[-1]))
            self._sealed = len(self._rows)
        if tail is not None:
            length = 0
            for row, end in read_tail(tail, self.meta):
                self._rows.append(row)
                length = end
            self._tail = TailWriter(tail, length)
        self._nbytes = sum(row.nbytes for row in self._rows)
        self._masks = sum(len(row.prompts) for row in self._rows)
        self._counted = set(index.images) if self.meta.feature_channels else set()
        self._known = index.images | dict(placed(number, self._rows))
        index.images, index.files = {}, []  # only what the next index needs
        self._sweep()
        return index, number

    def _row(self, key: str) -> Row:
        """An image of this store as it is stored."""
        entry = self._known[key]
        if entry.shard == self._number:
            return self._rows[entry.image]
        file = open_shard(self.path, self._index.shards[entry.shard], self.meta)
        rows = slice(entry.row, entry.row + len(entry.prompts))
        coverage, iou = (file.get_slice(name)[rows] for name in ("coverage", "iou"))
        features = None
        if self.meta.feature_channels:
            features = file.get_slice("features")[entry.image]
        return Row(key, entry.sha256, entry.prompts, coverage, iou, features)

    def _last_shard(self, shard: Shard) -> Iterable[Row]:
        file = open_shard(self.path, shard, self.meta)
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        row = 0
        entries = read_entries(self.path / shard.file, file, shard)
        for image, (key, sha256, text) in enumerate(entries):
            prompts = tuple(text.split())
            rows = slice(row, row + len(prompts))
            features = tables["features"][image] if "features" in tables else None
            yield Row(key, sha256, prompts, tables["coverage"][rows], tables["iou"][rows], features)
            row = rows.stop

    def _sweep(self) -> None:
        """Delete what is part of the store no longer: old shards and tails, a crash's leftovers."""
        known = {INDEX, _LOCK, BAD_RECORDS, *(shard.file for shard in self._index.shards)}
        tail = current_tail(self.path, self._index.shards)
        for path in self.path.iterdir():
            if path.name not in known and path != tail and _ours(path.name):
                path.unlink(missing_ok=True)


def _joined(row: Row, other: Row, new: Sequence[int]) -> Row:
    """`row` with the masks number `new` of another row of the same image."""
    return dataclasses.replace(
        row,
        prompts=(*row.prompts, *(other.prompts[i] for i in new)),
        coverage=np.concatenate([row.coverage, other.coverage[new]]),
        iou=np.concatenate([row.iou, other.iou[new]]),
    )


def _ours(name: str) -> bool:
    return (
        name in (_LOCK, BAD_RECORDS)
        or name.startswith(atomic.TEMPORARY)
        or bool(SHARD_NAME.fullmatch(name) or TAIL_NAME.fullmatch(name))
    )
