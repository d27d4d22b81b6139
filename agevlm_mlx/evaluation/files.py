"""Result files: checked before the work starts, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic import write_bytes, write_text
from ..errors import NO_ROOM, UserError


def check_writable(path: Path) -> None:
    """``UserError`` unless a file can be written at `path`; called before minutes of work."""
    folder = path.parent
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name too long
        raise UserError(f"{path}: expected a name that can be written: {error.strerror}") from None
    if is_folder:
        raise UserError(f"{path}: expected a file to write, got a folder; add a file name")
    if not folder.is_dir():
        raise UserError(f"{path}: expected the folder {folder} to exist; create it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: expected a folder that can be written; choose another one")


def make_folder(path: Path) -> Path:
    """The folder, made if missing; ``UserError`` when it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: expected a folder, got a file; choose another name") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to make this folder; choose another") from None
    except OSError as error:  # a read-only disk, a name too long, /proc
        if error.errno in NO_ROOM:
            raise
        raise UserError(
            f"{path}: cannot make this folder: {error.strerror}; choose another"
        ) from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: expected a folder that can be written; choose another one")
    return path


def write_json(path: Path, value: Any) -> None:
    """Indented JSON that every parser reads: not-a-number becomes null."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_image(path: Path, image: Image.Image) -> None:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def plain(value: Any) -> Any:
    """Numpy values as Python ones, nan and infinity as None, floats to 6 digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    if isinstance(value, str | Path):  # a file's name need not be text
        return str(value).encode("utf-8", "replace").decode()
    return value
