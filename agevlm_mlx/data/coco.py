"""COCO captions, their words tied to COCO instances: captions_*.json and instances_*.json.

As COCO publishes it (https://cocodataset.org/#download), or as ``agevlm scenes`` writes it::

    annotations/captions_train2017.json  annotations/instances_train2017.json  train2017/
    captions.json  instances.json  images/

Of several splits in a folder that of training is read; another one by the path of its captions.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import coco_nouns
from .coco_entries import LISTS, Ids, as_object, need, size_in, text_in
from .json_stream import JsonTables, Places
from .outlines import Box, check_outline, hull, instance_box, union
from .records import CAPTION_PROMPT, Phrase, Problem, Record, Turn, inside

# --- where a folder has them -------------------------------------------------------------------


def is_coco(path: Path) -> bool:
    """Whether a folder, or a file of captions, is COCO's."""
    return any(_is_object(captions) for captions in _captions(path))


def _captions(path: Path) -> list[Path]:
    """The tables of captions of a folder: that of training, if it has one."""
    if path.is_file():
        return [path] if re.fullmatch(r"captions.*\.json", path.name) else []
    found = [p for at in ("", "annotations") for p in sorted((path / at).glob("captions*.json"))]
    return [p for p in found if "train" in p.name] or found


def _is_object(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    except OSError:
        return False


def coco_files(path: Path) -> tuple[Path, Path | None, Path]:
    """Captions, instances (None if there are none) and the folder of the pictures.

    Raises: ``UserError`` where it has several tables of captions and no one for training.
    """
    found = [p for p in _captions(path) if _is_object(p)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "nothing"
        raise UserError(f"{path}: expected one captions_*.json, got {names}; pass the path of one")
    captions = found[0]
    instances = captions.with_name(captions.name.replace("captions", "instances", 1))
    split = captions.stem.removeprefix("captions").strip("_-")
    home = coco_root(captions)
    folders = [home / split, home / "images" / split, home / "images"]
    images = next((f for f in folders if f.is_dir() and f != home), home)
    return captions, instances if instances.is_file() else None, images


def coco_root(path: Path) -> Path:
    """The folder that has both the tables and the pictures."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "annotations" else folder


def read_coco_folder(path: Path) -> Iterator[Record | Problem]:
    """`read_coco` of the files of a folder, or of a table of captions and what lies beside it."""
    yield from read_coco(*coco_files(path))


# --- records -----------------------------------------------------------------------------------


def read_coco(captions: Path, instances: Path | None, images: Path) -> Iterator[Record | Problem]:
    """A record of kind "caption" for each caption, those of a picture together.

    Words for a category that the picture has (`coco_nouns`: synonyms, plurals, the longest first)
    become phrases; each covers all instances of the category, crowds too. An instance without
    an outline counts with its box; one whose box has no area (COCO has such) not at all.

    Raises: ``UserError`` for files that are no COCO tables.
    """
    with ExitStack() as stack:
        texts = _Texts(stack.enter_context(JsonTables(captions)), images)
        yield from texts.read()
        things = None
        if instances is not None:
            things = Instances(stack.enter_context(JsonTables(instances)))
            yield from things.read()
        for number, image in enumerate(texts.files):
            if image is not None:
                yield from _of_picture(texts, number, image, things)


class _Texts:
    """A table of captions. files: the picture of each number, None for one that is missing."""

    def __init__(self, tables: JsonTables, images: Path) -> None:
        self.tables, self.images = tables, images
        self.places, self.files, self.ids = Places(tables), [], Ids()
        self.key_of: list[Any] = []

    def read(self) -> Iterator[Problem]:
        path = self.tables.path
        files: dict[int, str] = {}
        named: set[int] = set()
        found: set[str] = set()
        for key, item in self.tables.entries():
            found.add(key)
            if key not in ("images", "annotations"):
                continue
            where = f"{path}: {LISTS[key]} {item.number}"
            try:
                entry = as_object(item.value, where)
                if key == "images":
                    number = self.ids.number(entry.get("id"), where)
                    named.add(number)
                    name = text_in(entry, "file_name", where)
                    files[number] = str(inside(self.images, name, where))
                else:
                    self.places.add(item, self.ids.number(entry.get("image_id"), where))
            except UserError as error:
                yield Problem.of(error, where)
        need(path, found, "images", "annotations")
        self.key_of = list(self.ids.numbers)
        self.files = [files.get(number) for number in range(len(self.key_of))]
        for number, key in enumerate(self.key_of):
            if self.files[number] is None and number not in named:
                for at, _, _ in self.places.of(number):
                    where = f"{path}: annotation {at}"
                    yield Problem(where, f"its image {key!r:.40} is not in 'images'")


def _of_picture(
    texts: _Texts, number: int, image: str, things: "Instances | None"
) -> Iterator[Record | Problem]:
    """The records of a picture's captions."""
    said: list[tuple[str, str, list[tuple[str, int, int]]]] = []
    for at, _, entry in texts.places.of(number):
        where = f"{texts.tables.path}: annotation {at}"
        try:
            text = text_in(entry, "caption", where)
        except UserError as error:
            yield Problem.of(error, where, str(entry.get("id", at)))
            continue
        found = things.nouns.find(text) if things else []
        said.append((str(entry.get("id", at)), text, found))
    regions: dict[str, tuple[Box, dict[str, Any] | None]] = {}
    if things and (names := {name for _, _, found in said for name, _, _ in found}):
        for region in things.regions(texts.key_of[number], names):
            if isinstance(region, Problem):
                yield region
            else:
                name, box, mask = region
                regions[name] = box, mask
    for identity, text, found in said:
        phrases = tuple(
            Phrase(text[start:end], 1, start, end, regions[name][0], None, regions[name][1])
            for name, start, end in found
            if name in regions
        )
        turns = (Turn("user", CAPTION_PROMPT), Turn("assistant", text))
        yield Record(identity, Path(image), turns, phrases, "caption")


class Instances:
    """A table of instances, by picture; only where each lies in the file is in memory.

    nouns: finds the words of its categories. sizes: (h, w) of a picture by its id.
    """

    def __init__(self, tables: JsonTables) -> None:
        self.tables = tables
        self.sizes: dict[Any, tuple[int, int]] = {}
        self.nouns = coco_nouns.CocoNouns({})
        self._names: dict[Any, str] = {}
        self._images, self._categories = Ids(), Ids()
        self._places = Places(tables)

    def read(self) -> Iterator[Problem]:
        """Look through the file; what is wrong with an entry is told when it is known.

        Raises: ``UserError`` for a file that is no table of instances.
        """
        path = self.tables.path
        found: set[str] = set()
        categories: list[tuple[int, Any]] = []
        for key, item in self.tables.entries():
            found.add(key)
            if key not in LISTS:
                continue
            where = f"{path}: {LISTS[key]} {item.number}"
            try:
                entry = as_object(item.value, where)
                if key == "images":
                    self._images.number(entry.get("id"), where)
                    self.sizes[entry["id"]] = size_in(entry, where)
                elif key == "annotations":
                    kind = self._categories.number(entry.get("category_id"), where)
                    if kind == len(categories):
                        categories.append((item.number, entry["category_id"]))
                    group = self._images.number(entry.get("image_id"), where)
                    self._places.add(item, group, kind)
                else:
                    Ids().number(entry.get("id"), where)
                    self._names[entry["id"]] = text_in(entry, "name", where)
            except UserError as error:
                yield Problem.of(error, where)
        need(path, found, "images", "annotations", "categories")
        for number, category in categories:
            if category not in self._names:
                where = f"{path}: annotation {number}"
                yield Problem(where, f"its category {category!r:.40} is not in 'categories'")
        self.nouns = coco_nouns.of_classes(self._names.values())

    def regions(
        self, image: Any, names: set[str]
    ) -> Iterator[tuple[str, Box, dict[str, Any] | None] | Problem]:
        """(category, box, RLE or None) of what a picture has of the categories `names`."""
        group = self._images.numbers.get(image)
        size = self.sizes.get(image)
        if group is None or size is None:
            return
        kinds = {
            kind: self._names[key]
            for key, kind in self._categories.numbers.items()
            if self._names.get(key) in names
        }
        own: dict[str, list[tuple[Box, Mapping[str, Any], str]]] = {}
        for number, kind, entry in self._places.of(group, kinds):
            where = f"{self.tables.path}: annotation {number}"
            try:
                if box := instance_box(entry, size, where):
                    check_outline(entry.get("segmentation"), size, where)
                    own.setdefault(kinds[kind], []).append((box, entry, where))
            except UserError as error:
                yield Problem.of(error, where)
        for name, things in own.items():
            yield name, hull([box for box, _, _ in things]), union(things, size)
