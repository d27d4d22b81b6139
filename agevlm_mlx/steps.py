"""Steps that are kept: what has the same inputs and the same code is not done again."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import config
from .errors import UserError
from .evaluation import files
from .evaluation.machine import versions


@dataclass
class Steps:
    """The steps of one folder, remembered in its ``steps.json``."""

    folder: Path
    #: Do everything again.
    fresh: bool = False
    #: What was run: name, seconds, and whether it was kept from an earlier run.
    record: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with contextlib.suppress(
            UserError, TypeError, ValueError
        ):  # missing or damaged: start anew
            self._known = dict(config.read_json(self.folder / "steps.json"))

    def do(
        self,
        name: str,
        work: Callable[[], Any],
        *,
        inputs: Any,
        code: Sequence[str],
        makes: Sequence[Path],
    ) -> Any:
        """Do `work`, unless it was done with the same `inputs`, versions and `code`.

        `code` are files and folders of this package, `makes` the files that must be there
        afterwards. Returns what the work returned, which is kept as JSON.
        """
        key = digest([inputs, versions(), code_digest(code)])
        known = self._known.get(name, {})
        reused = not self.fresh and known.get("key") == key and "result" in known
        reused = reused and all(path.exists() for path in makes)
        if reused:
            print(f"{name}: unchanged, kept ({known['seconds']:.0f} s when it was made)")
        else:
            print(f"{name} ...", flush=True)
            start = time.monotonic()
            if known.get("key") != key or self.fresh or "result" in known:
                self._known[name] = {"key": key}
                self._save()
            result = work()
            known = {"key": key, "seconds": time.monotonic() - start, "result": result}
            self._known[name] = known
            self._save()
            print(f"{name}: {known['seconds']:.0f} s", flush=True)
        self.record.append({"name": name, "seconds": known["seconds"], "reused": reused})
        return known["result"]

    def key(self, name: str) -> str:
        """Identifies what a finished step made, as an input of the steps that build on it."""
        return self._known[name]["key"]

    def mark(self, name: str, value: Any) -> None:
        """Remember, from inside a step's work, how far it came."""
        self._known[name]["begun"] = value
        self._save()

    def begun(self, name: str) -> Any:
        """What `mark` remembered of a step that was cut short with the same inputs, or None."""
        return self._known.get(name, {}).get("begun")

    def _save(self) -> None:
        files.write_json(self.folder / "steps.json", self._known)


def digest(value: Any) -> str:
    """16 hex digits that identify a value made of JSON's types."""
    text = json.dumps(files.plain(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(parts: Sequence[str]) -> str:
    """Hash of files and folders of this package, those of `parts` that exist."""
    root, total = Path(__file__).parent, hashlib.sha256()
    for part in parts:
        path = root / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(file.relative_to(root).as_posix().encode() + b"\0")
                total.update(file.read_bytes())
    return total.hexdigest()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[int]:
    """Hold the folder for this process and the commands it starts; yields the lock's descriptor.

    The system frees the lock when the last process that holds it ends, so one left behind by a
    crash never blocks. The file names the process for the message.
    """
    path = folder / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"{folder}: another run works in it (process {owner}); wait for it, stop it, or choose "
            "another --out"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)
