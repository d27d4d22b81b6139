"""Parquet and Arrow files, untrusted: their rows a few at a time, and single values anywhere.

Rows hold whole images, so nothing here keeps a file in memory. Parquet is read a row group at a
time, of which `Values` keeps the last ones; Arrow files, as ``datasets.save_to_disk`` writes them,
are mapped, and a value is where it lies. Nothing else in this package imports pyarrow.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line

#: Rows in memory at a time.
_BATCH = 16
#: Bytes of decoded row groups that `Values` keeps, and what one of them may take.
_KEPT_BYTES, _MOST_BYTES = 1 << 29, 1 << 32
#: Files that `Values` keeps open.
_OPEN = 64


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
    """(number from 1, row as a dict or what is wrong with it) of a parquet file.

    columns: those wanted, dotted where only a part is ("image.path"); what is left out is never
    read. `Damaged` where the file itself ends or breaks off.
    """
    _pyarrow(path)
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        # As pyarrow would have it, the whole file is read before the first row.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = None if columns is None else list(columns)
            yield from file.iter_batches(batch_size=_BATCH, columns=names)

    yield from _rows(path, batches)


def arrow_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
    """The same of an Arrow stream."""
    pyarrow = _pyarrow(path)
    from pyarrow import ipc

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file, ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch if columns is None else _only(pyarrow, batch, columns)

    yield from _rows(path, batches)


def _only(pyarrow: Any, batch: Any, columns: Sequence[str]) -> Any:
    """Some columns of a batch, or single fields of those that have fields."""
    chosen = {}
    for name in columns:
        column, _, part = name.partition(".")
        values = batch.column(column)
        if part:
            fields = dict(zip((f.name for f in values.type), values.flatten(), strict=True))
            missing = values.is_null()
            values = pyarrow.StructArray.from_arrays([fields[part]], names=[part], mask=missing)
        chosen[column] = values
    return pyarrow.RecordBatch.from_pydict(chosen)


class Damaged(UserError):
    """A file that is not what its name says, or breaks off; the message lacks the path."""


def _rows(path: Path, batches: Callable[[], Iterator[Any]]) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        for batch in batches():
            for at in range(0, batch.num_rows, _BATCH):
                part = batch.slice(at, _BATCH)
                found = _values(part)
                if found is None:  # one of the rows is damaged
                    found = [_row(part.slice(n, 1)) for n in range(part.num_rows)]
                for row in found:
                    number += 1
                    yield number, row
    except UserError:
        raise
    except Exception as error:  # on damaged data Arrow raises OSError, ValueError and its own
        raise Damaged(_damage(path, error)) from None


def _values(batch: Any) -> list[Any] | None:
    try:
        batch.validate(full=True)  # or damaged offsets lead out of the memory
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is no UTF-8, odd dates
        return None


def _row(one: Any) -> Any:
    try:
        one.validate(full=True)
        return one.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return f"cannot be read: {one_line(error)}"


def _damage(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    if pointer:
        return "a git-lfs pointer, not the file itself; get it with `git lfs pull`"
    return f"damaged or truncated {path.suffix[1:]}: {one_line(error)}"


def stored(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Column -> (its type, the dotted names of the parts that can be read alone) of a parquet or
    Arrow file. `Damaged` if it cannot be read."""
    pyarrow = _pyarrow(path)
    from pyarrow import ipc, parquet

    try:
        if path.suffix.lower() == ".arrow":
            with pyarrow.memory_map(str(path)) as file, ipc.open_stream(file) as stream:
                return {field.name: (str(field.type), _parts(field)) for field in stream.schema}
        with parquet.ParquetFile(path) as file:
            parts: dict[str, list[str]] = {}
            for at in range(len(file.schema)):
                part = file.schema.column(at).path
                parts.setdefault(part.split(".")[0], []).append(part)
            return {f.name: (str(f.type), parts.get(f.name, [])) for f in file.schema_arrow}
    except Exception as error:  # see _rows
        raise Damaged(_damage(path, error)) from None


def _parts(field: Any) -> list[str]:
    if not str(field.type).startswith("struct"):
        return [field.name]
    return [f"{field.name}.{field.type.field(at).name}" for at in range(field.type.num_fields)]


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f'{path}: reading {path.suffix} files wants pyarrow: pip install "agevlm-mlx[datasets]"'
        ) from None
    return pyarrow


class Values:
    """Single values of tables, from any thread.

    Of parquet, whole row groups of a column are decoded, since no less can be; the last ones stay,
    up to `kept_bytes`. So values of one row group asked for together cost one reading; a value of
    another group each time costs a row group each time.
    """

    def __init__(self, kept_bytes: int = _KEPT_BYTES) -> None:
        self.kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, tuple[tuple[int, int], Any]] = OrderedDict()
        self._groups: OrderedDict[tuple[Path, int, str], Any] = OrderedDict()
        self._size = 0

    def has(self, path: Path, row: int, column: str) -> bool:
        """Whether the table has such a row and column; the value itself may still be nothing."""
        try:
            with self._lock:
                return self._opened(path).has(row, column)
        except (UserError, OSError):
            return False

    def get(self, path: Path, row: int, column: str) -> Any:
        """The value in row `row` (from 0) as Python has it. ``UserError`` if there is none."""
        where = f"{path}: row {row + 1}"
        with self._lock:
            try:
                file = self._opened(path)
                if not file.has(row, column):
                    raise UserError(f"{where}: no such row with a column {column!r}")
                chunk, at = self._chunk(path, file, row, column)
                one = chunk.slice(at, 1)
                one.validate(full=True)
                return one.to_pylist()[0]
            except UserError:
                raise
            except Exception as error:  # on damaged data Arrow raises OSError and its own
                raise UserError(f"{where}: {_damage(path, error)}") from None

    def _opened(self, path: Path) -> "_Parquet | _Arrow":
        state = path.stat()
        version = state.st_size, state.st_mtime_ns
        known = self._files.pop(path, None)
        if known is None or known[0] != version:
            self._forget(path)
            kind = _Arrow if path.suffix.lower() == ".arrow" else _Parquet
            known = version, kind(path)
        self._files[path] = known
        while len(self._files) > _OPEN:
            oldest, _ = self._files.popitem(last=False)
            self._forget(oldest)
        return known[1]

    def _forget(self, path: Path) -> None:
        for key in [key for key in self._groups if key[0] == path]:
            self._size -= self._groups.pop(key).nbytes

    def _chunk(self, path: Path, file: "_Parquet | _Arrow", row: int, column: str) -> Any:
        """(the array that the value is in, its place there)."""
        if isinstance(file, _Arrow):
            return file.table.column(column), row
        group, at = file.place(row)
        key = path, group, column
        chunk = self._groups.pop(key, None)
        if chunk is None:
            chunk = file.read(group, column)
            self._size += chunk.nbytes
        self._groups[key] = chunk
        while self._size > self.kept_bytes and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._size -= oldest.nbytes
        return chunk, at


class _Parquet:
    """An open parquet file and where its row groups begin."""

    def __init__(self, path: Path) -> None:
        _pyarrow(path)
        from pyarrow import parquet

        self.path = path
        try:
            self.file = parquet.ParquetFile(path, pre_buffer=False)
        except Exception as error:  # see _rows
            raise UserError(f"{path}: {_damage(path, error)}") from None
        table = self.file.metadata
        sizes = [table.row_group(at).num_rows for at in range(table.num_row_groups)]
        self.starts = [0]
        for size in sizes:
            self.starts.append(self.starts[-1] + size)
        self.names = set(self.file.schema_arrow.names)

    def has(self, row: int, column: str) -> bool:
        return 0 <= row < self.starts[-1] and column in self.names

    def place(self, row: int) -> tuple[int, int]:
        """(row group, place in it) of a row."""
        from bisect import bisect_right

        group = bisect_right(self.starts, row) - 1
        return group, row - self.starts[group]

    def read(self, group: int, column: str) -> Any:
        """A column of a row group."""
        table = self.file.metadata.row_group(group)
        parts = [table.column(at) for at in range(table.num_columns)]
        size = sum(p.total_uncompressed_size for p in parts if _belongs(p, column))
        if size > _MOST_BYTES:
            raise UserError(
                f"{self.path}: row group {group + 1} has {size / 2**30:.0f} GiB of {column!r}, "
                f"expected at most {_MOST_BYTES >> 30}; write the file again with fewer rows in one"
            )
        return self.file.read_row_group(group, columns=[column], use_threads=False).column(column)


def _belongs(part: Any, column: str) -> bool:
    return part.path_in_schema.split(".")[0] == column


class _Arrow:
    """A mapped Arrow stream: its values lie in the file."""

    def __init__(self, path: Path) -> None:
        pyarrow = _pyarrow(path)
        from pyarrow import ipc

        try:
            self.table = ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        except Exception as error:  # see _rows
            raise UserError(f"{path}: {_damage(path, error)}") from None

    def has(self, row: int, column: str) -> bool:
        return 0 <= row < self.table.num_rows and column in self.table.column_names
