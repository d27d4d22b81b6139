"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al., 2016; Mao et al., 2016): phrases for one object each.

As the authors publish them (https://github.com/lichengunc/refer), one dataset or all of them, with
the pictures of COCO train2014 anywhere that `_PICTURES` names::

    refcoco/refs(unc).p  refcoco/instances.json  images/mscoco/images/train2014/

The split of training is read, so the phrases of `agevlm evaluate refcoco` stay unseen. Where a
folder has several splittings, that of umd, unc or google in this order.

A phrase becomes a record of kind "refer", which asks what the benchmark asks: "Where is the man in
blue?", with the object's box and mask for the words of the phrase. The answer says where the
middle of the box is in the picture, in thirds: "On the left.", "At the top right.". (A question
whether the thing is there would be answered with yes each time, and teach that.)
"""

import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .coco_entries import LISTS, Ids, as_object, need, size_in, text_in
from .json_stream import JsonTables, Places
from .outlines import Box, check_outline, instance_box, union
from .pickled import read_pickle
from .records import Phrase, Problem, Record, Turn, inside
from .tables import damage

#: Who made a splitting of refs(...).p, the best first: only umd's keeps RefCOCOg's pictures apart.
MAKERS = ("umd", "unc", "google")
#: What is asked about a phrase without its article.
PROMPT = "Where is the {phrase}?"
#: Where the pictures may be, below the folder.
_PICTURES = (
    "images/mscoco/images/train2014",
    "images/train2014",
    "mscoco/train2014",
    "coco/train2014",
    "train2014",
    "images",
)


def bare(said: str) -> str:
    """A phrase in a question's words: without the article, which the question has, and its end."""
    words = " ".join(said.split()).strip(" .,;:!?")
    return re.sub(r"^(?:the|an?)\s+", "", words, flags=re.IGNORECASE)


def _refs(path: Path) -> list[Path]:
    """The tables of phrases of a file or folder, one of each dataset."""
    if path.is_file():
        return [path] if path.name in {f"refs({maker}).p" for maker in MAKERS} else []
    best: dict[Path, Path] = {}
    for maker in MAKERS:
        for below in ("", "*/", "data/*/"):
            for found in sorted(path.glob(f"{below}refs({maker}).p")):
                best.setdefault(found.parent, found)
    return sorted(best.values())


def is_refcoco(path: Path) -> bool:
    """Whether a file or folder has phrases of RefCOCO/+/g."""
    return bool(_refs(path))


def refcoco_root(path: Path) -> Path:
    """The folder that has the pictures, the one given or the one above it."""
    return _pictures(path)[0]


def _pictures(path: Path) -> tuple[Path, Path]:
    """(root, the folder of the pictures below it)."""
    folder = path if path.is_dir() else path.parent
    for root in (folder, folder.parent):
        for below in (f"{at}{name}" for at in ("", "data/") for name in _PICTURES):
            if (root / below).is_dir():
                return root, root / below
    return folder, folder


def read_refcoco(path: Path) -> Iterator[Record | Problem]:
    """The training phrases of all datasets of a folder, or of one refs(...).p.

    Of several datasets none trains on the pictures that another one validates or tests with.

    Raises: ``UserError`` for files that are not RefCOCO's.
    """
    _, images = _pictures(path)
    found = _refs(path)
    unseen = {refs: set(_unseen(refs)) for refs in found} if len(found) > 1 else {}
    for refs in found:
        others = (pictures for other, pictures in unseen.items() if other != refs)
        yield from _read(refs, images, set().union(*others))


def _unseen(path: Path) -> Iterator[int]:
    """The ids of the pictures of a dataset's other splits than training's."""
    refs = read_pickle(path)
    for ref in refs if isinstance(refs, list) else []:
        held_out = isinstance(ref, dict) and ref.get("split") != "train"
        if held_out and type(ref.get("image_id")) is int:
            yield ref["image_id"]


def _read(path: Path, images: Path, unseen: Container[int]) -> Iterator[Record | Problem]:
    refs = read_pickle(path)
    if not isinstance(refs, list):
        raise UserError(f"{path}: expected a pickle of a list, got {type(refs).__name__}")
    train: list[tuple[int, Mapping[str, Any]]] = []
    splits: set[str] = set()
    for number, ref in enumerate(refs, 1):
        where = f"{path}: entry {number}"
        fields = {"ann_id": int, "image_id": int, "split": str, "sentences": list}
        if not isinstance(ref, dict) or any(type(ref.get(k)) is not t for k, t in fields.items()):
            yield Problem(where, f"expected {', '.join(fields)}, got {ref!r:.60}")
            continue
        splits.add(ref["split"])
        if ref["split"] == "train" and ref["image_id"] not in unseen:
            train.append((number, ref))
    if not train and refs:
        found = ", ".join(sorted(splits)) or "no split"
        raise UserError(f"{path}: expected phrases of the split 'train', got {found}")
    with JsonTables(path.with_name("instances.json")) as tables:
        objects = _Objects(tables, {ref["ann_id"] for _, ref in train})
        yield from objects.read()
        for number, ref in train:
            yield from _of_object(f"{path}: entry {number}", ref, objects, images)


class _Objects:
    """A table of instances, of which those `wanted` by their id are remembered.

    pictures: (file name, (h, w)) by id.
    """

    def __init__(self, tables: JsonTables, wanted: set[int]) -> None:
        self.tables, self.wanted = tables, wanted
        self.pictures: dict[int, tuple[str, tuple[int, int]]] = {}
        self.places, self.ids = Places(tables), Ids()

    def read(self) -> Iterator[Problem]:
        """Look through the file. ``UserError`` if it is no table of instances."""
        found: set[str] = set()
        for key, item in self.tables.entries():
            found.add(key)
            if key not in ("images", "annotations"):
                continue
            where = f"{self.tables.path}: {LISTS[key]} {item.number}"
            try:
                entry = as_object(item.value, where)
                identity = entry.get("id")
                if key == "images":
                    Ids().number(identity, where)
                    self.pictures[entry["id"]] = (
                        text_in(entry, "file_name", where),
                        size_in(entry, where),
                    )
                elif type(identity) is int and identity in self.wanted:
                    self.places.add(item, self.ids.number(identity, where))
            except UserError as error:
                yield Problem.of(error, where)
        need(self.tables.path, found, "images", "annotations")

    def region(
        self, identity: int, size: tuple[int, int]
    ) -> tuple[Box, dict[str, Any] | None] | None:
        """(box, RLE or None) of an instance, None if the table lacks it."""
        group = self.ids.numbers.get(identity, -1)
        for number, _, entry in self.places.of(group):
            where = f"{self.tables.path}: annotation {number}"
            box = instance_box(entry, size, where)
            if box is None:
                raise UserError(f"{where}: expected a bbox with an area, got {entry['bbox']!r}")
            check_outline(entry.get("segmentation"), size, where)
            return box, union([(box, entry, where)], size)
        return None


def _of_object(
    where: str, ref: Mapping[str, Any], objects: _Objects, images: Path
) -> Iterator[Record | Problem]:
    """The records of an object's phrases."""
    table = objects.tables.path.name
    if ref["image_id"] not in objects.pictures:
        yield Problem(where, f"its picture {ref['image_id']} is not in {table}")
        return
    name, size = objects.pictures[ref["image_id"]]
    try:
        image = inside(images, name, where)
        region = objects.region(ref["ann_id"], size)
    except UserError as error:
        yield Problem(where, str(error).removeprefix(f"{where}: "))
        return
    if region is None:
        yield Problem(where, f"its annotation {ref['ann_id']} is not in {table}")
        return
    (box, mask), home = region, objects.tables.path.parent.name
    for number, sentence in enumerate(ref["sentences"], 1):
        identity = f"{home}-{ref.get('ref_id', ref['ann_id'])}-{number}"
        said = sentence.get("sent") if isinstance(sentence, dict) else sentence
        words = bare(said) if isinstance(said, str) and not damage(said) else ""
        if not words:
            yield Problem(where, f"expected a phrase, got {said!r:.60}", identity)
            continue
        asked, start = PROMPT.replace("{phrase}", words), PROMPT.index("{")
        turns = (Turn("user", asked), Turn("assistant", place(box, size)))
        phrase = Phrase(words, 0, start, start + len(words), box, None, mask)
        yield Record(identity, image, turns, (phrase,), "refer")


def place(box: Box, size: tuple[int, int]) -> str:
    """Where the middle of a box is in a picture of `size` (h, w), as an answer."""
    across = (box[0] + box[2]) / 2 / size[1]
    down = (box[1] + box[3]) / 2 / size[0]
    row = "top" if down < 1 / 3 else "bottom" if down > 2 / 3 else ""
    column = "left" if across < 1 / 3 else "right" if across > 2 / 3 else ""
    if row:
        return f"At the {row} {column}".rstrip() + "."
    return f"On the {column}." if column else "In the middle."
