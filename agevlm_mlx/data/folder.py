"""A folder of pictures with captions: a.txt beside a.jpg, or tables called metadata.

A table is ``metadata.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` as the Hugging Face hub's image
folders have it: a column ``file_name``, relative to the table's folder, and one of those that
`table_records` knows (text, caption, question with answer, conversations). Folders below are read
too, sorted; where they are splits (train, validation, test), that of training only.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .records import CAPTION_PROMPT, Problem, Record, Turn, inside
from .table_records import Columns, split_of
from .tables import damage, rows

#: What ``agevlm data check`` draws where it is called: not one of the pictures.
REPORT = "data-check.png"
#: Endings of pictures.
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
#: Bytes of a caption's file.
_LONGEST = 1 << 20
#: Files that `is_folder` looks at before it says no.
_LOOKED_AT = 10_000


def is_folder(path: Path) -> bool:
    """Whether a folder has such a table, or a picture with a text beside it; or a table itself."""
    if path.is_file():
        return path.name in TABLES
    looked = 0
    for place, names in _folders(path):
        found = set(names)
        if found.intersection(TABLES):
            return True
        for name in names:
            looked += 1
            if _caption(place / name).name in found and _is_picture(name):
                return True
        if looked > _LOOKED_AT:
            return False
    return False


def read_folder(path: Path) -> Iterator[Record | Problem]:
    """The captions of a folder, those of tables first in each of its folders; or of one table.

    A picture without a caption is a problem, unless its folder or one above it has a table.
    """
    if path.is_file():
        yield from _read_table(path.parent, path)
        return
    listed: set[Path] = set()  # folders whose pictures a table tells of
    for place, names in _folders(path):
        tables = [name for name in TABLES if name in names]
        if tables or place.parent in listed:
            listed.add(place)
        for name in tables:
            yield from _read_table(path, place / name)
        found = set(names)
        for name in names:
            text = _caption(place / name)
            if _is_picture(name) and (text.name in found or place not in listed):
                yield _captioned(path, place / name, text)


def _folders(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its files, sorted) of a folder and those below; links to folders are not followed,
    what begins with a dot is not seen, nor is `REPORT`."""
    for place, below, names in os.walk(path):
        here = Path(place)
        below[:] = sorted(n for n in below if not n.startswith(".") and n != "__MACOSX")
        if here == path and "train" in map(split_of, below):
            below[:] = [n for n in below if split_of(n) in ("", "train")]
        yield here, sorted(n for n in names if not n.startswith(".") and n != REPORT)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def _caption(picture: Path) -> Path:
    return picture.with_suffix(".txt")


def _captioned(root: Path, picture: Path, text: Path) -> Record | Problem:
    """A picture with the text beside it."""
    identity = picture.relative_to(root).as_posix()
    try:
        with text.open("rb") as file:
            data = file.read(_LONGEST + 1)
        said = " ".join(data.decode("utf-8-sig").split())
    except FileNotFoundError:
        return Problem(str(picture), f"expected its caption beside it, in {text.name}", identity)
    except OSError as error:
        return Problem(str(text), f"cannot be read: {error.strerror}", identity)
    except UnicodeDecodeError:
        return Problem(str(text), "expected UTF-8 text, got other bytes", identity)
    wrong = damage(said) or ("" if said else "expected a caption, got an empty file")
    if len(data) > _LONGEST:
        wrong = f"expected a caption of at most {_LONGEST} bytes"
    if wrong:
        return Problem(str(text), wrong, identity)
    turns = (Turn("user", CAPTION_PROMPT), Turn("assistant", said))
    return Record(identity, picture, turns, (), "caption")


def _read_table(root: Path, table: Path) -> Iterator[Record | Problem]:
    columns: Columns | None = None
    for number, row in rows(table):
        where = f"{table}:{number}"
        identity = f"{table.parent.relative_to(root).as_posix()}/{number}".removeprefix("./")
        if isinstance(row, str):
            yield Problem(where, row, identity)
            continue
        free = table.suffix == ".jsonl"  # each row has columns of its own
        if columns is None and not free:
            columns = Columns.of(list(row), str(table), image="file_name")
        try:
            if columns is None or free:
                columns = Columns.of(list(row), where, image="file_name")
            name = row.get(columns.image)
            if not isinstance(name, str) or not name or "\0" in name:
                raise UserError(f"{where}: expected a picture in 'file_name', got {name!r:.60}")
            image = inside(table.parent, name, where)
            yield from columns.records(row, image, identity, where)
        except UserError as error:
            yield Problem.of(error, where, identity)
