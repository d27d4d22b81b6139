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
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..config import read_json
from ..errors import UserError

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
    """One message of a conversation.

    images: the pictures (`data.image.ImageSource`) that the message brings when a model is asked;
    the text sees them from this turn on. A record of training data has one image instead.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Any, ...] = ()


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
    """Without the garbage collector, with which a hundred thousand records take 3 times longer."""
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
    return with_images(records, path)


def _read_folder(path: Path) -> list[Record]:
    if (path / "llava.json").is_file():
        return _read_file(path / "llava.json")
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return _read_file(found[0])
    if (path / "captions.json").is_file() and (path / "instances.json").is_file():
        from .coco import read_coco  # which builds on this module

        return read_coco(path / "captions.json", path / "instances.json", path / "images")
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} .jsonl files; pass the path of one of them")
    raise UserError(
        f"{path}: expected llava.json, one .jsonl file, or captions.json with instances.json in it"
    )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", str(error))
                    raise UserError(f"{path}:{number}: malformed JSON: {reason}") from None
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
        identity, inside(root, image, where), turns, phrases, str(item.get("kind", "chat"))
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
    if "<image>" in text:
        text = " ".join(part.strip() for part in text.split("<image>") if part.strip())
    if not text.strip():
        raise UserError(f"{where}: a message of the {role} is empty")
    return Turn(role, text)  # pyright: ignore[reportArgumentType]


def _phrase(item: Any, turns: Sequence[Turn], where: str) -> Phrase:
    try:
        turn, start, end = int(item["turn"]), int(item["start"]), int(item["end"])
        text = str(item["text"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise UserError(
            f"{where}: expected text, turn, start and end in a phrase, got {item!r}"
        ) from None
    if not 0 <= turn < len(turns) or turns[turn].text[start:end] != text or not 0 <= start < end:
        raise UserError(
            f"{where}: the phrase {text!r} is not at characters {start}..{end} of turn {turn}"
        )
    if text != text.strip():
        raise UserError(f"{where}: the phrase {text!r} begins or ends with a space; leave it out")
    box, point = numbers(item, "box", 4, where), numbers(item, "point", 2, where)
    if box and (box[2] <= box[0] or box[3] <= box[1] or min(box) < 0):
        raise UserError(
            f"{where}: expected a box x0 y0 x1 y1 with x0 < x1, y0 < y1, got {list(box)}"
        )
    if point and min(point) < 0:
        raise UserError(f"{where}: expected a point x y inside the image, got {list(point)}")
    return Phrase(text, turn, start, end, box, point, item.get("mask"))  # pyright: ignore[reportArgumentType]


def numbers(item: Mapping[str, Any], key: str, n: int, where: str) -> tuple[float, ...] | None:
    """The `n` finite numbers under `key`, None if there are none; `where` begins the error."""
    value = item.get(key)
    if value is None:
        return None
    good = isinstance(value, list) and len(value) == n
    # The limit is far beyond any image, and keeps huge integers away from float arithmetic.
    if not good or not all(type(v) in (int, float) and -1e9 < v < 1e9 for v in value):
        raise UserError(f"{where}: expected {n} numbers in '{key}', got {value!r}")
    return tuple(value)


def inside(root: Path, image: str, where: str) -> Path:
    """The path of an image of the folder `root`; ``UserError`` if it leads out of it."""
    path = _joined(root, image)
    if path is None:
        raise UserError(
            f"{where}: expected an image inside {root}, got {image!r}; move or link it there"
        )
    return path


@lru_cache(maxsize=16)  # the records of an image stand together
def _joined(root: Path, image: str) -> Path | None:
    path = root / image
    inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))
    return path if inside and ".." not in Path(image).parts else None


def with_images(records: list[Record], source: Path) -> list[Record]:
    """`records`, if there are any and their images exist."""
    if not records:
        raise UserError(f"{source}: expected at least one record, got none")
    missing = [i for i in dict.fromkeys(r.image for r in records) if not i.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: image not found: {missing[0]}{more}")
    return records
