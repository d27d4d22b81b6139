"""Tables of untrusted files as rows: JSON arrays and lines, TSV, CSV, parquet, Arrow.

A reader goes on after a malformed row where it can; nothing here raises for what a file holds.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .columnar import Damaged, arrow_rows, parquet_rows

#: A row, or what is wrong with it, after what tells it from the others: its first line ("7 row 3"
#: for the third one of an array, where another begins on line 7), or in parquet its place.
Numbered = tuple["int | str", "dict[str, Any] | str"]
#: Characters of one field: base64 images are megabytes, csv's own limit is 131072.
MAX_FIELD = 1 << 28
_REST = "the rest of the file is left out"


def rows(path: Path) -> Iterator[Numbered]:
    """The rows of a table, read as its ending says.

    ``UserError`` for an ending that is none of `ENDINGS`, or where pyarrow is wanted and absent.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: expected a table ({', '.join(ENDINGS)})")
    try:
        yield from reader(path)
    except OSError as error:
        yield 1, f"cannot be read: {error.strerror or one_line(error)}"


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not blank, without their ends; see `damage`."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def damage(text: str) -> str:
    """What is wrong with the characters of a line, "" if nothing is."""
    if "\0" in text:
        return "expected UTF-8 text, got NUL characters"
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 were read as lone surrogates
        return "expected UTF-8 text, got other bytes"
    return ""


def _open(path: Path, newline: str | None = None) -> Any:
    """A text file: UTF-8 with or without its mark, or UTF-16 with it."""
    with path.open("rb") as file:
        wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    if wide:
        return path.open(encoding="utf-16", errors="replace", newline=newline)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


# --- JSON ------------------------------------------------------------------------------------


def _json(path: Path) -> Iterator[Numbered]:
    """An array of objects, or one object a line."""
    with _open(path) as file:
        start = file.read(4096).lstrip()
    if start.startswith("["):
        yield from _array(path)
    else:
        yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[Numbered]:
    for count, (number, line) in enumerate(lines(path)):
        value, problem = _decoded(line)
        if problem and not count and line.startswith("{"):
            with _open(path) as file:  # an indented object has no line that is one
                whole, _ = _decoded(file.read())
            if isinstance(whole, dict):
                names = ", ".join(map(repr, list(whole)[:3]))
                yield 1, f"expected an array, or one object a line, got one object with {names}"
                return
        yield number, problem or _row(value)


def _array(path: Path) -> Iterator[Numbered]:
    with _open(path) as file:
        text = file.read()
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    line, counted, count, last = 1, 0, 0, 0
    while True:
        at = _after_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        where = f"{line} row {count + 1}" if line == last else line
        if not count and text.startswith("]", at):
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "") or one_line(error)
            yield where, f"malformed JSON: {reason}; {_REST}"
            return
        problem = damage(text[at:end]) or _escaped_damage(text[at:end])
        yield where, problem or _row(value)
        at, count, last = _after_space(text, end), count + 1, line
        if text.startswith("]", at):
            return
        if not text.startswith(",", at):
            line += text.count("\n", counted, at)
            yield line, f"malformed JSON: expected ',' or ']'; {_REST}"
            return
        at += 1


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _decoded(text: str) -> tuple[Any, str]:
    """(value, "") of a JSON text, or (None, what is wrong)."""
    problem = damage(text)
    if not problem:
        try:
            return json.loads(text), _escaped_damage(text)
        except (ValueError, RecursionError) as error:  # also a number of 5000 digits
            problem = f"malformed JSON: {getattr(error, 'msg', '') or one_line(error)}"
    return None, problem


def _escaped_damage(text: str) -> str:
    """Half a surrogate pair can also be written as an escape, and no file can hold it."""
    if "\\ud" not in text and "\\uD" not in text:
        return ""
    return damage(json.dumps(json.loads(text), ensure_ascii=False))


def _row(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"expected an object, got {str(value)[:40]!r}"


# --- TSV and CSV -----------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(MAX_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"malformed {path.suffix[1:].upper()}: {error}"
                continue
            problem = next(filter(None, map(damage, values)), "")
            if not any(value.strip() for value in values):
                continue
            if not header:
                header = [value.strip() for value in values]
                if problem or len(set(header)) < len(header):
                    yield number, f"{problem or 'expected different column names'}; {_REST}"
                    return
            elif problem or len(values) != len(header):
                yield number, problem or f"expected {len(header)} values, got {len(values)}"
            else:
                yield number, dict(zip(header, values, strict=True))


# --- parquet and Arrow -----------------------------------------------------------------------


def _columnar(path: Path) -> Iterator[Numbered]:
    number = 0
    read = arrow_rows if path.suffix.lower() == ".arrow" else parquet_rows
    try:
        for number, row in read(path):
            yield number, row
    except Damaged as error:
        pointer = "git-lfs" in str(error)
        yield number + 1, str(error) if pointer else f"{error}; {_REST}"


_READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".tsv": _csv,
    ".csv": _csv,
    ".parquet": _columnar,
    ".arrow": _columnar,
}
#: Of the files that `rows` reads.
ENDINGS = tuple(_READERS)
