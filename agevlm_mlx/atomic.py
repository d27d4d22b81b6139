"""Files written whole or not at all, so that a crash or a full disk never leaves half of one."""

import os
import tempfile
from pathlib import Path

#: How the name of a file that is still being written begins.
TEMPORARY = ".tmp-"


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself has to survive a power cut, too
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """The same for UTF-8 text."""
    write_bytes(path, text.encode())
