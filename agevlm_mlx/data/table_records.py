"""Which columns of a table are what, and the records of its rows.

Known are, in this order, whatever their case:

- ``conversations`` or ``messages``: turns as LLaVA has them (from, value) or as chat templates do
  (role, content; content may be a list of parts, of which the text counts), with our own
  ``phrases`` and ``kind`` where these are columns too;
- ``texts``: turns in pairs (user, assistant), as The Cauldron and FineVision have them;
- ``question`` with ``answer`` or ``answers``: of several answers (VQAv2 has ten) the most frequent;
- ``caption``, ``captions`` or ``text``: one caption or a list of them, each a record.

Lists of turns and of answers may be stored turned around, as ``datasets.Sequence`` has them: one
list for each key. Where a column ``split`` says what a row is for, only those of training are read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .exclude import NAMES, names_in
from .records import CAPTION_PROMPT, Problem, Record, parse_record
from .tables import damage

#: What splits are called in names of files and folders, in whatever case.
_SPLITS = (
    "train",
    "val",
    "valid",
    "validation",
    "dev",
    "eval",
    "evaluation",
    "test",
    "testing",
    "testa",
    "testb",
)
IMAGE = ("image", "images", "img", "picture", "jpg", "png")
_CHAT = ("conversations", "messages", "conversation")
_PAIRS = ("texts",)
_QUESTION, _ANSWER = ("question", "query"), ("answer", "multiple_choice_answer", "answers")
_CAPTION = ("caption", "captions", "text", "sentences")
_EXTRA = ("id", "kind", "phrases")
NEEDS = (
    "a column for the picture (image, images) and one for what is said: conversations or messages, "
    "texts, question and answer, or caption or text"
)


def split_of(name: str) -> str:
    """The split that a word or folder like Test or val2017 stands for, "" for none."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    if letters == "training":
        return "train"
    return letters if letters in _SPLITS else ""


@dataclass(frozen=True)
class Columns:
    """image: the column of the picture. form: which of those above. said: the columns of what is
    said, two of them for questions. extra: our own columns that are there, by their plain name;
    names: those of `exclude.NAMES`, by that. split: the column that says what a row is for."""

    image: str
    form: str
    said: tuple[str, ...]
    extra: Mapping[str, str]
    names: Mapping[str, str]
    split: str | None

    @classmethod
    def of(cls, names: Sequence[str], where: str, image: str = "") -> "Columns":
        """The columns of a table by their names; image: that of the picture, if it is known.

        Raises: ``UserError``, beginning with `where`, if something is lacking.
        """
        known = {str(name).lower(): str(name) for name in reversed(names)}

        def first(wanted: Sequence[str]) -> str | None:
            return next((known[name] for name in wanted if name in known), None)

        picture = first((image,) if image else IMAGE)
        forms = {
            "chat": (first(_CHAT),),
            "pairs": (first(_PAIRS),),
            "question": (first(_QUESTION), first(_ANSWER)),
            "caption": (first(_CAPTION),),
        }
        for form, said in forms.items():
            if picture is not None and all(said):
                extra = {name: known[name] for name in _EXTRA if name in known}
                named = {name: known[name] for name in NAMES if name in known}
                named = {name: column for name, column in named.items() if column != picture}
                return cls(picture, form, tuple(map(str, said)), extra, named, known.get("split"))
        needs = NEEDS.replace("image, images", image) if image else NEEDS
        got = ", ".join(map(str, names[:12])) or "none"
        raise UserError(f"{where}: expected {needs}; got {got}")

    @property
    def without_image(self) -> list[str]:
        """The columns that `records` reads."""
        split = (self.split,) if self.split else ()
        wanted = (*self.said, *self.extra.values(), *self.names.values(), *split)
        return list(dict.fromkeys(wanted))

    def records(
        self,
        row: Mapping[str, Any],
        image: Path,
        identity: str,
        where: str,
        names: Sequence[str] = (),
    ) -> Iterator[Record | Problem]:
        """The records of a row about `image`; none of a row of another split than training's.

        identity: their id if the row has none. names: what else the picture is called.

        Raises: ``UserError``, beginning with `where`, for a row that says nothing of use.
        """
        split = row.get(self.split) if self.split else None
        if isinstance(split, str) and split_of(split) not in ("", "train"):
            return
        item = {name: row.get(column) for name, column in self.extra.items()}
        item = {name: value for name, value in item.items() if value is not None}
        if type(item.get("id")) not in (int, str):
            item["id"] = identity
        if isinstance(phrases := _listed(item.get("phrases")), list):
            item["phrases"] = [_present(phrase) for phrase in phrases]
        named = names_in({name: row.get(column) for name, column in self.names.items()})
        item["image_names"] = list(dict.fromkeys((*names, *named)))
        values = [_listed(row.get(column)) for column in self.said]
        if self.form == "caption":
            item.setdefault("kind", "caption")
            captions = values[0] if isinstance(values[0], list) else None
            for number, said in enumerate(values if captions is None else captions, 1):
                own = item if captions is None else {**item, "id": f"{item['id']}-{number}"}
                turns = [_turn("user", CAPTION_PROMPT), _turn("assistant", said)]
                try:
                    yield _record({**own, "conversations": turns}, image, where)
                except UserError as error:
                    yield Problem.of(error, where, str(own["id"]))
            return
        if self.form == "question":
            turns = [_turn("user", values[0]), _turn("assistant", _answer(values[1]))]
        elif self.form == "pairs":
            pairs = values[0] if isinstance(values[0], list) else []
            turns = [
                _turn(role, pair.get(role) if isinstance(pair, dict) else None)
                for pair in pairs
                for role in ("user", "assistant")
            ]
        else:
            found = values[0] if isinstance(values[0], list) else []
            turns = [_flat(message) for message in found]
        yield _record({**item, "conversations": turns}, image, where)


def _record(item: Mapping[str, Any], image: Path, where: str) -> Record:
    record = parse_record(item, image, where)
    for turn in record.turns:
        if problem := damage(turn.text):
            raise UserError(f"{where}: {problem}")
    return record


def _turn(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text.strip() if isinstance(text, str) else text}


def _present(value: Any) -> Any:
    """An object without the keys that a table fills up with nothing."""
    if not isinstance(value, dict):
        return value
    return {key: one for key, one in value.items() if one is not None}


def _flat(message: Any) -> Any:
    """A message whose content is text: the parts of a list joined, pictures left out."""
    message = _present(message)
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [part for part in message["content"] if isinstance(part, dict)]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return {**message, "content": "\n".join(text.strip() for text in texts if text.strip())}


def _listed(value: Any) -> Any:
    """The list of objects that an object of equally long lists stands for."""
    if not isinstance(value, dict) or not all(isinstance(one, list) for one in value.values()):
        return value
    if len({len(one) for one in value.values()}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _answer(value: Any) -> Any:
    """The most frequent of several answers, the first of those that are."""
    if not isinstance(value, list):
        return value
    said = [one.get("answer") if isinstance(one, dict) else one for one in value]
    counted = Counter(one for one in said if isinstance(one, str) and one.strip())
    return max(counted, key=counted.__getitem__) if counted else None
