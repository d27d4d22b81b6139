"""Image-text records: one conversation about one image, and the JSON it is written in.

Our JSONL, one record a line (``phrases`` and ``kind`` are optional)::

    {"id": "1", "image": "images/1.png", "kind": "chat",
     "conversations": [{"role": "user", "content": "Is there a dog?"},
                       {"role": "assistant", "content": "Yes"}],
     "phrases": [{"text": "dog", "turn": 0, "start": 11, "end": 14, "box": [9, 8, 60, 50]}]}

A phrase about something that is not in the picture may say ``"absent": true`` instead of a place.

LLaVA's records (``from``/``value``, ``<image>`` tags) are read the same way, and ``images`` with
one entry. ``image_names`` lists further names of a picture, for lists of excluded images.
`record_set` reads whole files of records, `formats` lists the other formats.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
#: What a picture's caption answers, where the file holds captions only.
CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Phrase:
    """Words of a turn and where they are in the picture, in its own pixels.

    start, end: character span in the turn's text. box: x0 y0 x1 y1. mask: COCO RLE. absent: it is
    known to be nowhere in the picture.
    """

    text: str
    turn: int
    start: int
    end: int
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    mask: Mapping[str, Any] | None = None
    absent: bool = False

    @property
    def placed(self) -> bool:
        """Whether it says where in the picture it is."""
        return self.box is not None or self.point is not None or self.mask is not None


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
    """A conversation about one image.

    image_names: what the image is called where it comes from, if `image` does not say (it lies in
    a row of a table): an exclusion list may know it by one of these.
    """

    id: str
    image: Path
    turns: tuple[Turn, ...]
    phrases: tuple[Phrase, ...] = ()
    kind: str = "chat"
    image_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextOnly:
    """A conversation about no image: left out and counted."""


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used, one line of ``bad_records.jsonl``.

    where: ``file:line``, ``file: record 3`` or an image's path. problem: what a ``UserError``
    would say after `where`. record: the record's id, if it is known.
    """

    where: str
    problem: str
    record: str | None = None

    @classmethod
    def of(cls, error: UserError, where: str, record: str | None = None) -> "Problem":
        """What `error`, whose message begins with `where`, says."""
        return cls(where, str(error).removeprefix(f"{where}: "), record)

    def error(self) -> UserError:
        """The error that stops whoever does not leave bad records out."""
        return UserError(" ".join(f"{self.where}: {self.problem}".split()))


def image_name(item: Any, where: str) -> str | None:
    """What a record's JSON calls its image; None for a conversation that is about none.

    Raises: ``UserError``, beginning with `where`, where an image is missing.
    """
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, got {type(item).__name__}")
    key = "images" if item.get("image") is None and item.get("images") is not None else "image"
    image = item.get(key)
    if image in (None, "", []) and item.get("conversations"):
        return None
    if isinstance(image, list):
        if len(image) != 1:
            raise UserError(f"{where}: expected one image in {key!r}, got {len(image)}")
        image = image[0]
    if not isinstance(image, str) or not image or "\0" in image:
        raise UserError(f"{where}: expected the path of an image in {key!r}, got {image!r:.60}")
    return image


def image_names(item: Mapping[str, Any]) -> tuple[str, ...]:
    """Further names of a record's image. Another program's field of that name is no error."""
    names = item.get("image_names")
    return tuple(n for n in names if isinstance(n, str)) if isinstance(names, list) else ()


def parse_record(
    item: Mapping[str, Any], image: Path, where: str, *, exact: bool = False
) -> Record:
    """The record of a JSON object, of which `image_name` has found the image.

    exact: texts stay as they are, as is right for what `to_json` wrote; else image tags go.

    Raises: ``UserError``, beginning with `where`, saying what is wrong.
    """
    messages = item.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of messages in 'conversations'")
    turns = tuple(_turn(m, where, exact) for m in messages)
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(f"{where}: the conversation has no answer to learn from")
    roles = [turn.role for turn in turns]
    if "user" not in roles[: roles.index("assistant")]:  # templates refuse it, or rewrite it
        raise UserError(f"{where}: expected a message of the user before the first answer")
    listed = item.get("phrases", [])
    if not isinstance(listed, list):
        raise UserError(f"{where}: expected a list in 'phrases', got {type(listed).__name__}")
    phrases = tuple(_phrase(p, turns, where) for p in listed)
    identity, kind = str(item.get("id", where)), str(item.get("kind", "chat"))
    return Record(identity, image, turns, phrases, kind, image_names(item))


def to_json(record: Record) -> str:
    """One line of our JSONL (without its end) that is read back as the same record.

    The image's path is written as it is. Numbers have to be Python's own.
    """
    item: dict[str, Any] = {
        "id": record.id,
        "image": str(record.image),
        "kind": record.kind,
        "conversations": [{"role": turn.role, "content": turn.text} for turn in record.turns],
    }
    if record.phrases:
        item["phrases"] = [
            {
                key: value
                for key, value in vars(phrase).items()
                if value is not None and value is not False
            }
            for phrase in record.phrases
        ]
    if record.image_names:
        item["image_names"] = list(record.image_names)
    return json.dumps(item)


def _turn(message: Any, where: str, exact: bool) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object for each message, got {message!r}")
    role = ROLES.get(str(message.get("role", message.get("from"))))
    text = message.get("content", message.get("value"))
    if role is None:
        got = message.get("role", message.get("from"))
        raise UserError(f"{where}: expected a message from {' or '.join(ROLES)}, got {got!r}")
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text in a message, got {text!r}")
    if "<image>" in text and not exact:
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
    mask = item.get("mask")
    if mask is not None and not isinstance(mask, dict):
        raise UserError(f"{where}: expected COCO RLE in 'mask', got {type(mask).__name__}")
    absent = item.get("absent")
    if absent is not None and not isinstance(absent, bool):
        raise UserError(f"{where}: expected true or false in 'absent', got {absent!r:.60}")
    phrase = Phrase(text, turn, start, end, box, point, mask, bool(absent))  # pyright: ignore[reportArgumentType]
    if phrase.absent and phrase.placed:
        raise UserError(
            f"{where}: the phrase {text!r} is absent and has a place; drop 'absent' or the place"
        )
    return phrase


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


def _joined(root: Path, image: str) -> Path | None:
    if ".." in image.split("/"):
        return None
    path = root / image
    if not image.startswith("/"):
        return path  # the usual case has to be quick
    return path if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)) else None
