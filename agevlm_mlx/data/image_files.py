"""The bytes of a data set's pictures, wherever they lie: in files, or in rows of tables.

A picture in a table has the path TABLE.parquet/ROW/COLUMN (or .arrow), the row counted from 0.
"""

import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from .columnar import Values
from .records import inside

_IN_TABLE = re.compile(r"(.+\.(?:parquet|arrow))/(\d{1,12})/([^/]+)", re.IGNORECASE)
#: What was read last of tables, for all who ask.
_VALUES = Values()


def image_exists(path: Path) -> bool:
    """Whether `image_bytes` has something to read; of a table's row only that it is there."""
    place = _in_table(path)
    return _VALUES.has(*place) if place else path.is_file()


def image_bytes(path: Path) -> bytes:
    """The encoded file of a picture. ``UserError`` if it cannot be read. Any thread may ask."""
    place = _in_table(path)
    if place:
        found = _bytes(_VALUES.get(*place), place[0], str(path))
        if isinstance(found, bytes):
            return found
        path = found
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _in_table(path: Path) -> tuple[Path, int, str] | None:
    """(table, row, column) of a path into a table."""
    match = _IN_TABLE.fullmatch(str(path))
    if match is None or not Path(match[1]).is_file():
        return None
    return Path(match[1]), int(match[2]), match[3]


def _bytes(value: Any, table: Path, where: str) -> bytes | Path:
    """A value's picture, or the file below the table's folder that it names."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value and "\0" not in value:
        return inside(table.parent, value, where)
    raise UserError(f"{where}: expected a picture, got {value!r:.60}")
