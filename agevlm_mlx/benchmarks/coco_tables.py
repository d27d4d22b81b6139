"""COCO's annotation files: one JSON object of hundreds of MB, of which only a part is kept."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import UserError
from ..evaluation.source import Source

Entry = dict[str, Any]


def relative(source: Source, path: Path) -> str:
    """A file's name relative to the folder, so that it is the same on every machine."""
    return path.relative_to(source.folder).as_posix()


def read_table(source: Source, path: Path, keep: Callable[[Entry], Any]) -> Entry | None:
    """A file's lists, an entry being what `keep` makes of it as soon as it is read; None and a
    word to `source` if it is no such file. `keep` sees the outermost object too."""
    try:
        table = read_json(path, keep)
    except UserError as error:
        source.bad(relative(source, path), str(error).removeprefix(str(path)).lstrip(": "))
        return None
    if isinstance(table, dict):
        return table
    source.bad(relative(source, path), f"expected one object as COCO's, got {table!r:.40}")
    return None


def entries(
    source: Source, path: Path, table: Entry | None, part: str, **types: type
) -> Iterator[tuple[str, Entry]]:
    """(where, entry) of one list of a table; those that lack one of `types` are told and left
    out. None is what was not kept, or a table that could not be read."""
    found = [] if table is None else table.get(part)
    if not isinstance(found, list):
        source.bad(relative(source, path), f"expected a list {part!r}")
        return
    for n, entry in enumerate(found, 1):
        if entry is None:
            continue
        where = f"{relative(source, path)}: {part} {n}"
        if isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in types.items()):
            yield where, entry
        else:
            source.bad(where, f"expected {', '.join(types)}, got {entry!r:.60}")
