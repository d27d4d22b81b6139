"""The run folder: checkpoints that are whole or absent, and the files beside them.

::

    config.toml          the resolved recipe
    metrics.jsonl        one line for every step and every validation
    steps/<n>/           model.safetensors, optimizer.safetensors, state.json after n steps
    last, best           the folder of the newest checkpoint, of the best validated one

A checkpoint is written to a hidden folder, flushed to the disk and renamed. ``state.json``
holds the SHA-256 of the other files, so damage is noticed and an older checkpoint is used.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..atomic import sweep, write_text
from ..errors import UserError

#: What a run writes besides the finished model; `--overwrite` removes these.
RUN_FILES = (
    "config.toml",
    "metrics.jsonl",
    "bad_records.jsonl",
    "steps",
    "last",
    "best",
    "pictures",
    "trackers",
    "adapters",
    # Of a finished model: without these the folder is none, whatever becomes of the new run.
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
#: Held as long as a process trains in the folder; the system lets go of a dead one's.
LOCK = ".lock"
_FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found: tensors by name, and the trainer's own ``state``."""

    step: int
    model: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    state: dict[str, Any]


def save(
    run: Path,
    step: int,
    model: dict[str, mx.array],
    optimizer: dict[str, mx.array],
    state: dict[str, Any],
    *,
    keep: int,
    best: int | None,
) -> Path:
    """Write the checkpoint of `step` and remove old ones but the newest `keep` and step `best`.

    `state` is JSON. On a full disk the half-written folder is removed, older checkpoints stay, and
    ``UserError`` says so.
    """
    final = run / "steps" / str(step)
    temporary = final.with_name(f".{step}.tmp")
    with _room(run, temporary):
        for leftover in final.parent.glob(".*.tmp"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        digests = {}
        for name, tensors in zip(_FILES, (model, optimizer), strict=True):
            # Sorted, so that equal checkpoints have equal hashes.
            ordered = dict(sorted(tensors.items()))
            mx.save_safetensors(str(temporary / name), ordered, {"format": "mlx"})
            digests[name] = _digest(temporary / name)
            _sync(temporary / name)
        content = {"step": step, "sha256": digests, **state}
        write_text(temporary / "state.json", json.dumps(content, indent=1) + "\n")
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(final.parent)
        write_text(run / "last", f"steps/{step}\n")
        if best is not None:
            write_text(run / "best", f"steps/{best}\n")
    # A folder beyond this step is what a damaged checkpoint left when training went back.
    steps = [n for n in _steps(run) if n <= step]
    kept = {*steps[-keep:], step, best}
    for n in _steps(run):
        if n not in kept:
            shutil.rmtree(run / "steps" / str(n))
    return final


def load(run: Path) -> Checkpoint | None:
    """The newest checkpoint of `run` that is whole; None when the run has none yet.

    A damaged one is named on stderr and the one before it is taken. ``UserError`` when all are.
    """
    steps = _steps(run)
    for step in reversed(steps):
        try:
            return load_step(run, step)
        except UserError as error:
            print(f"warning: {error}; going back to the one before", file=sys.stderr)
    if steps:
        raise UserError(
            f"{run}: expected a whole checkpoint, all are damaged; start again with --overwrite"
        )
    return None


def load_step(run: Path, step: int) -> Checkpoint:
    """The checkpoint of `step`; ``UserError`` when it is missing or damaged."""
    folder = run / "steps" / str(step)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        digests = state.pop("sha256")
        if state.pop("step") != step:
            raise ValueError("state.json is of another step")
        tensors: dict[str, dict[str, mx.array]] = {}
        for name in _FILES:
            if _digest(folder / name) != digests[name]:
                raise ValueError(f"{name} has changed since it was written")
            tensors[name] = cast(dict[str, mx.array], mx.load(str(folder / name)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder}: damaged checkpoint ({error})") from None
    return Checkpoint(step, tensors[_FILES[0]], tensors[_FILES[1]], state)


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """The run's folder for this process only; ``UserError`` if another one trains in it."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / LOCK
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run}: another process trains in this folder; wait for it, or choose --out"
            ) from None
        for folder in (run, run / "pictures"):
            sweep(folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def clear(run: Path) -> None:
    """Remove what an earlier run wrote in `run`; other files stay."""
    for name in RUN_FILES:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _steps(run: Path) -> list[int]:
    folder = run / "steps"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _room(run: Path, temporary: Path) -> Iterator[None]:
    """Turn a failed write into one clear line, leaving nothing half written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # mlx reports a short write as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        ):
            raise
        free = shutil.disk_usage(run).free / 2**20
        raise UserError(
            f"{temporary.parent}: could not write a checkpoint ({error}), {free:.0f} MiB free; "
            f"free some and run: agevlm train --resume {run} (older checkpoints are kept)"
        ) from None
