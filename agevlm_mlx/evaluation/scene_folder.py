"""A folder made by ``agevlm scenes``, as the benchmark needs it: questions, captions, masks.

Read from the files in their published formats (POPE JSON lines, COCO captions and instances),
so that a folder of other pictures in the same formats can take its place.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import config
from ..data.nouns import theme_of
from ..errors import UserError
from ..sam.targets import rle_decode
from .metrics import NounVocabulary

POPE_SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    """One line of a POPE file; `label` True = yes."""

    id: int
    text: str
    label: bool


@dataclass(frozen=True)
class SceneItem:
    """One picture: its file, caption, objects by noun (COCO RLE masks) and POPE questions."""

    name: str
    path: Path
    caption: str
    objects: Mapping[str, tuple[Mapping[str, Any], ...]]
    questions: Mapping[str, tuple[Question, ...]]

    def mask(self, noun: str) -> np.ndarray:
        """The visible pixels of every object of that noun, bool[h w]."""
        return np.logical_or.reduce([rle_decode(rle) for rle in self.objects[noun]])


@dataclass(frozen=True)
class SceneFolder:
    """All pictures with questions, and the theme of every noun (COCO's supercategory, or ours)."""

    items: tuple[SceneItem, ...]
    themes: Mapping[str, str]
    meta: Mapping[str, Any]


def read_pope(path: Path) -> list[dict[str, Any]]:
    """The questions of a POPE file, JSON lines or one JSON array; errors name file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text: {error.reason}") from None
    rows: list[tuple[int, Any]] = []
    if text.lstrip().startswith("["):
        rows = [(n + 1, row) for n, row in enumerate(config.read_json(path))]
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: malformed JSON: {error.msg}") from None
    for number, row in rows:
        wrong = [
            key
            for key, kind in (("question_id", int), ("image", str), ("text", str), ("label", str))
            if not isinstance(row, dict) or not isinstance(row.get(key), kind)
        ]
        if wrong or row["label"].lower() not in ("yes", "no"):
            raise UserError(
                f"{path}:{number}: expected question_id, image, text and label (yes or no), "
                f"got {str(row)[:80]}"
            )
    return [row for _, row in rows]


def read_scene_folder(folder: Path) -> SceneFolder:
    """Read a scenes folder; ``UserError`` lists what is missing or malformed."""
    needed = [f"pope_{split}.json" for split in POPE_SPLITS] + ["captions.json", "instances.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: expected a folder made by 'agevlm scenes --out {folder}', "
            f"{', '.join(missing)} missing"
        )
    instances = _coco(folder / "instances.json", ("images", "annotations", "categories"))
    captions = _coco(folder / "captions.json", ("annotations",))
    try:
        nouns = {c["id"]: c["name"] for c in instances["categories"]}
        themes = {
            c["name"]: c.get("supercategory") or theme_of(c["name"]) or ""
            for c in instances["categories"]
        }
        files = {image["id"]: image["file_name"] for image in instances["images"]}
        caption_of = {a["image_id"]: a["caption"] for a in captions["annotations"]}
        objects: dict[int, dict[str, list[Any]]] = {number: {} for number in files}
        for one in instances["annotations"]:
            by_noun = objects[one["image_id"]]
            by_noun.setdefault(nouns[one["category_id"]], []).append(one["segmentation"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: expected COCO instances and captions of the same images, "
            f"{type(error).__name__} at {error}"
        ) from None
    asked: dict[str, dict[str, list[Question]]] = {}
    for split in POPE_SPLITS:
        for row in read_pope(folder / f"pope_{split}.json"):
            question = Question(row["question_id"], row["text"], row["label"].lower() == "yes")
            asked.setdefault(row["image"], {}).setdefault(split, []).append(question)
    items = tuple(
        SceneItem(
            name=name,
            path=_image_path(folder, name),
            caption=str(caption_of.get(number, "")),
            objects={noun: tuple(rles) for noun, rles in objects[number].items()},
            questions={s: tuple(asked[_key(asked, name)].get(s, ())) for s in POPE_SPLITS},
        )
        for number, name in sorted(files.items())
        if _key(asked, name) in asked
    )
    if len(items) < 2:
        raise UserError(f"{folder}: expected at least two images with questions, got {len(items)}")
    meta_file = folder / "scenes.json"
    meta = config.read_json(meta_file) if meta_file.is_file() else {}
    return SceneFolder(items, themes, meta)


def _coco(path: Path, tables: tuple[str, ...]) -> dict[str, Any]:
    value = config.read_json(path)
    wrong = [t for t in tables if not isinstance(value, dict) or not isinstance(value.get(t), list)]
    if wrong:
        raise UserError(f"{path}: expected a COCO file with lists {', '.join(wrong)}")
    return value


def _key(asked: Mapping[str, Any], name: str) -> str:
    """The name of an image in the POPE files: with or without its folder."""
    return name if name in asked else Path(name).name


def _image_path(folder: Path, name: str) -> Path:
    """An image of the folder; a path that leads out of it is refused."""
    for candidate in (folder / name, folder / "images" / name):
        if candidate.is_file() and candidate.resolve().is_relative_to(folder.resolve()):
            return candidate
    raise UserError(f"{folder}: expected the image {name} in it, as instances.json says")


def swap_noun(
    caption: str, nouns: Sequence[str], themes: Mapping[str, str], rng: np.random.Generator
) -> str | None:
    """The caption with one of its nouns replaced by an absent one of the same theme.

    None when the caption names none of `nouns` or no theme has another noun to offer.
    """
    said = NounVocabulary(nouns).mentions(caption)
    choices = [
        (noun, other)
        for noun in dict.fromkeys(said)
        for other in sorted(themes)
        if themes[other] == themes.get(noun) and other not in nouns
    ]
    if not choices:
        return None
    noun, other = choices[rng.integers(len(choices))]

    def replace(match: re.Match[str]) -> str:
        article = match.group(1) or ""
        if article.strip().lower() in ("a", "an"):
            article = ("A" if article[0] == "A" else "a") + ("n " if other[0] in "aeiou" else " ")
        return article + other

    return re.sub(rf"\b(an? )?{re.escape(noun)}\b", replace, caption, count=1, flags=re.IGNORECASE)
