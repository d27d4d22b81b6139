"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al., 2016; Mao et al., 2016): phrases for one object of a
picture. Here the attention is asked, not the text: where do the words of the phrase look?

Each phrase of val, testA, testB and test is put as "Where is the {phrase}?" and the attention of
its tokens, the mean over looking layers and heads, is compared with the object's mask
(`pointing.measures`). Of all phrases, and of each dataset and split:

- ``pointing_game``: the strongest cell's centre lies in the mask, without tolerance (the
  headline); ``pointing_game_tolerance``: or nearer than TorchRay's 15 pixels;
- ``energy_in_mask``: the share of the image's attention in the mask; ``energy_gain``: that over
  ``uniform_energy``, the share of the picture that the mask takes, in sums over the phrases;
- without any skill: ``uniform_energy`` and ``centre_energy`` (a Gaussian in the middle), and
  ``centre_pointing_game``, which always points at the middle.

No published number is comparable: text models answer with boxes. A phrase tells its object apart
from others of its class, so looking at any of the class is a miss.

Read as published by the authors (refs(unc).p and the like, with instances.json, and COCO
train2014), where a folder with several splittings counts once, by umd, unc or google in this order;
or as parquet of lmms-lab (RefCOCO, RefCOCOplus, RefCOCOg), whose rows hold the phrases of an object
as `answer` and one outline as `segmentation`. By their numbers of rows, their val of RefCOCO (8811)
is unc's (3811) and google's (5000) in one, and so is that of RefCOCOg (7573) umd's and google's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.image import open_image
from ..data.outlines import instance_mask
from ..data.pickled import read_pickle
from ..data.refcoco import MAKERS, PROMPT, bare
from ..data.tables import damage
from ..errors import UserError
from ..evaluation.benchmark import Benchmark, Given, Item, Scores, mask_key
from ..evaluation.source import Source
from .coco_tables import Entry, entries, read_table, relative

_SPLITS = ("val", "test", "testA", "testB")
#: Score -> what it is the mean of, of `pointing.measures`.
_MEANS = {
    "pointing_game": "hit",
    "pointing_game_tolerance": "near",
    "pointing_game_half_heads": "hit_half_heads",
    "centre_pointing_game": "centre_hit",
    "energy_in_mask": "energy",
    "energy_in_mask_half_heads": "energy_half_heads",
    "uniform_energy": "uniform",
    "centre_energy": "centre",
    "attention_on_image": "on_image",
}


def read(source: Source) -> list[Item]:
    """An item for each phrase of every split that is not for training."""
    refs: dict[Path, Path] = {}
    for path in source.find(*(f"refs({maker}).p" for maker in MAKERS)):
        refs.setdefault(path.parent, path)
    tables = _tables(source, "RefCOCO*/data/{}-*.parquet")
    if not tables and not refs:  # else they may be another benchmark's
        tables = _tables(source, "{}-*.parquet", "{}/*.parquet")
    found = {path: _published(source, path) for path in sorted(refs.values())}
    found |= {path: _parquet(source, path, split) for path, split in tables.items()}
    if not refs and not tables:
        source.need("refs(*).p", what="refs(unc).p, refs(umd).p or refs(google).p")
    return [
        item
        for path, objects in found.items()
        for one in objects
        for item in _items(source, _dataset(source, path), one)
    ]


def _tables(source: Source, *patterns: str) -> dict[Path, str]:
    """Tables, and the split of each, by patterns of their names."""
    return {
        path: split
        for split in _SPLITS
        for path in source.find(*(pattern.format(split) for pattern in patterns))
    }


@dataclass(frozen=True)
class _Object:
    """What phrases are about. where: its row. file: its picture's name, as published.
    size: (h, w) of the picture, None if it is not told. annotation: with its segmentation."""

    where: str
    phrases: Sequence[Any]
    file: str
    image: Path
    size: tuple[int, int] | None
    annotation: Entry
    split: str


def _published(source: Source, path: Path) -> Iterator[_Object]:
    """The objects of a refs(...).p; their outlines are in the instances.json beside it."""
    refs = list(_refs(source, path))
    wanted = {ref["ann_id"] for _, ref in refs}

    def keep(entry: Entry) -> Entry | None:
        key = entry.get("id")
        other = "segmentation" in entry and isinstance(key, int) and key not in wanted
        return None if other else entry

    beside = path.with_name("instances.json")
    if beside not in source.find("instances.json"):
        source.need(relative(source, beside), what=relative(source, beside))
        return
    table = read_table(source, beside, keep)
    fields = {"id": int, "file_name": str, "height": int, "width": int}
    pictures = {row["id"]: row for _, row in entries(source, beside, table, "images", **fields)}
    outlined = {row["id"]: row for _, row in entries(source, beside, table, "annotations", id=int)}
    for where, ref in refs if table else ():
        picture, annotation = pictures.get(ref["image_id"]), outlined.get(ref["ann_id"])
        if picture is None or annotation is None:
            lacking = "picture" if picture is None else "annotation"
            source.bad(where, f"its {lacking} is not in {relative(source, beside)}")
        elif image := source.image(where, picture["file_name"]):
            said = [one.get("sent") if isinstance(one, dict) else one for one in ref["sentences"]]
            size = picture["height"], picture["width"]
            yield _Object(where, said, picture["file_name"], image, size, annotation, ref["split"])


def _refs(source: Source, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, entry) of a pickle's list, of the splits that are read."""
    try:
        refs = read_pickle(path)
    except UserError as error:
        source.bad(relative(source, path), str(error).removeprefix(str(path)).lstrip(": "))
        return
    types = {"ann_id": int, "image_id": int, "split": str, "sentences": list}
    for where, ref in entries(source, path, {"refs": refs}, "refs", **types):
        if ref["split"] in _SPLITS:
            yield where, ref


def _parquet(source: Source, path: Path, split: str) -> Iterator[_Object]:
    """The objects of a table of lmms-lab's: `answer` holds the phrases."""
    columns = ("image", "answer", "segmentation", "file_name")
    for where, row in source.rows(path, columns):
        image = source.image(where, row["image"])
        if image is None:
            continue
        said = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        outline = row["segmentation"]
        if isinstance(outline, list) and outline and not isinstance(outline[0], list):
            outline = [outline]  # one polygon is written without the list around it
        # COCO_train2014_000000581857_16.jpg: the last number is the object's.
        file = re.sub(r"(_\d{12})_\d+(\.\w+)$", r"\1\2", str(row["file_name"]))
        annotation = {"segmentation": outline}
        yield _Object(where, said or (), file, image, None, annotation, split)


def _items(source: Source, dataset: str, one: _Object) -> Iterator[Item]:
    """Its phrases, if its mask can be drawn onto its picture."""
    with open_image(one.image, one.file) as image:
        width, height = image.size
    if one.size not in (None, (height, width)):
        h, w = one.size
        source.bad(one.where, f"expected a picture of {w}x{h} as its outline, got {width}x{height}")
        return
    mask = partial(instance_mask, one.annotation, (height, width), one.where)
    try:
        problem = "" if mask().any() else "its outline covers no pixel"
    except UserError as error:
        problem = str(error).removeprefix(one.where).lstrip(": ")
    except (LookupError, TypeError, ValueError, OverflowError):
        problem = f"expected RLE or polygons, got {one.annotation.get('segmentation')!r:.60}"
    if problem:
        source.bad(one.where, problem)
        return
    outline = mask_key(one.annotation.get("segmentation"))
    for n, said in enumerate(one.phrases, 1):
        phrase = bare(said) if isinstance(said, str) and not damage(said) else ""
        if not phrase:
            source.bad(one.where, f"expected a phrase, got {said!r:.60}")
            continue
        yield Item(
            key=f"{one.where}:{n}",
            unit=one.file,
            image=one.image,
            prompt=PROMPT.replace("{phrase}", phrase),
            kind="look",
            phrase=phrase,
            mask=mask,
            mask_key=outline,
            about={"dataset": dataset, "split": one.split},
        )


def _dataset(source: Source, path: Path) -> str:
    """refcoco, refcoco+ or refcocog, or what its folder is called."""
    home = next(p for p in path.parents if p.name not in ("data", *_SPLITS) or p == source.folder)
    return home.resolve().name.replace(".", "_")


def score(given: Sequence[Given], scores: Scores) -> None:
    """The numbers of all phrases, and of each dataset's splits."""
    groups: dict[str, list[Given]] = {"": []}
    several = len({one.item.about["dataset"] for one in given}) > 1
    for one in given:
        if not one.look:
            continue
        about = one.item.about
        group = f"{about['dataset']}.{about['split']}." if several else f"{about['split']}."
        groups[""].append(one)
        groups.setdefault(group, []).append(one)
    for group, looks in groups.items():
        if looks:
            for key, measure in _MEANS.items():
                scores.mean(group + key, looks, [float(one.look[measure]) for one in looks])
            parts = (group + "energy_in_mask", group + "uniform_energy")
            scores.derive(group + "energy_gain", np.divide, *parts)


BENCHMARK = Benchmark(
    name="refcoco",
    about="where the words of RefCOCO/+/g's phrases look: pointing game, energy in the mask",
    needs=(
        "refs(unc).p (RefCOCO, RefCOCO+), refs(umd).p or refs(google).p (RefCOCOg), each beside "
        "its instances.json (https://github.com/lichengunc/refer), and the pictures of COCO "
        "train2014 (http://images.cocodataset.org/zips/train2014.zip); or the parquet files of "
        "lmms-lab/RefCOCO, RefCOCOplus or RefCOCOg (https://huggingface.co/lmms-lab)"
    ),
    read=read,
    score=score,
    headline=("pointing_game", "centre_pointing_game", "energy_in_mask", "uniform_energy"),
)
