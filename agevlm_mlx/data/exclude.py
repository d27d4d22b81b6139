"""Images that must not be trained on, because a benchmark asks about them.

A picture is known by its name, not by its content: a copy under another name (Visual Genome's of
a COCO picture) is not found.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import tables

#: COCO's names of a picture: 000000000139.jpg (2017), COCO_val2014_000000000139.jpg, and
#: RefCOCO's COCO_train2014_000000000139_4.jpg. The number says which one it is.
_COCO = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:_\d+)?")
#: Copies are also kept in another format.
_ENDING = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
#: Fields that name a row's image, the best first ("image" can also be the picture itself).
_FIELDS = ("image_path", "file_name", "filename", "image")
#: Columns of a data set that tell what a row's picture is called where it comes from.
NAMES = (*_FIELDS[:3], "image_name", "coco_url", "image_id", "cocoid", "coco_id", "id")
#: Those of them where a plain number is COCO's (VQAv2: 458752). A picture of another data set
#: with the same number is left out as well, which costs less than a test picture in training.
_COCO_NUMBERS = ("image_id", "cocoid", "coco_id")
_LONGEST = 1024  # characters of a name; a picture as text is longer


class Excluded:
    """A set of images; ``path in excluded`` whatever folder the path's folder is in.

    A listed name stands for every path that ends in it, in whole parts and in any image format;
    a COCO name for every name of that picture, of 2014 or of 2017.
    """

    def __init__(self, names: Iterable[str]) -> None:
        keys = {_key(name) for name in names}
        self._coco = {key for key in keys if isinstance(key, int)}
        self._tails = {key for key in keys if isinstance(key, tuple)}
        self._depths = sorted({len(tail) for tail in self._tails})

    def __len__(self) -> int:
        return len(self._coco) + len(self._tails)

    def __contains__(self, image: Path) -> bool:
        key = _key(str(image))
        if isinstance(key, int):
            return key in self._coco
        return any(key[-depth:] in self._tails for depth in self._depths)


def _key(name: str) -> int | tuple[str, ...]:
    """A COCO picture's number, or else the parts of a path without the ending of its format."""
    parts = [part for part in _ENDING.sub("", name).split("/") if part not in ("", ".")]
    coco = _COCO.fullmatch(parts[-1]) if parts else None
    return int(coco[1]) if coco else tuple(parts)


def names_in(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row's values of `NAMES` (lower case) say its picture is called.

    An id counts only where it is a COCO name: others are counted within their data set.
    """
    names = []
    for column in NAMES:
        value = row.get(column)
        text = str(value) if type(value) is int else value
        if not isinstance(text, str) or not 0 < len(text) <= _LONGEST or "\0" in text:
            continue
        if column in _COCO_NUMBERS and text.isascii() and text.isdigit():
            text = f"{int(text):012d}" if len(text) <= 12 else text
        if column != "id" or isinstance(_key(text), int):
            names.append(text)
    return tuple(dict.fromkeys(names))


def exclusions(names: Sequence[str]) -> Excluded:
    """The images of all the lists.

    names: of shipped lists ("pope": the 500 COCO pictures that POPE asks about) or paths of
    files: .txt with a name a line ("#" begins a remark), .json, .jsonl, .tsv, .csv whose rows
    have a field image_path, file_name, filename or image.

    Raises: ``UserError`` for a list that does not exist or a row that names no image.
    """
    shipped = {path.stem: path for path in sorted(_folder().glob("*.txt"))}
    listed: list[str] = []
    for name in names:
        path = shipped.get(name, Path(name))
        if not path.is_file():
            raise UserError(
                f"data.exclude: expected {' or '.join(map(repr, shipped))} or a file of image "
                f"names, got {name!r}"
            )
        found = list(_text(path) if path.suffix.lower() == ".txt" else _rows(path))
        if not found:
            raise UserError(f"{path}: expected names of images, got none")
        listed += found
    return Excluded(listed)


def _folder() -> Path:
    return Path(str(resources.files("agevlm_mlx"))) / "assets" / "exclude"


def _text(path: Path) -> Iterator[str]:
    for number, line in tables.lines(path):
        if problem := tables.damage(line):
            raise UserError(f"{path}:{number}: {problem}")
        if not line.startswith("#"):
            yield _checked(line.strip(), f"{path}:{number}")


def _rows(path: Path) -> Iterator[str]:
    for place, row in tables.rows(path):
        where = f"{path}:{place}"
        if isinstance(row, str):
            raise UserError(f"{where}: {row}")
        named = (row.get(field) for field in _FIELDS)
        name = next((n for n in named if isinstance(n, str) and 0 < len(n) <= _LONGEST), None)
        if name is None:
            raise UserError(f"{where}: expected the name of an image in {' or '.join(_FIELDS)}")
        yield _checked(name, where)


def _checked(name: str, where: str) -> str:
    """A name that excludes something, and not everything."""
    if len(name) > _LONGEST or _key(name) == ():
        raise UserError(f"{where}: expected the name of an image, got {name[:40]!r}")
    return name
