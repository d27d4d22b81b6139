"""Huge JSON files like COCO's, ``{"images": [{}, ...], "annotations": [{}, ...]}``, an entry at a
time: of hundreds of MB only the places of what is needed stay in memory."""

import os
from array import array
from collections.abc import Container, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import UserError
from .record_lines import Item, Window, next_item, parse

#: Bytes counted at a time, to tell a line's number.
_CHUNK = 1 << 20


class JsonTables:
    """An open file whose JSON is one object with lists in it; ``UserError`` if it cannot be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    def __enter__(self) -> "JsonTables":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def entries(self) -> Iterator[tuple[str, Item]]:
        """(key, entry) of all lists of the object, in their order; other values are passed over.

        Raises: ``UserError`` where the file is no such JSON, or ends too early.
        """
        self.file.seek(0)
        window = Window(self.file)
        self._step(window, "{")
        more = window.peek() != "}"
        while more:
            key = self._value(window, 0).value
            self._step(window, ":")
            if window.peek() == "[":
                window.at += 1
                number = 0
                while window.peek() != "]" or number:
                    number += 1
                    yield str(key), self._value(window, number)
                    if self._step(window, ",", "]") == "]":
                        break
                else:
                    window.at += 1
            else:
                self._value(window, 0)
            more = self._step(window, ",", "}") == ","

    def _step(self, window: Window, *expected: str) -> str:
        """Go past the next character, which has to be one of those."""
        found = window.peek()
        if found not in expected:
            got = repr(found) if found else "the end of the file"
            if expected == ("{",):
                raise UserError(
                    f"{self.path}: expected one JSON object with lists in it, got {got}"
                )
            raise self._malformed(window, f"expected {' or '.join(expected)}, got {got}")
        window.at += 1
        return found

    def _value(self, window: Window, number: int) -> Item:
        try:
            return next_item(window, self.path, number)
        except (ValueError, RecursionError) as error:
            raise self._malformed(window, getattr(error, "msg", None) or str(error)) from None

    def _malformed(self, window: Window, reason: str) -> UserError:
        line, place, left = 1, 0, window.base + window.at
        while left > 0 and (chunk := self.read(place, min(_CHUNK, left))):
            line, place, left = line + chunk.count(b"\n"), place + len(chunk), left - len(chunk)
        return UserError(f"{self.path}:{line}: malformed JSON: {reason}")

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes of the file from `start` on."""
        return os.pread(self.file.fileno(), size, start)


class Places:
    """Where entries of a `JsonTables` are, in groups (of a picture, say): 32 bytes an entry."""

    def __init__(self, tables: JsonTables) -> None:
        self.tables = tables
        self._starts = array("q")
        self._facts = array("i")  # length, number, group, kind of each
        self._order: np.ndarray | None = None

    def add(self, item: Item, group: int, kind: int = 0) -> None:
        """Remember an entry; kind: what `of` may choose by."""
        self._starts.append(item.offset)
        self._facts.extend((item.length, item.number, group, kind))

    def of(self, group: int, kinds: Container[int] | None = None) -> Iterator[tuple[int, int, Any]]:
        """(number, kind, entry) of a group's entries in the order of the file, read anew; those
        of `kinds` only."""
        facts = np.frombuffer(self._facts, np.int32).reshape(-1, 4)
        if self._order is None:  # all have been added
            self._order = np.argsort(facts[:, 2], kind="stable").astype(np.int32)
            self._groups = facts[self._order, 2]
        low, high = np.searchsorted(self._groups, [group, group + 1])
        for at in self._order[low:high].tolist():
            length, number, _, kind = facts[at].tolist()
            if kinds is None or kind in kinds:
                data = self.tables.read(self._starts[at], length)
                yield number, kind, parse(data, f"{self.tables.path}: entry {number}")
