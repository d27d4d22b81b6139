"""The records of a data set: an index in memory, the records themselves read when asked for."""

import json
import operator
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from .. import atomic
from ..errors import UserError
from .exclude import Excluded
from .formats import FORMATS, Format
from .record_lines import Item, scan_array, scan_lines
from .record_scan import Index, OnError, Scan, Source
from .records import Problem, Record, TextOnly, to_json
from .stored import Stored

#: What the list of bad records is called.
BAD = "bad_records.jsonl"
#: .jsonl files of a folder that are not its records.
_OTHERS = (BAD, "metadata.jsonl")


class Paths(Sequence[Path]):
    """Paths kept as text, which takes a quarter of the memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, i: int) -> Path: ...
    @overload
    def __getitem__(self, i: slice) -> list[Path]: ...
    def __getitem__(self, i: int | slice) -> Path | list[Path]:
        return [Path(t) for t in self.texts[i]] if isinstance(i, slice) else Path(self.texts[i])


class Records(Sequence[Record]):
    """Records of a data set, in their file's order; ``records[i]`` is read when asked for.

    root: the folder that keys of images are relative to. images: the distinct images, in the
    order of their first record; kinds: the distinct kinds. Of each of the n records: image_of
    i32 [n] and kind_of i16 [n] are their numbers in these, length_of i32 [n] the characters of
    its turns, guided bool [n] whether a phrase has a box, a point or a mask, masked bool [n]
    whether one has a mask of its own, absent bool [n] whether one is of something absent.

    Left out: problems (with ``on_error="skip"``), excluded (how many are about an image of an
    exclusion list), text_only (how many are about no image).

    Threads may ask at the same time, forked and spawned processes too.
    """

    def __init__(
        self,
        root: Path,
        index: Index,
        source: "Source | Sequence[Record] | _Some",
        problems: Iterable[Problem] = (),
        excluded: int = 0,
        text_only: int = 0,
    ) -> None:
        self.root, self._source = root, source
        self.images: Sequence[Path] = Paths(index.images)
        self.kinds = list(index.kinds)
        self.image_of = np.frombuffer(index.image_of, np.int32)
        self.kind_of = np.frombuffer(index.kind_of, np.int16)
        self.length_of = np.frombuffer(index.length_of, np.int32)
        self.guided = np.frombuffer(index.guided, np.bool_)
        self.masked = np.frombuffer(index.masked, np.bool_)
        self.absent = np.frombuffer(index.absent, np.bool_)
        self.problems, self.excluded, self.text_only = list(problems), excluded, text_only
        self._by_image = np.argsort(self.image_of, kind="stable").astype(np.int32)
        counts = np.bincount(self.image_of, minlength=len(self.images))
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.image_of)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        n = operator.index(i)
        if not -len(self) <= n < len(self):
            raise IndexError(f"record {n} of {len(self)}")
        n %= len(self)
        if not isinstance(self._source, Source):
            return self._source[n]
        return self._source.record(n, self.images[self.image_of[n]], int(self.length_of[n]))

    def of_image(self, image: int) -> np.ndarray:
        """The numbers of the records about one image, ascending i32."""
        return self._by_image[self._first[image] : self._first[image + 1]]

    def first_images(self, n: int) -> "Records":
        """The records about the first `n` images alone, read from where these are read.

        Problems, and what else was left out, are those of all.
        """
        numbers = np.flatnonzero(self.image_of < n)
        kinds, kind_of = np.unique(self.kind_of[numbers], return_inverse=True)
        index = Index()
        index.images = {str(image): at for at, image in enumerate(self.images[:n])}
        index.kinds = {self.kinds[kind]: at for at, kind in enumerate(kinds)}
        index.image_of = array("i", self.image_of[numbers].tobytes())
        index.kind_of = array("h", kind_of.astype(np.int16).tobytes())
        index.length_of = array("i", self.length_of[numbers].tobytes())
        index.guided = bytearray(self.guided[numbers].tobytes())
        index.masked = bytearray(self.masked[numbers].tobytes())
        index.absent = bytearray(self.absent[numbers].tobytes())
        left_out = (self.problems, self.excluded, self.text_only)
        return Records(self.root, index, _Some(self, numbers), *left_out)

    def notes(self) -> list[str]:
        """What was left out, in a sentence each for whoever reads along."""
        said = (
            (len(self.problems), "could not be used and are left out"),
            (self.excluded, "are left out, their images are on an exclusion list"),
            (self.text_only, "are left out, they have no image"),
        )
        total = len(self) + sum(n for n, _ in said)
        return [f"{self.root}: {n} of {total} records {what}" for n, what in said if n]

    def close(self) -> None:
        """Close the file that records are read from; asking for one is an error afterwards."""
        if isinstance(self._source, Source):
            self._source.stored.close()
        elif isinstance(self._source, _Some):
            self._source.records.close()

    @classmethod
    def from_list(cls, records: Iterable[Record], root: Path | None = None) -> "Records":
        """Records that are in memory already; nothing is checked.

        root: by default the folder of `images/` when all pictures lie in one, else their parent.
        """
        held, index = list(records), Index()
        for record in held:
            index.add(record, str(record.image))
        return cls(root or _common_root(Paths(index.images)), index, held)


class _Some:
    """Some of the records, by their numbers there."""

    def __init__(self, records: Records, numbers: np.ndarray) -> None:
        self.records, self.numbers = records, numbers

    def __getitem__(self, i: int) -> Record:
        return self.records[int(self.numbers[i])]


def _common_root(images: Sequence[Path]) -> Path:
    parents = {image.parent for image in images}
    if len(parents) > 1:
        return Path(os.path.commonpath(parents))
    parent = parents.pop() if parents else Path()
    return parent.parent if parent.name == "images" else parent


def read_records(
    path: Path, *, on_error: OnError = "stop", exclude: Excluded | None = None
) -> Records:
    """The records of a file or folder, whatever its format.

    Files: .jsonl, .json with an array (ours or LLaVA's), and what `formats.FORMATS` knows. A
    folder holds ``llava.json`` (as ``agevlm scenes`` writes it), one .jsonl file, another format,
    or one .json file with an array. Images are looked for beside the file, then in ``images/``.

    on_error: "stop" raises what is wrong with the first bad record, "skip" leaves bad records out
    and lists them in ``problems``. exclude: images whose records are left out and counted.

    Raises: ``UserError`` naming file and line (or record), also when no record is left.
    """
    found = _find_format(path)
    if isinstance(found, Format):
        scan = _spooled(path, found, on_error, exclude)
    else:
        scan = _scanned(found, on_error, exclude)
    scan.check()
    return Records(scan.root, scan.index, scan.source, scan.problems, scan.excluded, scan.text_only)


def _find_format(path: Path) -> Path | Format:
    """The file of records that a path is or holds, or the format of what it is."""
    lines = sorted(p for p in path.glob("*.jsonl") if p.name not in _OTHERS)
    if (path / "llava.json").is_file():
        return path / "llava.json"
    if len(lines) == 1 or (path.suffix == ".jsonl" and path.is_file()):
        return lines[0] if lines else path
    for known in FORMATS:
        if known.matches(path):
            return known
    needs = ", ".join(known.needs for known in FORMATS)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected .json, .jsonl or a data folder")
    if not path.is_dir():
        if path.suffix == ".json" and path.is_file():
            return path
        got = path.suffix or "no suffix"
        raise UserError(f"{path}: expected a .json or .jsonl file, got {got}; also read: {needs}")
    if lines:
        raise UserError(f"{path}: holds {len(lines)} .jsonl files; pass the path of one of them")
    arrays = [p for p in sorted(path.glob("*.json")) if _is_array(p)]
    if len(arrays) == 1:
        return arrays[0]
    raise UserError(f"{path}: expected llava.json, one .jsonl file, {needs}, or one .json array")


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _scanned(path: Path, on_error: OnError, exclude: Excluded | None) -> Scan:
    """A file of records, which stays where it is."""
    lines = path.suffix == ".jsonl"
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        source = Source(Stored(file, path), f"{path}:" if lines else f"{path}: record ", own=False)
        scan = Scan(path, source, path.parent, on_error, exclude)
        for item in (scan_lines if lines else scan_array)(file, path):
            scan.add(item, source.where(item.number))
    return scan


def _spooled(path: Path, known: Format, on_error: OnError, exclude: Excluded | None) -> Scan:
    """Another format, written as our own JSON lines into a temporary file."""
    with tempfile.TemporaryFile() as spool:
        source = Source(Stored(spool, None), f"{path}: record ", own=True)
        scan = Scan(path, source, known.root(path), on_error, exclude)
        offset = 0
        for number, one in enumerate(known.read(path), 1):
            if isinstance(one, Problem):
                scan.add(Item(0, 0, number, one), one.where)
                continue
            if isinstance(one, TextOnly):
                scan.text_only += 1
                continue
            line = to_json(one)
            spool.write(line.encode())
            scan.add(Item(offset, len(line), number, json.loads(line)), f"{path}: record {one.id}")
            offset += len(line)
    return scan


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write ``bad_records.jsonl``: one JSON object a line, the file whole or not at all."""
    atomic.write_text(path, "".join(json.dumps(vars(p)) + "\n" for p in problems))


def read_problems(path: Path) -> list[Problem]:
    """What `write_problems` wrote. ``UserError`` if it is something else."""
    try:
        return [Problem(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: expected a list of bad records: {error}; remove it") from None
