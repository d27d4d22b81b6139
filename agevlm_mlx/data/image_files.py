"""The bytes of a data set's pictures, wherever they lie."""

from pathlib import Path

from ..errors import UserError


def image_exists(path: Path) -> bool:
    """Whether `image_bytes` has something to read."""
    return path.is_file()


def image_bytes(path: Path) -> bytes:
    """The encoded file of a picture. ``UserError`` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
