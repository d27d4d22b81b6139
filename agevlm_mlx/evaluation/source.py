"""A benchmark's files: found in a folder, read row by row, and every bad row told, not raised."""

import base64
import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from ..config import read_json
from ..data import tables
from ..data.image import MAX_PIXELS, open_image
from ..errors import UserError

#: Bad rows that an error lists, before it only counts.
_LISTED = 20
#: Characters: what is longer is no file's name, what is shorter no image in base64.
_LONGEST_NAME, _SHORTEST_IMAGE = 1024, 40


class Source:
    """A benchmark's data: a folder as its authors publish it, with parquet files of the hub, or
    as ``datasets`` saves it to disk.

    Files whose names begin with a dot are not seen. Links are followed, since pictures of several
    benchmarks are often kept elsewhere; names in tables that lead out of the folder are not. A
    dataset saved to disk goes by the names that its parquet files have on the hub:
    ``data/test-00000-of-00001.parquet``.
    """

    def __init__(self, folder: Path, skip_bad: bool = False) -> None:
        """skip_bad: `check` lets bad rows pass. ``UserError`` unless `folder` is one."""
        try:
            got = "" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        except OSError as error:  # no permission, a name too long
            got = str(error.strerror)
        if got:
            raise UserError(f"{folder}: expected a folder with a benchmark's files, got {got}")
        self.folder = folder
        self.problems: list[str] = []
        self._skip_bad = skip_bad
        self._missing: list[str] = []
        self._absent = 0  # rows whose image is not there
        self._files: dict[PurePosixPath, Path] = {}  # every name that a file goes by
        self._named: dict[str, list[Path]] = defaultdict(list)  # by its bare name
        self._folders: set[str] = set()  # bare names of the folders below
        self._images: dict[Path, str] = {}  # what is wrong with an image that was looked at
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._index()

    def _index(self) -> None:
        root = self.folder.resolve()
        known = {root, *root.parents}  # a link upwards is not a part of the data
        for place, folders, files in os.walk(self.folder, followlinks=True):
            here = Path(place)
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and name != "__MACOSX" and _new(here / name, known)
            )
            self._folders.update(folders)
            for name in sorted(files):
                path = here / name
                if name.startswith("."):
                    continue
                self._named[name].append(path)
                self._files[PurePosixPath(self._name(path))] = path
                if name.startswith("data-") and name.endswith(".arrow"):
                    self._files[PurePosixPath(self._name(_on_the_hub(path, self.folder)))] = path
        self._files = dict(sorted(self._files.items()))

    def _name(self, path: Path) -> str:
        """Relative to the folder, so that it is the same on every machine."""
        return path.relative_to(self.folder).as_posix() if path != self.folder else "."

    def find(self, *patterns: str) -> list[Path]:
        """The files, in all folders below, whose name or end of the path fits a pattern
        ("test-*.parquet", "coco/*.json"); those of the first pattern first, each once."""
        return list(
            dict.fromkeys(
                path
                for pattern in patterns
                for name, path in self._files.items()
                if name.match(pattern) and path.is_file()
            )
        )

    def need(self, *patterns: str, what: str) -> list[Path]:
        """The same; where there is none, `check` says that `what` is missing."""
        found = self.find(*patterns)
        if not found:
            self._missing.append(what)
        return found

    def lines(self, path: Path) -> Iterator[tuple[str, str]]:
        """(file:line, text) of the lines that are not blank; bad characters are told to `bad`."""
        try:
            for number, line in tables.lines(path):
                where = f"{self._name(path)}:{number}"
                if problem := tables.damage(line):
                    self.bad(where, problem)
                else:
                    yield where, line
        except OSError as error:
            self.bad(self._name(path), f"cannot be read: {error.strerror}")

    def rows(self, path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """(file:line, row) of a table, by its ending: .json (an array, or one object a line),
        .jsonl, .tsv, .csv, .parquet, .arrow, or a folder of ``datasets.save_to_disk``.

        The file's name is relative to the folder; of parquet and Arrow it is the row's number. No
        two rows have the same, also where an array is all in one line ("file:1 row 2").
        Values of TSV and CSV are str, images of parquet dicts with "bytes" and "path". A malformed
        row, and one that lacks one of `columns`, is told to `bad` and left out.
        """
        if path.is_dir():
            for part in sorted(set(self._files.values())):
                if part.suffix == ".arrow" and part.is_relative_to(path):
                    yield from self.rows(part, columns)
            return
        for number, row in tables.rows(path):
            where = f"{self._name(path)}:{number}"
            if isinstance(row, str):
                self.bad(where, row)
                continue
            lacking = [name for name in columns if name not in row]
            if lacking:
                got = ", ".join(map(str, list(row)[:12])) or "nothing"
                self.bad(where, f"expected {', '.join(columns)}, got {got}")
                if path.suffix.lower() not in (".json", ".jsonl"):
                    return  # all rows have the same columns
                continue
            yield where, row

    def image(self, where: str, value: Any, *folders: str) -> Path | None:
        """A row's image as a file that has an image's header; else None, told to `bad`.

        value: a name, relative to the folder or to one of `folders`, or found by its end anywhere
        below; the {"bytes", "path"} of parquet; bytes; or base64 text. Bytes are written once,
        under their hash, to a folder that `close` removes.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        path, problem = None, f"expected an image, got {str(value)[:40]!r}"
        if isinstance(value, str) and 0 < len(value) < _LONGEST_NAME:
            path, problem = self._found(value, folders)
        if isinstance(value, str) and path is None:
            value = _decoded(value)
        if isinstance(value, bytes) and value:
            path = self._written(value)
        if path is not None:
            if path not in self._images:
                self._images[path] = _wrong(path, self._shown(path))
            problem = self._images[path]
        if path is None or problem:
            self._absent += problem.startswith("no image")
            self.bad(where, problem)
            return None
        return path

    def _shown(self, path: Path) -> str:
        return f"the image {self._name(path)}" if path.is_relative_to(self.folder) else "its image"

    def _found(self, name: str, folders: Sequence[str]) -> tuple[Path | None, str]:
        """The file that a row names, or what is wrong."""
        shown = name[:200]
        relative = PurePosixPath(name)
        if "\0" in name or ".." in relative.parts or relative.is_absolute():
            return None, f"expected the name of an image in the folder, got {shown!r}"
        for folder in ("", *folders):
            path = self.folder / folder / relative
            try:
                there = path.is_file()
            except OSError:  # a name too long
                there = False
            if there:
                return path, ""
        # A layout of its own: the end of the name counts, and the bare name where the folders
        # that the name tells of do not exist. Else an image of another folder could be taken.
        same = [path for path in self._named.get(relative.name, []) if path.is_file()]
        if not self._folders.isdisjoint(relative.parts[:-1]):
            end = relative.parts
            same = [p for p in same if PurePosixPath(self._name(p)).parts[-len(end) :] == end]
        if len(same) == 1:
            return same[0], ""
        if same:
            return None, f"the image {shown!r} is there {len(same)} times, in different folders"
        return None, f"no image {shown!r}"

    def _written(self, data: bytes) -> Path:
        if self._temporary is None:
            try:
                self._temporary = tempfile.TemporaryDirectory(prefix="agevlm-images-")
            except FileNotFoundError as error:  # none that can be written
                raise UserError(f"TMPDIR: expected a folder for pictures: {error}") from None
        path = Path(self._temporary.name) / hashlib.sha256(data).hexdigest()
        if not path.exists():
            path.write_bytes(data)
        return path

    def bad(self, where: str, problem: str) -> None:
        """Count and name a row that cannot be used."""
        said = " ".join(f"{where}: {problem}".split())[:400]
        self.problems.append("".join(c if c.isprintable() else "\ufffd" for c in said))

    def check(self, needs: str) -> None:
        """``UserError`` that lists what is missing, and where it is from (`needs`), or the bad
        rows, unless they are to be skipped."""
        if self._missing:
            missing = "".join(f"\n  missing: {what}" for what in dict.fromkeys(self._missing))
            raise UserError(f"{self.folder}: expected {needs}{missing}")
        if self.problems and not self._skip_bad:
            count = len(self.problems)
            listed = "".join(f"\n  {problem}" for problem in self.problems[:_LISTED])
            more = f"\n  and {count - _LISTED} more" if count > _LISTED else ""
            absent = ""
            if self._absent:
                absent = f"\n  images of {self._absent} rows are missing; expected {needs}"
            raise UserError(
                f"{self.folder}: {count} row{'s' * (count > 1)} cannot be used; --skip-bad leaves "
                f"them out{listed}{more}{absent}"
            )

    def close(self) -> None:
        """Remove the images that were written."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _new(folder: Path, known: set[Path]) -> bool:
    """Whether a folder is none of those before, which links may lead to again, even in circles."""
    try:
        real = folder.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    fresh = real not in known
    known.add(real)
    return fresh


def _on_the_hub(path: Path, folder: Path) -> Path:
    """The path that a file of a saved dataset would have as parquet on the hub."""
    home, split = path.parent, "test"
    if home != folder and (home.parent / "dataset_dict.json").is_file():
        home, split = home.parent, home.name
    elif (home / "state.json").is_file():
        with suppress(UserError, AttributeError):
            split = str(read_json(home / "state.json").get("_split") or split)
    return home / "data" / f"{split}-{path.stem.removeprefix('data-')}.parquet"


def _decoded(text: str) -> bytes | None:
    """The bytes of base64 text, also as a data URL; None if it is none."""
    text = "".join((text.partition(",")[2] if text.startswith("data:") else text).split())
    if len(text) < _SHORTEST_IMAGE:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _wrong(path: Path, name: str) -> str:
    """What is wrong with an image by its header, "" if nothing is."""
    try:
        with open_image(path, name) as image:
            width, height = image.size
    except UserError as error:
        return str(error)
    if not 0 < width * height <= MAX_PIXELS:
        most = f"at most {MAX_PIXELS / 1e6:g} megapixels"
        return f"{name}: expected {most}, got {width}x{height}"
    return ""
