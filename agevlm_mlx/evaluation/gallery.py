"""Held-out scenes for the report: what each arm answered, and where it looked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.image import Preprocessor, load_image
from .answers import Row
from .overlay import display_size, overlay
from .scene_folder import SceneItem

#: Side of a picture in the report, in pixels.
SIDE = 280


@dataclass(frozen=True)
class Asked:
    """A question with its true answer and, per arm, the answer given (True = yes)."""

    question: str
    label: bool
    answers: Mapping[str, bool]


@dataclass(frozen=True)
class Card:
    """One scene: pictures per arm for the noun of `questions[0]`, and the other answers."""

    picture: Image.Image
    overlays: Mapping[str, Image.Image]
    noun: str
    energy: Mapping[str, float]
    hit: Mapping[str, bool]
    uniform: float
    questions: tuple[Asked, ...]
    captions: Mapping[str, str]
    caption: str


def cards(
    items: Sequence[SceneItem],
    answers: Mapping[str, Sequence[Row]],
    geometry: Mapping[str, tuple[Preprocessor, tuple[int, int]]],
    count: int = 8,
) -> list[Card]:
    """`count` scenes at even distances through the test set: a sample, not a selection.

    answers: per arm the rows of its ``.jsonl``; geometry: per arm how images were given to the
    model, and its token grid (Gh, Gw).
    """
    by_arm = {arm: _by_image(rows) for arm, rows in answers.items()}
    shown = [
        item
        for item in items
        if all(
            "grounding" in images.get(item.name, {}) and "caption" in images[item.name]
            for images in by_arm.values()
        )
    ]
    picks = np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int)
    return [_card(shown[i], {a: by_arm[a][shown[i].name] for a in by_arm}, geometry) for i in picks]


#: The rows of one image by task.
Rows = Mapping[str, Sequence[Row]]


def _by_image(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    images: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["kind"] != "look" or row["look"]:  # nothing to see of a hidden object
            images.setdefault(row["unit"], {}).setdefault(row["about"]["task"], []).append(row)
    return images


def _card(
    item: SceneItem,
    rows: Mapping[str, Rows],
    geometry: Mapping[str, tuple[Preprocessor, tuple[int, int]]],
) -> Card:
    first = next(iter(rows))
    asked = rows[first]["grounding"][0]
    noun, question = asked["phrase"], asked["prompt"]
    image = load_image(item.path)
    overlays, energy, hit = {}, {}, {}
    uniform = 0.0
    for arm, own in rows.items():
        look = next(row["look"] for row in own["grounding"] if row["prompt"] == question)
        preprocessor, grid = geometry[arm]
        placed = preprocessor.geometry(*image.size)
        overlays[arm] = overlay(image, np.reshape(look["map"], grid), placed, tile=SIDE)
        energy[arm], hit[arm], uniform = look["energy"], look["hit"], look["uniform"]
    return Card(
        picture=image.resize(display_size(*image.size, SIDE), Image.Resampling.BICUBIC),
        overlays=overlays,
        noun=noun,
        energy=energy,
        hit=hit,
        uniform=uniform,
        questions=tuple(_questions(rows, question)),
        captions={arm: own["caption"][0]["answer"] for arm, own in rows.items()},
        caption=item.caption,
    )


def _questions(rows: Mapping[str, Rows], question: str) -> list[Asked]:
    """The question that is shown, and the adversarial one about something absent."""
    first = next(iter(rows))
    absent = [
        row["prompt"]
        for row in rows[first]["pope"]
        if row["about"]["split"] == "adversarial" and row["label"] == "no"
    ]
    asked = []
    for text in dict.fromkeys([question, *absent[:1]]):
        mine = {
            arm: next((r for r in own["pope"] if r["prompt"] == text), None)
            for arm, own in rows.items()
        }
        known = {arm: row for arm, row in mine.items() if row is not None}
        if known:
            label = next(iter(known.values()))["label"] == "yes"
            asked.append(Asked(text, label, {a: _says_yes(r) for a, r in known.items()}))
    return asked


def _says_yes(row: Row) -> bool:
    """By the more likely answer, as the scores of the report are."""
    return row["options"][int(np.argmax(row["scores"]))] == "yes"
