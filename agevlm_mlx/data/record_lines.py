"""JSON lines and JSON arrays of any size, read in a stream that says where each item lies.

LLaVA's files are one array, all in one line or indented; nothing here holds more of a file than
one item of it and a buffer.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import UserError
from .records import Problem

#: The longest record, in bytes: a file that is no records at all must not fill the memory.
LONGEST = 32 << 20
_CHUNK = 1 << 20
_MARK = b"\xef\xbb\xbf"  # how Windows begins UTF-8
_SPACE = re.compile(r"[ \t\r\n]*")


class Item(NamedTuple):
    """One item of a file: its bytes' place, its number (line, or place in the array), its value.

    value: what the JSON says, or the `Problem` that keeps it from being read.
    """

    offset: int
    length: int
    number: int
    value: Any


def parse(data: bytes, where: str) -> Any:
    """The value of UTF-8 JSON; ``UserError``, beginning with `where`, if it has none."""
    try:
        text = str(data, "utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected UTF-8 text: {error.reason}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{where}: malformed JSON: {_reason(error)}") from None
    _check_letters(text, value, where)
    return value


def _reason(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error)


def _check_letters(text: str, value: Any, where: str) -> None:
    r"""Half a letter (``\ud83d`` alone) is legal JSON that nothing can write or tokenise."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: expected whole letters, got half of a surrogate pair; write the text "
                "again as UTF-8"
            ) from None


def _begin(file: BinaryIO) -> int:
    """Skip the mark of Windows; where the text begins."""
    if file.read(len(_MARK)) == _MARK:
        return len(_MARK)
    file.seek(0)
    return 0


def scan_lines(file: BinaryIO, path: Path) -> Iterator[Item]:
    """The lines of a file of JSON lines; empty ones are passed over."""
    offset, number = _begin(file), 0
    while line := file.readline(LONGEST):
        number += 1
        length = len(line)
        if length == LONGEST:
            while not line.endswith(b"\n") and (more := file.readline(LONGEST)):
                line, length = more, length + len(more)
            text = f"expected a record of less than {LONGEST >> 20} MB in a line"
            yield Item(offset, length, number, Problem(f"{path}:{number}", text))
        elif line.strip():
            yield Item(offset, length, number, _value(line, f"{path}:{number}"))
        offset += length


def _value(data: bytes, where: str) -> Any:
    try:
        return parse(data, where)
    except UserError as error:
        return Problem.of(error, where)


class Window:
    """A part of a file as text, one character a byte, so that places in it are places in bytes.

    text: the part; at: where we stand in it; base: where it begins in the file. JSON's own signs
    are ASCII and no byte of a longer UTF-8 letter is, so it can be cut up without decoding them.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.text, self.at, self.base = file, "", 0, _begin(file)

    def more(self) -> bool:
        """Drop what lies before `at` and read on, at least as much as is left; False at the end."""
        chunk = self.file.read(max(_CHUNK, len(self.text) - self.at))
        if chunk:
            self.text = self.text[self.at :] + chunk.decode("latin-1")
            self.base, self.at = self.base + self.at, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no space, "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def scan_array(file: BinaryIO, path: Path) -> Iterator[Item]:
    """The items of a file that is one JSON array.

    Where the array itself is broken, the last item's value is the `Problem` that says so: nothing
    after it can be found.

    Raises: ``UserError`` for a file that is no array.
    """
    window = Window(file)
    first = window.peek()
    if first != "[":
        raise _no_array(first, path)
    window.at += 1
    number, after = 0, window.peek()
    while after != "]":
        number += 1
        try:
            item = next_item(window, path, number)
        except (ValueError, RecursionError) as error:
            place = window.base + getattr(error, "pos", window.at)
            yield _broken(window, path, number, place, _reason(error))
            return
        yield item
        after = window.peek()
        if after not in (",", "]"):
            reason = "Expecting ',' delimiter" if after else "the array does not end"
            yield _broken(window, path, number + 1, window.base + window.at, reason)
            return
        window.at += after == ","
    window.at += 1
    if window.peek():
        yield _broken(window, path, number + 1, window.base + window.at, "Extra data")


def _no_array(first: str, path: Path) -> UserError:
    if first > "\x7f":
        return UserError(f"{path}: expected UTF-8 text, got the byte 0x{ord(first):02x}")
    if not first:
        return UserError(f"{path}: expected at least one record, got an empty file")
    got = "an object; JSON lines are read from .jsonl files" if first == "{" else repr(first)
    return UserError(f"{path}: expected a JSON array of records, got {got}")


def next_item(window: Window, path: Path, number: int) -> Item:
    """The item that begins where the window stands (after spaces), which steps over it.

    Raises: ``ValueError`` (``json.JSONDecodeError`` with a place in the window) or
    ``RecursionError`` for what is no JSON.
    """
    window.peek()
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
        except json.JSONDecodeError:
            if len(window.text) - window.at > LONGEST or not window.more():
                raise
            continue
        # At the end of the window a number may go on after it: 1 with .5, or with e+3.
        if end + 2 < len(window.text) or not window.more():
            break
    text, offset = window.text[window.at : end], window.base + window.at
    window.at = end
    where = f"{path}: record {number}"
    if not text.isascii():
        return Item(offset, len(text), number, _value(text.encode("latin-1"), where))
    try:
        _check_letters(text, value, where)
    except UserError as error:
        value = Problem.of(error, where)
    return Item(offset, len(text), number, value)


def _broken(window: Window, path: Path, number: int, place: int, reason: str) -> Item:
    """The problem of an array that cannot be read on from `place` (in bytes)."""
    window.file.seek(0)
    line, left = 1, place
    while left > 0 and (chunk := window.file.read(min(_CHUNK, left))):
        line, left = line + chunk.count(b"\n"), left - len(chunk)
    text = f"malformed JSON: {reason} (record {number}); nothing after it can be read"
    return Item(place, 0, number, Problem(f"{path}:{line}", text))
