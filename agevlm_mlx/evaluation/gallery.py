"""Held-out scenes for the report: what each arm answered, and where it looked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..data.image import Preprocessor, load_image
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
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
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
            item.name in images and "grounding" in images[item.name] for images in by_arm.values()
        )
    ]
    picks = np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int)
    return [_card(shown[i], {a: by_arm[a][shown[i].name] for a in by_arm}, geometry) for i in picks]


Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def _by_image(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    images: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        images.setdefault(row["image"], {}).setdefault(row["task"], []).append(row)
    return images


def _card(
    item: SceneItem,
    rows: Mapping[str, Rows],
    geometry: Mapping[str, tuple[Preprocessor, tuple[int, int]]],
) -> Card:
    first = next(iter(rows))
    noun, question = (rows[first]["grounding"][0][key] for key in ("noun", "question"))
    image = load_image(item.path)
    overlays, energy, hit = {}, {}, {}
    uniform = 0.0
    for arm, own in rows.items():
        look = next(row for row in own["grounding"] if row["question"] == question)
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
        captions={arm: own["caption"][0]["caption"] for arm, own in rows.items()},
        caption=item.caption,
    )


def _questions(rows: Mapping[str, Rows], question: str) -> list[Asked]:
    """The question that is shown, and the adversarial one about something absent."""
    first = next(iter(rows))
    absent = [
        row["question"]
        for row in rows[first]["pope"]
        if row["split"] == "adversarial" and not row["label"]
    ]
    asked = []
    for text in dict.fromkeys([question, *absent[:1]]):
        mine = {
            arm: next((r for r in own["pope"] if r["question"] == text), None)
            for arm, own in rows.items()
        }
        known = {arm: row for arm, row in mine.items() if row is not None}
        if known:
            label = next(iter(known.values()))["label"]
            asked.append(Asked(text, label, {a: r["margin"] > 0 for a, r in known.items()}))
    return asked
