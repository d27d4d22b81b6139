"""Pieces of a file, read again when asked for, from any thread or process."""

import os
import tempfile
import weakref
from array import array
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError


class Stored:
    """Pieces of a file that stays open: where each begins and ends, in 16 bytes a piece.

    path: the file's; None for a temporary one without a name. A thread needs no lock and a forked
    process shares the file; a pickle opens it anew, or carries all bytes of a temporary one.
    """

    def __init__(self, file: BinaryIO, path: Path | None) -> None:
        self.path = path
        self._places, self._lengths, self._numbers = array("q"), array("i"), array("i")
        self._open(os.dup(file.fileno()))
        self._stamp = self._now()

    def add(self, offset: int, length: int, number: int) -> None:
        """Remember a piece, and a number that its reader wants to know it by."""
        self._places.append(offset)
        self._lengths.append(length)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._places)

    def number(self, i: int) -> int:
        """The number that piece `i` came with."""
        return self._numbers[i]

    def read(self, i: int) -> bytes:
        """The bytes of piece `i`; fewer if the file has been cut since."""
        if not self._closing.alive:
            raise ValueError("the records are closed")
        return os.pread(self._fd, self._lengths[i], self._places[i])

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._closing()

    def _open(self, fd: int) -> None:
        self._fd = fd
        self._closing = weakref.finalize(self, os.close, fd)

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if k not in ("_fd", "_closing")}
        if self.path is None:
            state["all"] = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        content = state.pop("all", None)
        vars(self).update(state)
        if content is not None:
            with tempfile.TemporaryFile() as file:
                file.write(content)
                file.flush()
                self._open(os.dup(file.fileno()))
        else:
            assert self.path is not None
            try:
                self._open(os.open(self.path, os.O_RDONLY))
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
            if self._now() != self._stamp:
                raise UserError(f"{self.path}: changed since it was read; start again")
