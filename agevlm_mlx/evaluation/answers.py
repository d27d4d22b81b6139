"""The file of all answers: one JSON line each, written as it is known, so that nothing is lost."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import plain

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The answers of a file; a last line that a crash cut off is left out.

    ``UserError`` for any other line that is no answer.
    """
    rows: list[Row] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                raise ValueError
        except (ValueError, RecursionError):
            if not line.endswith("\n"):
                break
            raise UserError(
                f"{path}:{number}: expected an answer of `agevlm evaluate`, got {line[:60]!r}; "
                "remove the file, or pass --fresh"
            ) from None
        rows.append(row)
    return rows


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text: {error.reason}; pass --fresh") from None


class AnswerFile:
    """Answers that are there (by their keys), and those to come; a context manager.

    One writer at a time: ``UserError`` while another run writes the same file.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self._file = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fresh:
                self._file.truncate(0)
            self.rows = {row["key"]: row for row in read_rows(path)}
            self._drop_half_a_line()
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
        line = json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        self.rows[kept["key"]] = kept

    def sync(self) -> None:
        """See to it that what was written survives a power cut."""
        os.fsync(self._file.fileno())

    def _drop_half_a_line(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            self._file.truncate(data.rfind(b"\n") + 1)
