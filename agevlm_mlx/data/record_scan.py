"""One pass over the records of a file: what is kept in memory of each, and what is wrong."""

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ..errors import UserError
from .exclude import Excluded
from .image_files import image_exists
from .record_lines import Item, parse
from .records import Problem, Record, image_name, image_names, inside, parse_record
from .stored import Stored

OnError = Literal["stop", "skip"]
_KINDS = 1 << 15  # their numbers are i16
_EXCLUDED, _MISSING = -1, -2
#: How the problem of a record begins whose image is not there; the image's path follows.
NOT_FOUND = "image not found: "


class NoRecords(UserError):
    """Not one record can be used; what was left out is counted as in `record_set.Records`."""

    def __init__(
        self, message: str, problems: list[Problem], excluded: int, text_only: int
    ) -> None:
        super().__init__(message)
        self.problems, self.excluded, self.text_only = problems, excluded, text_only


class Index:
    """What is kept in memory of each record, while records come in; see `Records`."""

    def __init__(self) -> None:
        self.images: dict[str, int] = {}
        self.kinds: dict[str, int] = {}
        self.image_of, self.kind_of, self.length_of = array("i"), array("h"), array("i")
        self.guided, self.masked, self.absent = bytearray(), bytearray(), bytearray()

    def add(self, record: Record, image: str) -> None:
        """Append a record about the image at the path `image`."""
        if record.kind not in self.kinds and len(self.kinds) == _KINDS:
            raise UserError(f"expected at most {_KINDS} kinds of records, got one more")
        self.kind_of.append(self.kinds.setdefault(record.kind, len(self.kinds)))
        self.image_of.append(self.images.setdefault(image, len(self.images)))
        self.length_of.append(characters(record))
        self.masked.append(any(p.mask is not None for p in record.phrases))
        self.guided.append(any(p.placed for p in record.phrases))
        self.absent.append(any(p.absent for p in record.phrases))


def characters(record: Record) -> int:
    """Those of all its turns."""
    return sum([len(turn.text) for turn in record.turns])


class Source:
    """Records in a file, parsed anew from their bytes whenever one is asked for.

    place: how errors name a record, before its number. own: the file is one that `to_json` wrote,
    so paths and texts are right as they are.
    """

    def __init__(self, stored: Stored, place: str, own: bool) -> None:
        self.stored, self.place, self.own = stored, place, own

    def where(self, number: int) -> str:
        """The place of the record of that number, as errors name it."""
        return f"{self.place}{number}"

    def record(self, i: int, image: Path, length: int) -> Record:
        """The record that was added as number `i`, about `image` and of `length` characters."""
        where = self.where(self.stored.number(i))
        try:
            record = parse_record(parse(self.stored.read(i), where), image, where, exact=self.own)
        except (UserError, AttributeError):  # AttributeError: the item is no object any more
            record = None
        if record is None or characters(record) != length:
            raise UserError(f"{where}: the file changed since it was read; start again")
        return record


class Scan:
    """Takes the items of a source one by one: an index of the good ones, the problems of others.

    path: what errors about the whole of it name. root: the folder that images lie in.
    """

    def __init__(
        self, path: Path, source: Source, root: Path, on_error: OnError, exclude: Excluded | None
    ) -> None:
        self.path, self.source, self.root = path, source, root
        self.on_error, self.exclude = on_error, exclude
        self.index = Index()
        self.problems: list[Problem] = []
        self.excluded = self.text_only = 0
        beside = root / "images"
        self._beside = beside if beside.is_dir() and not source.own else None
        self._found: dict[str, str | int] = {}

    def add(self, item: Item, where: str) -> None:
        """Index an item or put it aside. ``UserError`` for a bad one that must stop us."""
        problem = item.value if isinstance(item.value, Problem) else self._take(item, where)
        if problem is not None and self.on_error == "stop":
            raise problem.error()
        if problem is not None:
            self.problems.append(problem)

    def _take(self, item: Item, where: str) -> Problem | None:
        try:
            name = image_name(item.value, where)
            if name is None:
                self.text_only += 1
                return None
            image = self._found.get(name)
            if image is None:
                image = self._found[name] = self._find(name, where)
            if image == _EXCLUDED or self._listed(image_names(item.value)):
                self.excluded += 1
                return None
            # The record itself is not kept, so it needs no path of its own.
            record = parse_record(item.value, self.root, where, exact=self.source.own)
            if isinstance(image, str):
                self.index.add(record, image)
                self.source.stored.add(item.offset, item.length, item.number)
            elif self.on_error == "skip":  # else all of them are counted first
                raise UserError(f"{where}: {NOT_FOUND}{self.root / name}")
        except UserError as error:
            known = item.value.get("id") if isinstance(item.value, dict) else None
            return Problem.of(error, where, None if known is None else str(known))
        return None

    def _listed(self, names: Iterable[str]) -> bool:
        """Whether one of the further names of an image is on an exclusion list."""
        return self.exclude is not None and any(Path(name) in self.exclude for name in names)

    def _find(self, name: str, where: str) -> str | int:
        """The path of an image: in the folder, or in its `images/`."""
        path = Path(name) if self.source.own else inside(self.root, name, where)
        if self.exclude is not None and path in self.exclude:
            return _EXCLUDED
        try:
            if image_exists(path):
                return str(path)
            if self._beside is not None:
                path = inside(self._beside, name, where)
                return str(path) if image_exists(path) else _MISSING
            return _MISSING
        except OSError as error:
            raise UserError(f"{where}: {path}: {error.strerror}") from None

    def check(self) -> None:
        """``UserError`` if images are missing, or if there is no record left."""
        missing = [name for name, image in self._found.items() if image == _MISSING]
        if missing and self.on_error == "stop":
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.path}: {NOT_FOUND}{self.root / missing[0]}{more}")
        if not len(self.source.stored):
            why = f"{self.path}: expected at least one record, {self._why_none()}"
            raise NoRecords(why, self.problems, self.excluded, self.text_only)

    def _why_none(self) -> str:
        if self.problems:
            first = self.problems[0]
            return f"got {len(self.problems)} bad, the first {first.where}: {first.problem}"
        if self.excluded:
            return f"got {self.excluded}, all about images of an exclusion list"
        return f"got {self.text_only} without 'image'" if self.text_only else "got none"
