"""Flickr30k Entities (Plummer et al., 2015): captions whose phrases have boxes.

As the authors publish it (https://github.com/BryanPlummer/flickr30k_entities), with the pictures in
a folder of `_PICTURES` below it or beside it::

    Sentences/1000092795.txt  Annotations/1000092795.xml  train.txt  flickr30k-images/

The pictures listed in train.txt are read; those of another list by its path (DIR/val.txt).

A caption becomes a record of kind "caption". Its phrases keep their box; one with several boxes
("three men") has the box around them, and a mask, which is the boxes themselves. A phrase without a
box (a scene, nothing to be seen) guides nothing.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..errors import UserError
from ..sam.targets import MAX_PIXELS
from .outlines import Box, boxes_mask, hull
from .records import CAPTION_PROMPT, Phrase, Problem, Record, Turn
from .tables import damage

_PICTURES = ("flickr30k-images", "flickr30k_images", "images", "Images")
_LISTS = ("train.txt", "val.txt", "test.txt")
#: Bytes of one picture's sentences or annotations; Flickr30k's own are a few thousand.
_LONGEST = 1 << 20
#: [/EN#283585/people An older man]: the number of a thing, its kinds, the words for it.
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s\]/]+)*) ([^\[\]]+)\]")
#: Sentences are split at spaces into words and signs: these stand without the space before them.
_CLOSING = re.compile(r"(?:[.,;:!?%)\]]+|'|'s|'S|n't|'re|'ve|'ll|'d|'m)$")


def is_flickr30k(path: Path) -> bool:
    """Whether a folder is Flickr30k Entities', or a file one of its lists of pictures."""
    if path.is_file() and path.name not in _LISTS:
        return False
    folder = path if path.is_dir() else path.parent
    return (folder / "Sentences").is_dir() and (folder / "Annotations").is_dir()


def flickr30k_root(path: Path) -> Path:
    """The folder that has the pictures, the one given or the one above it."""
    return _pictures(path)[0]


def _pictures(path: Path) -> tuple[Path, Path]:
    folder = path if path.is_dir() else path.parent
    for root in (folder, folder.parent):
        for name in _PICTURES:
            if (root / name).is_dir():
                return root, root / name
    return folder, folder


def read_flickr30k(path: Path) -> Iterator[Record | Problem]:
    """The captions of the pictures of training, or of those that the list at `path` names."""
    folder = path if path.is_dir() else path.parent
    listed = path if path.is_file() else folder / "train.txt"
    if listed.is_file():
        names: Sequence[tuple[str, str]] = list(_listed(listed))
    else:
        names = [(str(p), p.stem) for p in sorted((folder / "Sentences").glob("*.txt"))]
    _, images = _pictures(path)
    for where, name in names:
        if re.fullmatch(r"[\w-]{1,100}", name):
            yield from _of_picture(folder, images, name)
        else:
            yield Problem(where, f"expected the number of a picture, got {name!r:.60}")


def _listed(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", line.strip().removesuffix(".jpg")


def _of_picture(folder: Path, images: Path, name: str) -> Iterator[Record | Problem]:
    """The records of a picture's sentences."""
    sentences, annotations = folder / f"Sentences/{name}.txt", folder / f"Annotations/{name}.xml"
    try:
        lines = _text(sentences).splitlines()
    except UserError as error:
        yield Problem.of(error, str(sentences))
        return
    size, boxes = (1, 1), dict[str, list[Box]]()
    try:
        size, found = _things(annotations)
        for names, box in found:
            if isinstance(box, UserError):
                yield Problem.of(box, str(annotations))
                continue
            for thing in names:
                boxes.setdefault(thing, []).append(box)
    except UserError as error:
        yield Problem.of(error, str(annotations))
    # Masks are made once a picture: its five captions speak of the same things.
    masks = {key: boxes_mask(own, size) for key, own in boxes.items() if len(own) > 1}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, identity = f"{sentences}:{number}", f"{name}-{number}"
        try:
            text, found = sentence(line, where)
        except UserError as error:
            yield Problem.of(error, where, identity)
            continue
        phrases = tuple(
            Phrase(text[start:end], 1, start, end, hull(boxes[key]), None, masks.get(key))
            for key, start, end in found
            if key in boxes
        )
        turns = (Turn("user", CAPTION_PROMPT), Turn("assistant", text))
        yield Record(identity, images / f"{name}.jpg", turns, phrases, "caption")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _LONGEST:
        raise UserError(f"{path}: expected at most {_LONGEST} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text: {error.reason}") from None


def sentence(line: str, where: str) -> tuple[str, list[tuple[str, int, int]]]:
    """A sentence as people write it, and (number of the thing, start, end) of its phrases.

    Raises: ``UserError``, beginning with `where`, for brackets that are no phrase.
    """
    if problem := damage(line):
        raise UserError(f"{where}: {problem}")
    text, found, at = "", list[tuple[str, int, int]](), 0
    for match in (*_PHRASE.finditer(line), None):
        between = line[at : match.start()] if match else line[at:]
        if "[/" in between or "]" in between:
            raise UserError(f"{where}: expected phrases [/EN#number/kind words], got {line!r:.80}")
        text = _joined(text, between)
        if match is None:
            break
        before, at = text, match.end()
        text = _joined(text, match[3])
        start = len(before) + (len(text) > len(before) and text[len(before)] == " ")
        if text[start:]:
            found.append((match[1], start, len(text)))
    if not text:
        raise UserError(f"{where}: expected a sentence, got {line!r:.80}")
    return text, found


def _joined(text: str, words: str) -> str:
    """The words behind the text, a space before each but signs that close."""
    for word in words.split():
        glued = not text or _CLOSING.match(word) or text.endswith("(")
        text += word if glued else f" {word}"
    return text


class _Tree(ElementTree.TreeBuilder):
    """Refuses what could define entities, which can grow a small file to gigabytes."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type, which no annotation has")


def _things(path: Path) -> tuple[tuple[int, int], list[tuple[list[str], Box | UserError]]]:
    """(h, w) of the picture, and each box, or what is wrong with it, with the things it is of."""
    text = _text(path)
    try:
        root = ElementTree.fromstring(text, ElementTree.XMLParser(target=_Tree()))
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: expected XML as Flickr30k's, got {error}") from None
    width, height = (_number(root, f"size/{side}", path) for side in ("width", "height"))
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise UserError(f"{path}: expected the size of a picture, got {width}x{height}")
    found: list[tuple[list[str], Box | UserError]] = []
    for thing in root.iter("object"):
        names = [(name.text or "").strip() for name in thing.iter("name")]
        for box in thing.iter("bndbox"):
            try:
                if cut := _box(box, (height, width), path):
                    found.append((names, cut))
            except UserError as error:
                found.append((names, error))
    return (height, width), found


def _box(element: Any, size: tuple[int, int], path: Path) -> Box | None:
    """A box cut at the picture, None for one without area."""
    x0, y0, x1, y1 = (_number(element, key, path) for key in ("xmin", "ymin", "xmax", "ymax"))
    if x0 > x1 or y0 > y1 or x0 > size[1] or y0 > size[0] or x1 < 0 or y1 < 0:
        raise UserError(
            f"{path}: expected a box x0 y0 x1 y1 in a picture of {size[1]}x{size[0]}, "
            f"got {[x0, y0, x1, y1]}"
        )
    box = max(x0, 0), max(y0, 0), min(x1, size[1]), min(y1, size[0])
    return box if box[0] < box[2] and box[1] < box[3] else None


def _number(element: Any, path: str, where: Path) -> int:
    text = (element.findtext(path) or "").strip()
    if not re.fullmatch(r"-?\d{1,7}", text):
        raise UserError(f"{where}: expected a whole number in <{path}>, got {text!r:.40}")
    return int(text)
