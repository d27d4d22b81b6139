"""CV-Bench (Tong et al., 2024, arXiv 2406.16860): counting and left-right in 2D, depth and distance
in 3D, on pictures of ADE20K, COCO and Omni3D.

``accuracy``, the headline, is the authors' formula, which weighs sources, not questions:
((ADE20K + COCO) / 2 + Omni3D) / 2, and is there when all three are. ``2d`` and ``3d`` are its two
parts, ``source.*`` and ``task.*`` (Count, Relation, Depth, Distance) plain accuracies, ``items``
that of all questions, ``unclear`` the answers that name no option / questions. Guessing gets about
1 / options: 2 to 6 of them, so the constant answers printed beside it are the measure.

Asked: the file's own ``prompt``, which lists the options as "(A) ...", and the sentence with which
the authors' evaluation ends it. That takes an answer's first letter (so do others, "The" as T);
here `parsing.option` reads the answer. Questions about one photograph are one unit of the
bootstrap. The 2D pictures come from COCO and ADE20K: those trained on are not held out.
"""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from ..evaluation import parsing
from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.source import Source

SOURCES = ("ADE20K", "COCO", "Omni3D")
_COLUMNS = ("type", "task", "choices", "answer", "prompt", "source")


def read(source: Source) -> list[Item]:
    """One item a row; rows that lack something are told to `source`."""
    items = []
    for path in _tables(source):
        for where, row in source.rows(path, _COLUMNS):
            item = _item(source, where, row)
            if item is not None:
                items.append(item)
    return items


def _tables(source: Source) -> list[Path]:
    """The two files of today, or the one of before; parquet if there is both."""
    halves = [
        path
        for half in ("2d", "3d")
        for path in (source.find(f"test_{half}.parquet") or source.find(f"test_{half}.jsonl"))[:1]
    ]
    return (
        halves
        or source.find("CV-Bench/*.parquet")  # beside other benchmarks
        or source.find("test.parquet", "test-*.parquet")
        or source.need("test.jsonl", what="test_2d and test_3d, .parquet or .jsonl with img/")
    )


def _item(source: Source, where: str, row: dict[str, Any]) -> Item | None:
    texts = {name: row[name] for name in ("type", "task", "answer", "prompt")}
    for name, value in texts.items():
        if not (isinstance(value, str) and value.strip()):
            return source.bad(where, f"expected a {name}, got {str(value)[:40]!r}")
    if row["source"] not in SOURCES:
        got = str(row["source"])[:40]
        return source.bad(where, f"expected a source of {', '.join(SOURCES)}, got {got!r}")
    words = row["choices"]
    if not (isinstance(words, list) and 2 <= len(words) <= 26):
        return source.bad(where, f"expected a list of choices, got {str(words)[:40]!r}")
    choices = dict(zip(ascii_uppercase, map(str, words), strict=False))
    label = texts["answer"].strip(" ().").upper()
    if label not in choices:
        last = list(choices)[-1]
        return source.bad(where, f'expected an answer "(A)" to "({last})", got {label[:40]!r}')
    image = source.image(where, row.get("image") or row.get("filename"))
    if image is None:
        return None
    photograph = row.get("source_filename") or row.get("filename") or image.name
    return Item(
        key=where,
        unit=f"{row['source']}/{photograph}",
        image=image,
        prompt=texts["prompt"].strip(),
        label=label,
        options=tuple(choices),
        about={
            "choices": choices,
            "source": row["source"],
            "type": texts["type"],
            "task": texts["task"],
        },
    )


def score(given: Sequence[Given], scores: Scores) -> None:
    """The accuracies of the choice items."""
    asked = [one for one in given if one.item.kind == "choice"]
    if not asked:
        return
    for field in ("source", "task"):
        for name in sorted({one.item.about[field] for one in asked}):
            part = [one for one in asked if one.item.about[field] == name]
            _accuracy(scores, f"{field}.{name.replace('.', ' ')}", part)
    if "source.ADE20K" in scores and "source.COCO" in scores:
        scores.derive("2d", lambda a, b: (a + b) / 2, "source.ADE20K", "source.COCO")
    if "source.Omni3D" in scores:
        scores.derive("3d", np.copy, "source.Omni3D")
    if "2d" in scores and "3d" in scores:
        scores.derive("accuracy", lambda a, b: (a + b) / 2, "2d", "3d")
    _accuracy(scores, "items", asked)
    scores.mean("unclear", asked, [not one.answer for one in asked])


def _accuracy(scores: Scores, name: str, asked: Sequence[Given]) -> None:
    scores.mean(name, asked, [one.answer == one.item.label for one in asked])


BENCHMARK = Benchmark(
    name="cvbench",
    about="CV-Bench: count, relation, depth and distance, by the authors' formula",
    needs="the files of https://huggingface.co/datasets/nyu-visionx/CV-Bench",
    read=read,
    parse=parsing.chosen,
    score=score,
    headline=("accuracy", "2d", "3d"),
    prompt="{question}\nAnswer with the option's letter from the given choices directly.",
)
