"""Image-text records and the files they come from.

Our JSONL, one record a line (``phrases`` and ``kind`` are optional)::

    {"id": "1", "image": "images/1.png", "kind": "chat",
     "conversations": [{"role": "user", "content": "Is there a dog?"},
                       {"role": "assistant", "content": "Yes"}],
     "phrases": [{"text": "dog", "turn": 0, "start": 11, "end": 14, "box": [9, 8, 60, 50]}]}

LLaVA's JSON (``from``/``value``, ``<image>`` tags) is read the same way, and COCO captions with
instances. Image paths are relative to the file's folder and may not leave it.
"""

import gc
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from ..config import read_json
from ..errors import UserError
from ..sam.targets import rle_decode, rle_encode

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
#: What a picture's caption answers, where the file holds captions only.
CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Phrase:
    """Words of a turn and where they are in the picture, in its own pixels.

    start, end: character span in the turn's text. box: x0 y0 x1 y1. mask: COCO RLE.
    """

    text: str
    turn: int
    start: int
    end: int
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    mask: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation about one image."""

    id: str
    image: Path
    turns: tuple[Turn, ...]
    phrases: tuple[Phrase, ...] = ()
    kind: str = "chat"


def read_records(path: Path) -> list[Record]:
    """The records of a file (.json, .jsonl) or of a folder that holds one.

    A folder may hold ``llava.json`` (as ``agevlm scenes`` writes it), one .jsonl file, or
    ``captions.json`` with ``instances.json`` (COCO). ``UserError`` names the file and line of
    what is wrong.
    """
    with _no_collection():
        return _read_folder(path) if path.is_dir() else _read_file(path)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which makes a hundred thousand small objects 3 times slower."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_file(path: Path) -> list[Record]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected .json, .jsonl or a data folder")
    root = path.parent
    if path.suffix == ".jsonl":
        records = [_record(item, root, where) for where, item in _lines(path)]
    elif path.suffix == ".json":
        items = read_json(path)
        if not isinstance(items, list):
            raise UserError(f"{path}: expected a JSON array of records, got {type(items).__name__}")
        records = [_record(item, root, f"{path}: record {i}") for i, item in enumerate(items, 1)]
    else:
        raise UserError(
            f"{path}: expected a .json or .jsonl file, got {path.suffix or 'no suffix'}"
        )
    return _with_images(records, path)


def _read_folder(path: Path) -> list[Record]:
    if (path / "llava.json").is_file():
        return _read_file(path / "llava.json")
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return _read_file(found[0])
    if (path / "captions.json").is_file() and (path / "instances.json").is_file():
        return read_coco(path / "captions.json", path / "instances.json", path / "images")
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} .jsonl files; pass the path of one of them")
    raise UserError(
        f"{path}: expected llava.json, one .jsonl file, or captions.json with instances.json in it"
    )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: malformed JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text: {error.reason}") from None


def _record(item: Any, root: Path, where: str) -> Record:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, got {type(item).__name__}")
    identity = str(item.get("id", where))
    image, messages = item.get("image"), item.get("conversations")
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: expected the path of an image in 'image', got {image!r}")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of messages in 'conversations'")
    turns = tuple(_turn(m, where) for m in messages)
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(f"{where}: the conversation has no answer to learn from")
    listed = item.get("phrases", [])
    if not isinstance(listed, list):
        raise UserError(f"{where}: expected a list in 'phrases', got {type(listed).__name__}")
    phrases = tuple(_phrase(p, turns, where) for p in listed)
    return Record(
        identity, _inside(root, image, where), turns, phrases, str(item.get("kind", "chat"))
    )


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object for each message, got {message!r}")
    role = ROLES.get(str(message.get("role", message.get("from"))))
    text = message.get("content", message.get("value"))
    if role is None:
        got = message.get("role", message.get("from"))
        raise UserError(f"{where}: expected a message from {' or '.join(ROLES)}, got {got!r}")
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text in a message, got {text!r}")
    text = re.sub(r"\s*<image>\s*", "", text) if "<image>" in text else text
    if not text.strip():
        raise UserError(f"{where}: a message of the {role} is empty")
    return Turn(role, text)  # pyright: ignore[reportArgumentType]


def _phrase(item: Any, turns: Sequence[Turn], where: str) -> Phrase:
    try:
        turn, start, end = int(item["turn"]), int(item["start"]), int(item["end"])
        text = str(item["text"])
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"{where}: expected text, turn, start and end in a phrase, got {item!r}"
        ) from None
    if not 0 <= turn < len(turns) or turns[turn].text[start:end] != text or not 0 <= start < end:
        raise UserError(
            f"{where}: the phrase {text!r} is not at characters {start}..{end} of turn {turn}"
        )
    box, point = _numbers(item, "box", 4, where), _numbers(item, "point", 2, where)
    if box and (box[2] <= box[0] or box[3] <= box[1] or min(box) < 0):
        raise UserError(
            f"{where}: expected a box x0 y0 x1 y1 with x0 < x1, y0 < y1, got {list(box)}"
        )
    return Phrase(text, turn, start, end, box, point, item.get("mask"))  # pyright: ignore[reportArgumentType]


def _numbers(item: Mapping[str, Any], key: str, n: int, where: str) -> tuple[float, ...] | None:
    value = item.get(key)
    if value is None:
        return None
    good = isinstance(value, list) and len(value) == n
    if not good or not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
        raise UserError(f"{where}: expected {n} numbers in '{key}', got {value!r}")
    return tuple(value)


def _inside(root: Path, image: str, where: str) -> Path:
    path = _joined(root, image)
    if path is None:
        raise UserError(f"{where}: expected an image inside {root}, got {image!r}")
    return path


@lru_cache(maxsize=16)  # the records of an image stand together
def _joined(root: Path, image: str) -> Path | None:
    path = Path(image)
    return None if ".." in path.parts and not path.is_absolute() else root / path


def _with_images(records: list[Record], source: Path) -> list[Record]:
    """`records`, if their images exist."""
    missing = [i for i in dict.fromkeys(r.image for r in records) if not i.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: image not found: {missing[0]}{more}")
    return records


def read_coco(captions: Path, instances: Path, images: Path) -> list[Record]:
    """COCO captions, their words tied to the instances of the category they name.

    A category is found in a caption as a whole word, also with a plural s; its phrase covers
    all instances of it in the picture.
    """
    try:
        tables = read_json(instances)
        names = {c["id"]: str(c["name"]) for c in tables["categories"]}
        sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in tables["images"]}
        objects: dict[Any, dict[str, list[dict]]] = {}
        for item in tables["annotations"]:
            own = objects.setdefault(item["image_id"], {})
            own.setdefault(names[item["category_id"]], []).append(item)
        texts = read_json(captions)
        files = {i["id"]: str(i["file_name"]) for i in texts["images"]}
        records = []
        for item in texts["annotations"]:
            key, text = item["image_id"], str(item["caption"])
            phrases = tuple(_found(text, objects.get(key, {}), sizes.get(key)))
            turns = (Turn("user", CAPTION_PROMPT), Turn("assistant", text))
            image = _inside(images, files[key], f"{captions}: image {key}")
            records.append(Record(str(item["id"]), image, turns, phrases, "caption"))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{captions}, {instances}: not COCO tables that fit: {error!r}") from None
    return _with_images(records, captions)


def _found(
    text: str, objects: Mapping[str, list[dict]], size: tuple[int, int] | None
) -> Iterator[Phrase]:
    spans = []
    for name, items in objects.items():
        match = re.search(rf"\b{re.escape(name)}(?=s?\b)", text, re.IGNORECASE)
        if match and size:
            spans.append((match.start(), match.end(), items))
    for start, end, items in sorted(spans, key=lambda s: s[:2]):
        mask = np.any([_mask(item["segmentation"], size or (0, 0)) for item in items], axis=0)
        corners = np.array([item["bbox"] for item in items], float)
        corners[:, 2:] += corners[:, :2]
        low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
        box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        yield Phrase(text[start:end], 1, start, end, box, None, rle_encode(mask))


def _mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """bool [h w] of a COCO segmentation: RLE, or polygons of x y x y ... ."""
    if isinstance(segmentation, dict):
        return rle_decode(segmentation)
    canvas = Image.new("1", (size[1], size[0]))
    for polygon in segmentation:
        ImageDraw.Draw(canvas).polygon([float(v) for v in polygon], fill=1)
    return np.asarray(canvas)
