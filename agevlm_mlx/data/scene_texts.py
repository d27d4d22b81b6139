"""What is said and asked about an embedded picture.

Each text is one LLaVA record (see `records`) with our two extra keys: `kind`, and `phrases`
that tie words to boxes. Absent objects have no phrase, so nothing guides them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .nouns import NOUNS, absent_nouns, likely_absent, popular_absent, theme_of, with_article
from .painting import SIDE, Scene

NUMBERS = ("One", "Two", "Three", "Four")
DESCRIBE = "Describe the image."
#: An object this close to the middle (px) has no clear corner.
_MIDDLE = 6
POPE_KINDS = ("random", "popular", "adversarial")


def caption(nouns: Sequence[str]) -> str:
    """``A dog, a car and a pizza.``"""
    named = [with_article(noun) for noun in nouns]
    text = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"{text[0].upper()}{text[1:]}."


def presence_question(noun: str, long: bool) -> str:
    """``Is there a dog?``, or with ``in the image`` as the POPE benchmark asks it."""
    return f"Is there {with_article(noun)}{' in the image' if long else ''}?"


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, and the numbers of the objects that each names, in this order."""

    question: str
    answer: str
    asked: Sequence[int] = ()
    said: Sequence[int] = ()


class Writer:
    """Collects the records of one picture."""

    def __init__(self, scene: Scene, stem: str, image: str, rng: np.random.Generator) -> None:
        self.scene, self.stem, self.image, self.rng = scene, stem, image, rng
        self.records: list[dict[str, Any]] = []

    def box(self, index: int) -> list[int]:
        return [int(v) for v in self.scene.boxes[index]]

    def add(self, kind: str, question: str, answer: str, turn: int, *objects: int) -> None:
        """One question and answer; `objects` are named in `turn`, in this order."""
        named = {"asked": objects} if turn == 0 else {"said": objects}
        self.talk(kind, Exchange(question, answer, **named))

    def talk(self, kind: str, *exchanges: "Exchange") -> None:
        """A conversation."""
        turns: list[dict[str, str]] = []
        phrases: list[dict[str, Any]] = []
        for exchange in exchanges:
            phrases += self._phrases(len(turns), exchange.question, exchange.asked)
            phrases += self._phrases(len(turns) + 1, exchange.answer, exchange.said)
            question = exchange.question if turns else f"<image>\n{exchange.question}"
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": exchange.answer})
        self.records.append(
            {
                "id": f"{self.stem}-{len(self.records)}",
                "image": self.image,
                "kind": kind,
                "conversations": turns,
                **({"phrases": phrases} if phrases else {}),
            }
        )

    def _phrases(self, turn: int, text: str, objects: Sequence[int]) -> list[dict[str, Any]]:
        phrases, start = [], 0
        for index in objects:
            noun = self.scene.nouns[index]
            start = text.index(f" {noun}", start) + 1
            end = start + len(noun)
            phrases.append(
                {"text": noun, "turn": turn, "start": start, "end": end, "box": self.box(index)}
            )
            start = end
        return phrases

    def presence(self, kind: str, noun: str, long: bool) -> None:
        if noun in self.scene.nouns:
            index = self.scene.nouns.index(noun)
            self.add(kind, presence_question(noun, long), "Yes", 0, index)
        else:
            self.add(kind, presence_question(noun, long), "No", 0)


def scene_records(scene: Scene, stem: str, image: str, rng: np.random.Generator) -> list[dict]:
    """Every text of one picture: caption, presence, attribute, position, count, match."""
    w = Writer(scene, stem, image, rng)
    nouns, order = list(scene.nouns), scene.left_to_right()
    w.add("caption", DESCRIBE, caption([nouns[i] for i in order]), 1, *order)
    absent = absent_nouns(nouns)
    for noun in (nouns * 6)[:6]:
        w.presence("presence", noun, bool(rng.random() < 0.5))
    for i in rng.choice(len(absent), 6, replace=False):
        w.presence("presence", absent[i], bool(rng.random() < 0.5))
    hard = ranked(likely_absent, nouns, rng)[:6]
    for i, noun in enumerate((nouns * 2)[:2]):
        w.presence("presence_hard", noun, bool(rng.random() < 0.5))
        w.presence("presence_hard", hard[int(rng.integers(3)) + 3 * i], bool(rng.random() < 0.5))
    for i in rng.permutation(len(nouns))[:2]:
        question = f"Is the {nouns[i]} big or small?"
        w.add("attribute", question, scene.sizes[i].capitalize(), 0, int(i))
    for i in [i for i in rng.permutation(len(nouns)) if corner(scene, int(i))][:2]:
        w.add("position", f"Where is the {nouns[i]}?", corner(scene, int(i)) or "", 0, int(i))
    w.add("count", "How many objects are there?", NUMBERS[len(nouns) - 1], 0)
    names = [nouns[i] for i in order]
    for answer, described in (("Yes", names), ("No", mismatched(names, rng))):
        text = caption(described)
        question = f"Does this describe the image? {text}"
        right = [i for i in order if nouns[i] in described]
        w.add("match", question, answer, 0, *(right if answer == "Yes" else ()))
    return w.records


def ranked(
    rank: Callable[[list[str]], list[str]], nouns: list[str], rng: np.random.Generator
) -> list[str]:
    """Absent nouns as `rank` orders them; held-out ones, which no picture of the training
    data could make likely, in random order."""
    if nouns[0] in NOUNS:
        return rank(nouns)
    absent = absent_nouns(nouns)
    return [absent[i] for i in rng.permutation(len(absent))]


def corner(scene: Scene, index: int) -> str | None:
    """``Top left`` ..., or None when the object is too near the middle lines."""
    x0, y0, x1, y1 = scene.boxes[index]
    right, down = (x0 + x1 - SIDE) / 2, (y0 + y1 - SIDE) / 2
    if min(abs(right), abs(down)) < _MIDDLE:
        return None
    return f"{'Bottom' if down > 0 else 'Top'} {'right' if right > 0 else 'left'}"


def mismatched(nouns: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The same list with one noun replaced by an absent one of its theme (else of any)."""
    spot = int(rng.integers(len(nouns)))
    absent = absent_nouns(list(nouns))
    same = [noun for noun in absent if theme_of(noun) == theme_of(nouns[spot])] or absent
    return [*nouns[:spot], same[int(rng.integers(len(same)))], *nouns[spot + 1 :]]


def pope_questions(scene: Scene, image: str, rng: np.random.Generator) -> dict[str, list[dict]]:
    """POPE's questions by kind: one about a present and one about an absent noun each."""
    nouns = list(scene.nouns)
    absent = absent_nouns(nouns)
    present = nouns[int(rng.integers(len(nouns)))]
    popular = ranked(popular_absent, nouns, rng)
    negatives = {
        "random": absent[int(rng.integers(len(absent)))],
        "popular": popular[int(rng.integers(len(popular)))],
        "adversarial": ranked(likely_absent, nouns, rng)[0],
    }
    return {
        kind: [
            {"image": image, "text": presence_question(present, True), "label": "yes"},
            {"image": image, "text": presence_question(negatives[kind], True), "label": "no"},
        ]
        for kind in POPE_KINDS
    }
