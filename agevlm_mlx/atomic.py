"""Files written whole or not at all, so that a crash or a full disk never leaves half of one."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

#: How the name of a file that is still being written begins.
TEMPORARY = ".tmp-"


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new."""

    def write(name: Path) -> None:
        name.write_bytes(data)

    write_file(path, write)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """The same for a function that writes a file itself, under the name that it is given."""
    name = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}{path.suffix}"
    try:
        write(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed in the middle of writing left in `folder`.

    For one that nothing else writes to.
    """
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.is_file():
            left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Let a file's new name survive a power cut, as its bytes do."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """The same for UTF-8 text."""
    write_bytes(path, text.encode())
