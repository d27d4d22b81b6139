"""CHAIR (Rohrbach et al., 2018, arXiv 1809.02156): objects that a caption makes up.

The objects of a picture are the classes of its COCO instances and those that its reference captions
name, found as in the caption that is scored. A repeated mention counts each time.

- ``chair_i``: mentions of absent objects / mentions; ``chair_s``: captions with one / captions;
- ``recall``: objects of the picture that are named / objects of the picture (over all pictures);
- ``words_per_caption`` and ``mentions_per_caption``, since saying less lowers both of CHAIR's.

An object that is neither annotated nor in a reference caption counts as absent though it be there.

These are CHAIR-compatible numbers, not the authors': which words name a class is our own table
(`coco_nouns`), where no ``synonyms.txt`` of theirs lies in the folder; and a plural is found by
rules and a list of irregular ones, where their script makes singulars with the package ``pattern``.
Pictures are usually 500 of COCO val2014 drawn without a seed. Of a folder with more, the 500 are
taken whose names have the smallest SHA-256, so that they are the same everywhere. A longer answer
names more objects and more of them wrong: compare numbers of the same number of tokens only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from ..data import coco_nouns
from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.metrics import caption_counts, caption_ratios
from ..evaluation.source import Source
from .coco_tables import Entry, entries, read_table, relative

PROMPT = "Please describe this image in detail."
#: The pictures of one run, as in the literature.
IMAGES = 500
#: What is kept of COCO's tables, where outlines take most of the room.
_KEPT = ("images", "annotations", "categories")
_KEPT += ("id", "file_name", "image_id", "caption", "category_id", "name")


@dataclass
class _Picture:
    """where: its row in the table. objects: classes of its instances."""

    name: str
    where: str
    captions: list[str] = field(default_factory=list)
    objects: set[str] = field(default_factory=set)


def read(source: Source) -> list[Item]:
    """A caption of each of at most `IMAGES` pictures that lie in the folder."""
    tables = source.need(
        "captions_*.json", "captions.json", what="captions_val2014.json (or of another split)"
    )
    there = {path.name for path in source.need("*.jpg", "*.png", what="pictures, as val2014/*.jpg")}
    lines = [line for path in source.find("synonyms.txt")[:1] for _, line in source.lines(path)]
    nouns = _nouns(tuple(lines))
    pictures: dict[str, _Picture] = {}
    for path in tables:
        pictures |= {picture.name: picture for picture in _pictures(source, path, there, nouns)}
    if tables and there and not pictures:
        source.bad(relative(source, tables[0]), "none of its pictures lies in the folder")
    items = []
    for one in (pictures[key] for key in chosen(list(pictures))):
        image = source.image(one.where, one.name)
        if image is None:
            continue
        objects = one.objects.union(*map(nouns.mentions, one.captions))
        about = {"objects": sorted(objects), "synonyms": lines or "ours"}
        items.append(
            Item(key=one.name, unit=one.name, image=image, prompt=PROMPT, kind="text", about=about)
        )
    return items


def chosen(names: Sequence[str]) -> list[str]:
    """At most `IMAGES` of the pictures, always the same ones, sorted."""
    drawn = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return sorted(drawn[:IMAGES])


def _pictures(
    source: Source, path: Path, there: set[str], nouns: coco_nouns.CocoNouns
) -> list[_Picture]:
    """The pictures of a table of captions that are `there`, with what is known of them."""
    table = read_table(source, path, _thin)
    found = {
        row["id"]: _Picture(row["file_name"], where)
        for where, row in entries(source, path, table, "images", id=int, file_name=str)
        if row["file_name"] in there
    }
    if not found:  # a split that nobody asks about need not have instances
        return []
    for _, row in entries(source, path, table, "annotations", image_id=int, caption=str):
        if row["image_id"] in found:
            found[row["image_id"]].captions.append(row["caption"])
    beside = path.name.replace("captions", "instances", 1)
    for path in source.need(beside, what=beside)[:1]:
        table = read_table(source, path, _thin)
        classes: dict[int, list[str]] = {}
        for where, row in entries(source, path, table, "categories", id=int, name=str):
            classes[row["id"]] = nouns.mentions(row["name"])[:1]
            if not classes[row["id"]]:
                source.bad(where, f"no class of the table of words is called {row['name']!r}")
        rows = entries(source, path, table, "annotations", image_id=int, category_id=int)
        for where, row in rows:
            if row["category_id"] not in classes:
                source.bad(where, f"no category {row['category_id']}")
            elif row["image_id"] in found:
                found[row["image_id"]].objects.update(classes[row["category_id"]])
    return list(found.values())


def _thin(entry: Entry) -> Entry:
    return {key: entry[key] for key in _KEPT if key in entry}


@cache
def _nouns(lines: tuple[str, ...]) -> coco_nouns.CocoNouns:
    """The words that name a class: the published ones of these lines, or ours without any."""
    return coco_nouns.published(lines) if lines else coco_nouns.ours()


def score(given: Sequence[Given], scores: Scores) -> None:
    """CHAIR's numbers, those of `caption_ratios`, and the length."""
    counts = [caption_counts(_mentions(one), one.item.about["objects"]) for one in given]
    for key, (top, bottom) in caption_ratios(np.array(counts)).items():
        scores.ratio(key, given, top, bottom)
    scores.mean("words_per_caption", given, [len(one.answer.split()) for one in given])


def _mentions(given: Given) -> list[str]:
    lines = given.item.about["synonyms"]
    return _nouns(() if lines == "ours" else tuple(lines)).mentions(given.answer)


BENCHMARK = Benchmark(
    name="chair",
    about="objects that a caption of a COCO picture makes up (CHAIR-compatible)",
    needs=(
        "pictures of COCO val2014 (http://images.cocodataset.org/zips/val2014.zip) and "
        "captions_val2014.json and instances_val2014.json "
        "(http://images.cocodataset.org/annotations/annotations_trainval2014.zip); 2017 works "
        "too. Of more than 500 pictures a fixed choice is asked about. A synonyms.txt "
        "(https://github.com/LisaAnne/Hallucination) replaces our own table of words"
    ),
    read=read,
    score=score,
    headline=("chair_s", "chair_i", "recall", "words_per_caption"),
    max_tokens=64,
)
