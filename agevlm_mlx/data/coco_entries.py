"""What is asked of the entries of COCO's tables, whoever reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..sam.targets import MAX_PIXELS
from .records import Problem

#: A list of a table -> what one of its entries is called.
LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}


class Ids:
    """Numbers from 0 for the ids that a file uses: whole numbers, or strings."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def number(self, value: Any, where: str) -> int:
        """``UserError`` for what is no id."""
        if type(value) not in (int, str):
            raise UserError(f"{where}: expected an id, got {value!r:.40}")
        return self.numbers.setdefault(value, len(self.numbers))


def as_object(value: Any, where: str) -> Mapping[str, Any]:
    """An entry, if it is an object; else ``UserError``, as from all of these."""
    if isinstance(value, Problem):
        raise UserError(f"{where}: {value.problem}")
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got {value!r:.40}")
    return value


def text_in(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The text under a key, without the spaces around it."""
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{where}: expected text in {key!r}, got {value!r:.60}")
    return value.strip()


def need(path: Path, found: set[str], *wanted: str) -> None:
    """That lists with something in them were found."""
    lacking = [key for key in wanted if key not in found]
    if lacking:
        got = ", ".join(sorted(found)) or "no list with anything in it"
        raise UserError(f"{path}: not as COCO tables are: expected {', '.join(lacking)}, got {got}")


def size_in(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Height and width of a picture."""
    height, width = entry.get("height"), entry.get("width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise UserError(f"{where}: expected an image with pixels, got {width!r}x{height!r:.20}")
    if height * width > MAX_PIXELS:
        raise UserError(f"{where}: expected at most {MAX_PIXELS} pixels, got {width}x{height}")
    return height, width
