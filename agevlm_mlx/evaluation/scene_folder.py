"""A folder made by ``agevlm scenes``, for evaluation and analysis: questions, captions, masks.

Read from the files in their published formats (POPE JSON lines, COCO captions and instances),
so that a folder of other pictures in the same formats can take its place.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import config
from ..data.noun_vocabulary import NounVocabulary
from ..data.nouns import theme_of
from ..data.outlines import instance_mask
from ..errors import UserError
from ..sam.targets import rle_decode, rle_encode
from . import yes_no
from .source import Source
from .yes_no import Question

POPE_SPLITS = ("random", "popular", "adversarial")
NEEDS = (
    "a folder made by 'agevlm scenes --out DIR --n 500 --split test': captions.json, "
    "instances.json (COCO), pope_random.json, pope_popular.json, pope_adversarial.json (POPE) "
    "and images/"
)


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


def read_scene_folder(folder: Path) -> SceneFolder:
    """Read a scenes folder; ``UserError`` lists what is missing or malformed."""
    with Source(folder) as source:
        found = read_scenes(source)
        source.check(NEEDS)
    if len(found.items) < 2:
        raise UserError(
            f"{folder}: expected at least two images with questions, got {len(found.items)}"
        )
    return found


def read_scenes(source: Source) -> SceneFolder:
    """The same of a `Source`, which is told what is missing or malformed; the rest is read."""
    asked = _questions(source)
    instances = _table(source, "instances.json", ("images", "annotations", "categories"))
    captions = _table(source, "captions.json", ("annotations",))
    categories = dict(_rows(source, instances, "categories", id=int, name=str))
    files = {
        where: row
        for where, row in _rows(
            source, instances, "images", id=int, file_name=str, width=int, height=int
        )
        if _name(asked, row["file_name"]) in asked
    }
    names = {row["id"]: row["name"] for row in categories.values()}
    sizes = {row["id"]: (row["height"], row["width"]) for row in files.values()}
    described = {
        row["image_id"]: row["caption"]
        for _, row in _rows(source, captions, "annotations", image_id=int, caption=str)
    }
    objects: dict[int, dict[str, list[Any]]] = {number: {} for number in sizes}
    for where, row in _rows(source, instances, "annotations", image_id=int, category_id=int):
        if row["image_id"] not in sizes:
            continue
        rle = _rle(source, where, row, sizes[row["image_id"]])
        if row["category_id"] not in names:
            source.bad(where, f"expected a category_id of the file, got {row['category_id']}")
        elif rle is not None:
            noun = names[row["category_id"]]
            objects[row["image_id"]].setdefault(noun, []).append(rle)
    items: dict[str, SceneItem] = {}
    for where, row in sorted(files.items(), key=lambda pair: pair[1]["id"]):
        number, name = row["id"], row["file_name"]
        path = source.image(where, name, "images")
        if path is None:
            continue
        if name in items:
            source.bad(where, f"expected every image once, got {name} again")
            continue
        items[name] = SceneItem(
            name=name,
            path=path,
            caption=described.get(number, ""),
            objects={noun: tuple(rles) for noun, rles in objects[number].items()},
            questions={s: tuple(asked[_name(asked, name)].get(s, ())) for s in POPE_SPLITS},
        )
    themes = {
        row["name"]: str(row.get("supercategory") or theme_of(row["name"]) or "")
        for row in categories.values()
    }
    return SceneFolder(tuple(items.values()), themes)


def _questions(source: Source) -> dict[str, dict[str, list[Question]]]:
    """The questions by image and split."""
    asked: dict[str, dict[str, list[Question]]] = {}
    for split in POPE_SPLITS:
        for path in _file(source, f"pope_{split}.json"):
            for question in yes_no.questions(source, path):
                if isinstance(question.image, str):
                    of_image = asked.setdefault(question.image, {})
                    of_image.setdefault(split, []).append(question)
                else:
                    problem = f"expected an image's name, got {question.image!r:.40}"
                    source.bad(question.where, problem)
    return asked


def _file(source: Source, name: str) -> list[Path]:
    """The file of that name, if there is one."""
    found = source.need(name, what=name)
    if len(found) > 1:
        source.bad(name, f"expected one in the folder, got {len(found)}; name the folder it is in")
    return found[:1]


def _table(source: Source, name: str, lists: tuple[str, ...]) -> dict[str, Any]:
    """A COCO file of the folder, with these lists."""
    for path in _file(source, name):
        try:
            table = config.read_json(path)
        except UserError as error:
            source.bad(name, str(error))
            break
        lacks = [
            t for t in lists if not isinstance(table, dict) or not isinstance(table.get(t), list)
        ]
        if not lacks:
            return {"name": name, **table}
        source.bad(name, f"expected a COCO file, got none with lists {', '.join(lacks)}")
    return {"name": name} | {key: [] for key in lists}


def _rows(
    source: Source, table: Mapping[str, Any], key: str, **types: type
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a list of a COCO file; rows without values of these types are told."""
    for n, row in enumerate(table[key], 1):
        where = f"{table['name']}:{key} {n}"
        wrong = [
            k for k, t in types.items() if not isinstance(row, dict) or type(row.get(k)) is not t
        ]
        if wrong:
            source.bad(where, f"expected {', '.join(wrong)}, got {str(row)[:60]}")
        else:
            yield where, row


def _rle(source: Source, where: str, row: dict[str, Any], size: tuple[int, int]) -> Any:
    """The mask of an annotation as RLE, whether that or polygons; None when it is neither."""
    try:
        mask = instance_mask(row, size, where)
    except (UserError, LookupError, TypeError, ValueError, OverflowError) as error:
        source.bad(where, f"expected a COCO segmentation: {error}")
        return None
    return row["segmentation"] if isinstance(row["segmentation"], dict) else rle_encode(mask)


def _name(asked: Mapping[str, Any], name: str) -> str:
    """The name of an image in the POPE files: with or without its folder."""
    return name if name in asked else Path(name).name


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
