"""Data sets of the Hugging Face hub in a folder: parquet files, or what ``save_to_disk`` wrote.

The pictures stay in the tables: that of row 7 (from 0) of `image` is the path
``data/train-00000-of-00002.parquet/7/image``, which `image_files.image_bytes` reads. Of several
splits that of training is read; another one by the path of its file or folder.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .columnar import Damaged, arrow_rows, parquet_rows, stored
from .records import Problem, Record, TextOnly, inside
from .table_records import Columns, split_of

_ENDINGS = (".parquet", ".arrow")
#: Bytes of a state.json.
_STATE = 1 << 24
#: Below a folder, parquet files are looked for so deep: config/train/0000.parquet.
_PARQUET = ("*.parquet", "*/*.parquet", "*/*/*.parquet")


def is_huggingface(path: Path) -> bool:
    """Whether this is a parquet or Arrow file, or a folder with a data set in such."""
    if path.is_file():
        return path.suffix.lower() in _ENDINGS
    return bool(_saved(path)) or any(next(path.glob(p), None) for p in _PARQUET)


def _saved(path: Path) -> list[Path]:
    """The folders of the splits that ``save_to_disk`` wrote."""
    if (path / "state.json").is_file():
        return [path]
    if not (path / "dataset_dict.json").is_file():
        return []
    return sorted(state.parent for state in path.glob("*/state.json"))


def table_files(path: Path) -> list[Path]:
    """The files of a data set's training split, or of all if it has none that is called a split.

    Raises: ``UserError`` where there are only other splits.
    """
    if path.is_file():
        return [path]
    homes = _of_training(path, _saved(path))
    if homes:
        return [file for home in homes for file in _shards(home)]
    return _of_training(path, [file for p in _PARQUET for file in sorted(path.glob(p))])


def _shards(home: Path) -> list[Path]:
    """The files that ``state.json`` lists: saving again leaves those of before in the folder."""
    try:
        with (home / "state.json").open("rb") as file:
            state = json.loads(file.read(_STATE))
        names = [one["filename"] for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return sorted(home.glob("data-*.arrow"))
    plain = [name for name in names if isinstance(name, str) and "\0" not in name]
    found = [home / name for name in plain if Path(name).name == name and name != ".."]
    if len(found) != len(names) or not names:
        raise UserError(f"{home / 'state.json'}: expected names of files in '_data_files'")
    if missing := [file.name for file in found if not file.is_file()]:
        raise UserError(f"{home}: {missing[0]} is missing, which state.json lists; copy it there")
    return found


def _of_training(root: Path, found: list[Path]) -> list[Path]:
    splits = {one: _split(one.relative_to(root)) for one in found}
    train = [one for one in found if splits[one] == "train"]
    if not train and any(splits.values()):
        others = ", ".join(sorted({split for split in splits.values() if split}))
        raise UserError(
            f"{root}: expected the split train, got {others}; pass the path of the one to be read"
        )
    return train or found


def _split(path: Path) -> str:
    """The split that a path is of: a whole word of it, the last one."""
    words = re.split(r"[^a-zA-Z]+", path.as_posix())
    return next((split for word in reversed(words) if (split := split_of(word))), "")


def read_huggingface(path: Path) -> Iterator[Record | Problem | TextOnly]:
    """The records of a table, or of all tables of a folder's training split.

    Columns are known by their names, see `table_records`. A picture is bytes, the hub's bytes and
    path, or a file's name below the table's folder; a list of pictures has to have exactly one. A
    conversation without a picture is `TextOnly`, a caption without one a problem.

    Raises: ``UserError`` where columns are lacking, or pyarrow is.
    """
    root = path if path.is_dir() else path.parent
    for file in table_files(path):
        yield from _of_table(file, file.relative_to(root).as_posix())


def _of_table(file: Path, name: str) -> Iterator[Record | Problem | TextOnly]:
    number = 0
    try:
        columns = stored(file)
        known = Columns.of(list(columns), str(file))
        kind, parts = columns[known.image]
        wanted = [*known.without_image, *_to_count(parts, kind)]
        read = arrow_rows if file.suffix.lower() == ".arrow" else parquet_rows
        for number, row in read(file, wanted):
            where, identity = f"{file}: row {number}", f"{name}:{number}"
            if isinstance(row, str):
                yield Problem(where, row, identity)
                continue
            try:
                if known.form != "caption" and row.get(known.image, b"") in (None, "", []):
                    yield TextOnly()
                    continue
                image = _image(file, number - 1, known.image, row, kind, where)
                names = _names(row.get(known.image))
                yield from known.records(row, image, identity, where, names)
            except UserError as error:
                yield Problem.of(error, where, identity)
    except Damaged as error:
        if not number:
            raise UserError(f"{file}: {error}") from None
        where = f"{file}: row {number + 1}"
        yield Problem(where, f"{error}; the rest of the file is left out")


def _to_count(parts: list[str], kind: str) -> list[str]:
    """What has to be read of a column to know whether a row has one picture: not its bytes, if
    anything else is there."""
    light = [part for part in parts if part.endswith(".path")]
    heavy = parts if kind.removeprefix("large_").startswith(("list", "string")) else []
    return light or heavy


def _names(value: Any) -> list[str]:
    """What the picture of a row was called when it was a file."""
    value = value[0] if isinstance(value, list) and value else value
    name = value.get("path") if isinstance(value, dict) else None
    return [name] if isinstance(name, str) and name and "\0" not in name else []


def _image(
    file: Path, row: int, column: str, values: dict[str, Any], kind: str, where: str
) -> Path:
    """Where the picture of a row is."""
    value = values.get(column)
    if column in values:
        if isinstance(value, list):
            if len(value) != 1:
                raise UserError(f"{where}: expected one picture in {column!r}, got {len(value)}")
            value = value[0]
        if value is None:
            raise UserError(f"{where}: expected a picture in {column!r}, got none")
    if isinstance(value, str) and kind.removeprefix("large_").startswith("string"):
        if not value or "\0" in value:
            raise UserError(f"{where}: expected the name of a picture, got {value!r:.60}")
        return inside(file.parent, value, where)
    return file / str(row) / column
