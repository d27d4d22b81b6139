"""The file of all answers: one JSON line each, written as it is known, so that nothing is lost."""

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from ..atomic import TEMPORARY
from ..errors import UserError
from .benchmark import Kind
from .files import plain

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The answers of a file; a last line that was cut off is left out.

    ``UserError`` for any other line that is no answer, and for a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows: list[Row] = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            _check(row)
        except (ValueError, RecursionError):
            raise UserError(
                f"{path}:{number}: expected an answer of `agevlm evaluate`, got {line[:60]!r}; "
                "remove the file, or pass --fresh"
            ) from None
        rows.append(row)
    return rows


def _check(row: Any) -> None:
    """``ValueError`` unless it is a row as `run` writes them."""
    texts, kinds = ("key", "unit", "prompt", "label"), get_args(Kind)
    good = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in texts)
    good = good and row.get("kind") in kinds and isinstance(row.get("about"), dict)
    good = good and isinstance(row.get("image", 0), str | None) and _all(row.get("options"), str)
    looks = (row.get("look", {}), row.get("shuffled_look", {})) if good else ()
    good = good and all(isinstance(look, dict) for look in looks)
    if not good:
        raise ValueError
    for way in ("", "blind_", "shuffled_"):
        scores = row.get(f"{way}scores", [])
        if not _all(scores, float, int) or len(scores) not in (0, len(row["options"])):
            raise ValueError
        if not isinstance(row.get(f"{way}answer"), str | None):
            raise ValueError


def _all(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kinds) for one in value)


class AnswerFile:
    """Answers that are there (by their keys), and those to come; a context manager.

    One writer at a time: ``UserError`` while another run writes the same file.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        try:
            self._file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file.fileno()).st_ino != path.stat().st_ino:
                raise BlockingIOError  # it was just replaced, by one who holds the new file
            if fresh:
                self._file.truncate(0)
            self._drop_half_a_line()
            self.rows = {row["key"]: row for row in read_rows(path)}
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{path}: another `agevlm evaluate` is writing it; wait for it or choose another "
                "--out"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write an answer. It survives the end of this process; `sync` makes it survive more."""
        kept = plain(row)
        self._file.write(_line(kept))
        self._file.flush()
        self.rows[kept["key"]] = kept

    def replace(self, rows: Iterable[Row]) -> None:
        """Keep these answers instead; the file is written whole or stays as it is."""
        kept = {row["key"]: plain(row) for row in rows}
        name = self.path.parent / f"{TEMPORARY}{uuid.uuid4().hex}.jsonl"
        file = open(name, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.writelines(_line(row) for row in kept.values())
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            file.close()
            name.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file, self.rows = file, kept

    def sync(self) -> None:
        """See to it that what was written survives a power cut."""
        os.fsync(self._file.fileno())

    def _drop_half_a_line(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            self._file.truncate(data.rfind(b"\n") + 1)


def _line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
