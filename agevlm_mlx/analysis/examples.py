"""The pictures of an analysis: each with its caption, a false one, and its objects' masks."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import read_json
from ..data.image import load_image
from ..data.noun_vocabulary import NounVocabulary
from ..data.nouns import theme_of
from ..data.outlines import instance_mask
from ..data.record_set import read_records
from ..data.records import Phrase, Record, inside
from ..errors import UserError
from ..evaluation.scene_folder import swap_noun
from ..sam.targets import rle_decode

Mask = Callable[[], np.ndarray]
#: Characters of what is asked for, and of what is read as a caption.
_LONGEST_NOUN, _LONGEST_CAPTION = 100, 2000

NEEDS = (
    "expected captions*.json with instances*.json (COCO, or a folder made by 'agevlm scenes'), "
    "or records with phrases and boxes or masks (.jsonl)"
)


@dataclass(frozen=True, eq=False)
class Example:
    """One picture and what is known of it.

    caption: true of it. hard: the caption with one noun exchanged for a related one that is not
    there, None if no noun of it can be exchanged. objects: phrase -> its mask bool[h w], in the
    picture's own pixels, read when it is called. absent: phrases of what is not in the picture,
    likely ones first, at most as many as there are objects.
    """

    image: Path
    caption: str
    hard: str | None
    objects: Mapping[str, Mask]
    absent: tuple[str, ...]


def read_examples(folder: Path, limit: int | None = None, seed: int = 0) -> list[Example]:
    """The examples of a data folder or records file, a random sample of `limit` of them.

    The same arguments give the same examples. Pictures that the tables name and the folder does
    not have are passed over. ``UserError`` if fewer than two pictures with a caption are left,
    one being the other's mismatch.
    """
    if limit is not None and limit < 2:
        raise UserError(
            f"--limit: expected at least 2 images (one is the other's mismatch), got {limit}"
        )
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; {NEEDS}")
    tables = _coco_tables(folder) if folder.is_dir() else None
    pictures = _from_coco(*tables) if tables else _from_records(folder)
    found = [p for p in pictures if 0 < len(p.caption) <= _LONGEST_CAPTION]
    if len(found) < 2:
        raise UserError(
            f"{folder}: expected at least 2 images with captions (one is the other's mismatch), "
            f"got {len(found)}; {NEEDS}"
        )
    if len({p.caption.casefold() for p in found}) < 2:
        raise UserError(f"{folder}: expected different captions, got {found[0].caption!r:.60} only")
    chosen = list(range(len(found)))
    if limit is not None and limit < len(found):
        draw = np.random.default_rng(seed).choice(len(found), limit, replace=False)
        chosen = sorted(draw.tolist())
    themes = {noun: theme for picture in pictures for noun, theme in picture.themes.items()}
    # Each picture draws for itself, so that it is the same example in any sample.
    return [_example(found[i], themes, seed, i) for i in chosen]


def about_data(folder: Path) -> dict[str, Any]:
    """What tells these data from others: a hash of their tables, and of scenes how they were
    made."""
    tables = _coco_tables(folder) if folder.is_dir() else None
    files = list(tables[:2]) if tables else [folder] if folder.is_file() else []
    told = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            told.update(hashlib.file_digest(file, "sha256").digest())
    made = folder / "scenes.json"
    about = read_json(made) if tables and made.is_file() else None
    known = about if isinstance(about, dict) else {}
    facts = {key: known[key] for key in ("split", "style", "seed") if key in known}
    return {"sha256": told.hexdigest()[:16] if files else None, **facts}


@dataclass
class _Picture:
    """themes: of every noun of the data, by noun (the same table in all pictures of COCO)."""

    image: Path
    caption: str
    texts: list[str]
    objects: dict[str, Mask]
    themes: Mapping[str, str]


def _example(picture: _Picture, themes: Mapping[str, str], seed: int, number: int) -> Example:
    rng = np.random.default_rng((seed, number))
    vocabulary = NounVocabulary(list(themes))
    # A thing that only a caption mentions is there too: annotations are not complete.
    said = [noun for text in picture.texts for noun in vocabulary.mentions(text)]
    there = list(dict.fromkeys([*picture.objects, *said]))
    near = {themes[noun] for noun in there if noun in themes}
    others = [noun for noun in sorted(themes) if noun not in there]
    others = [others[i] for i in rng.permutation(len(others))]
    others.sort(key=lambda noun: themes[noun] not in near)
    return Example(
        picture.image,
        picture.caption,
        _hard(picture.caption, there, themes, rng),
        picture.objects,
        tuple(others[: max(1, len(picture.objects))]),
    )


def _hard(
    caption: str, there: Sequence[str], themes: Mapping[str, str], rng: np.random.Generator
) -> str | None:
    """The caption with a noun exchanged; a noun in the plural cannot be: another is tried."""
    for _ in range(8):
        swapped = swap_noun(caption, there, themes, rng)
        if swapped != caption:
            return swapped
    return None


# --- COCO ------------------------------------------------------------------------------------


def _coco_tables(folder: Path) -> tuple[Path, Path, list[Path]] | None:
    """The captions, the instances and where their images may be: of the set whose folder of
    images is there (val2017), else of the first one."""
    for home in (folder, folder / "annotations"):
        names = {p.stem.removeprefix("captions") for p in home.glob("captions*.json")}
        names &= {p.stem.removeprefix("instances") for p in home.glob("instances*.json")}
        if names:
            own = {name: folder / name.strip("_") for name in names if name.strip("_")}
            best = sorted(names, key=lambda n: (not own.get(n, folder).is_dir(), "val" not in n, n))
            name = best[0]
            places = [own[name]] if name in own else []
            places += [folder / "images" / name.strip("_"), folder / "images", folder]
            return home / f"captions{name}.json", home / f"instances{name}.json", places
    return None


def _from_coco(captions: Path, instances: Path, places: Sequence[Path]) -> list[_Picture]:
    where = str(instances)
    try:
        tables, texts = read_json(instances), read_json(captions)
        themes, names = {}, {}
        for category in tables["categories"]:
            names[category["id"]] = " ".join(str(category["name"]).lower().split())
            if not 0 < len(names[category["id"]]) <= _LONGEST_NOUN:
                got = f"{names[category['id']]:.20}"
                raise ValueError(f"category {category['id']!r} has no name of a noun: {got!r}")
            theme = category.get("supercategory") or theme_of(names[category["id"]])
            themes[names[category["id"]]] = str(theme or "")
        sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in tables["images"]}
        parts: dict[Any, dict[str, list[tuple[str, Mapping[str, Any]]]]] = {}
        for n, item in enumerate(tables["annotations"], 1):
            where = f"{instances}: annotation {n}"
            own = parts.setdefault(item["image_id"], {})
            own.setdefault(names[item["category_id"]], []).append((where, item))
        said: dict[Any, list[str]] = {}
        for n, item in enumerate(texts["annotations"], 1):
            where = f"{captions}: annotation {n}"
            said.setdefault(item["image_id"], []).append(str(item["caption"]).strip())
        where, pictures, met = str(captions), [], set()
        for row in texts["images"]:
            image = _find(str(row["file_name"]), places, where)
            if image is None or image in met:  # one picture may have several rows
                continue
            met.add(image)
            size, objects = sizes.get(row["id"]), {}
            if size is not None:
                own = parts.get(row["id"], {})
                objects = {noun: partial(_coco_mask, own[noun], size) for noun in own}
            lines = [text for text in said.get(row["id"], ()) if text]
            caption = lines[0] if lines else ""
            pictures.append(_Picture(image, caption, lines, objects, themes))
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: not as COCO tables are: {what}") from None
    if not pictures:
        looked = ", ".join(map(str, places))
        raise UserError(f"{captions}: found none of its images; looked in {looked}")
    return pictures


def _find(name: str, places: Sequence[Path], where: str) -> Path | None:
    paths = [inside(place, name, where) for place in places]
    return next((path for path in paths if path.is_file()), None)


def _coco_mask(items: Sequence[tuple[str, Mapping[str, Any]]], size: tuple[int, int]) -> np.ndarray:
    """The pixels of all instances of a category."""
    masks = []
    for where, item in items:
        try:
            masks.append(instance_mask(dict(item), size, where))
        except UserError:
            raise
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{where}: expected a segmentation as COCO has it") from None
    return np.logical_or.reduce(masks)


# --- records ---------------------------------------------------------------------------------


def _from_records(path: Path) -> list[_Picture]:
    by_image: dict[Path, list[Record]] = {}
    for record in read_records(path):
        by_image.setdefault(record.image, []).append(record)
    pictures = [_gathered(image, records) for image, records in by_image.items()]
    if not any(picture.objects for picture in pictures):
        raise UserError(f"{path}: no phrase in it has a box or mask; {NEEDS}")
    return pictures


def _gathered(image: Path, records: Sequence[Record]) -> _Picture:
    parts: dict[str, list[Phrase]] = {}
    for record in records:
        for phrase in record.phrases:
            if phrase.box or phrase.mask:
                parts.setdefault(_noun(phrase.text), []).append(phrase)
    objects = {noun: partial(_phrase_mask, image, tuple(own)) for noun, own in parts.items()}
    captions = list(_captions(records))
    texts = [turn.text for record in records for turn in record.turns if turn.role == "assistant"]
    # Records say nothing of what is related to what: any noun may stand for another.
    return _Picture(
        image, captions[0] if captions else "", texts, objects, dict.fromkeys(parts, "")
    )


def _captions(records: Sequence[Record]) -> Iterator[str]:
    """Answers that describe the picture: those said to be captions, else with phrases in them."""
    for record in records:
        if record.kind == "caption":
            yield from (turn.text for turn in record.turns if turn.role == "assistant")
    for record in records:
        spoken = {phrase.turn for phrase in record.phrases}
        for n, turn in enumerate(record.turns):
            if turn.role == "assistant" and n in spoken:
                yield turn.text


def _noun(text: str) -> str:
    """A phrase as a noun to ask for: lower case, without its article."""
    return re.sub(r"^(an?|the)\s+", "", text.strip().lower())


def _phrase_mask(image: Path, phrases: Sequence[Phrase]) -> np.ndarray:
    """bool[h w]: the masks of the phrases, or their boxes."""
    width, height = load_image(image).size
    out = np.zeros((height, width), bool)
    for phrase in phrases:
        if phrase.mask is not None:
            mask = rle_decode(phrase.mask)
            if mask.shape != out.shape:
                raise UserError(
                    f"{image}: expected a mask of {list(out.shape)} for {phrase.text!r}, "
                    f"got {list(mask.shape)}"
                )
            out |= mask
        elif phrase.box is not None:
            x0, y0, x1, y1 = phrase.box
            out[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    return out
