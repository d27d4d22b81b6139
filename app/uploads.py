"""What was uploaded, and by which tab: read at once, deleted when the last tab that has it closes.

Gradio stores an upload under a hash of its content, so that two tabs can have the same file.
"""

import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from agevlm_mlx.errors import UserError

#: Seconds after which an upload that no tab said it has is taken for forgotten.
FORGOTTEN = 60


class Uploads:
    """The files in `folder`, by the tab that has them. Safe to use from any number of threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._tabs: dict[str, set[Path]] = {}
        self._lock = threading.Lock()

    def note(self, tab: str, paths: Iterable[str]) -> None:
        """`tab` has these files; others than uploads are ignored."""
        ours = {path.resolve() for path in map(Path, paths) if self._inside(path)}
        if ours:
            with self._lock:
                self._tabs.setdefault(tab, set()).update(ours)

    def read(self, tab: str, paths: Iterable[str]) -> list[tuple[str, bytes]]:
        """(name, content) of each upload, which are noted; ``UserError`` if one is gone."""
        paths = list(paths)
        self.note(tab, paths)
        files = []
        for path in map(Path, paths):
            try:
                if not self._inside(path):
                    raise OSError("not an upload")
                files.append((path.name, path.read_bytes()))
            except OSError:
                raise UserError(f"{path.name}: it is no longer here; add it again") from None
        return files

    def forget(self, tab: str) -> None:
        """`tab` is closed: delete what no other tab has, and what no tab ever had."""
        with self._lock:
            gone = self._tabs.pop(tab, set())
            kept = set[Path]().union(*self._tabs.values())
            old = time.time() - FORGOTTEN
            for path in self._folder.glob("*/*"):
                with contextlib.suppress(OSError):  # another may have deleted it
                    if path not in kept and (path in gone or path.stat().st_mtime < old):
                        path.unlink()
                        path.parent.rmdir()

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._folder)
