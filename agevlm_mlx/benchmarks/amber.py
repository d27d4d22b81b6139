"""AMBER (Wang et al., 2023, arXiv 2311.07397): what a description makes up and leaves out, and
yes/no questions on what is there, what it is like and what touches what. No judge model.

Asked: 1004 pictures to describe and 14,216 questions, worded as in the published query files:
existence 4924 (the answer is always no), attribute 7628 (state 4764, number 2072, action 792) and
relation 1664. Answers are judged by annotations.json, relation.json and safe_words.txt;
metrics.txt, counters that the authors' script begins with, is not needed.

``generative``, of the nouns of a description that AMBER knows, a repeated one each time:

- ``chair``: nouns that the picture does not show / nouns; ``hal``: descriptions with such a noun;
- ``cover``: objects of the picture that are named / objects of the picture;
- ``cog``: named / all of the objects that people wrongly expect in the picture ("hallu");
- ``nouns`` and ``words`` in a description, since ``chair`` is lowered by saying little.

A noun is shown if it is annotated, or relation.json allows it for an annotated one ("street" for
"road"), or it is a safe word (counted, never wrong). The first that fits is covered: the allowed
ones of all objects come before the objects themselves, as in the authors' script.

``discriminative`` and each of its dimensions: ``accuracy``, ``precision``, ``recall`` and ``f1`` of
the answer "no" (the opposite of POPE), ``no_ratio`` of the answers, ``auroc`` where options were
scored, and ``unclear``, answers with neither or both of "yes" and "no", which are wrong.
``mean_accuracy``, of the three dimensions, is VLMEvalKit's headline. ``score`` is AMBER's own,
(100 - CHAIR + F1) / 2, up to 100; all others are shares. "no" to everything is right in all of
``existence``, and with empty descriptions it has a ``score`` of 89.9 (F1 .797, CHAIR 0, cover 0):
read it beside ``cover`` and the controls.

This is AMBER-compatible, not the authors' script, which needs NLTK and spaCy: how nouns are found
here, and how that differs, is told in `amber_nouns`. A question's answer there must be "Yes" or
"No" to the letter, here its words decide. F1 there is made of rounded percentages, here it is not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import yes_no
from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.parsing import yes_no_words
from ..evaluation.source import Source
from .amber_nouns import Nouns, is_words, judge, read_nouns

#: Types of annotations.json, as they are reported.
_DIMENSIONS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "attribute.state"),
    "discriminative-attribute-number": ("attribute", "attribute.number"),
    "discriminative-attribute-action": ("attribute", "attribute.action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}


def read(source: Source) -> list[Item]:
    """The items of query_all.json, or of the other query files where that is not there."""
    queries = source.find("query_all.json") or source.need(
        "query_generative.json",
        "query_discriminative.json",
        "query_discriminative-*.json",
        what="query_all.json",
    )
    files = [
        source.need(name, what=name)
        for name in ("annotations.json", "relation.json", "safe_words.txt")
    ]
    if not queries or not all(files):
        return []
    annotations = _annotations(source, files[0][0])
    annotated = {
        word
        for row in annotations.values()
        if row["type"] == "generative"
        for word in (*row["truth"], *row["hallu"])
    }
    nouns = read_nouns(source, files[1][0], files[2][0], annotated)
    items: dict[int, Item] = {}
    for path in queries:
        seen: set[int] = set()
        for where, row in source.rows(path, ("id", "image", "query")):
            number, query = row["id"], row["query"]
            if type(number) is not int or number not in annotations:
                source.bad(where, f"expected an id of annotations.json, got {number!r:.40}")
            elif not isinstance(query, str) or not query.strip():
                source.bad(where, f"expected a query, got {query!r:.40}")
            elif number in seen:
                source.bad(where, f"expected each id once in a file, got {number} again")
            elif number not in items:  # query_discriminative.json repeats those beside it
                image = source.image(where, row["image"], "image", "images")
                if image is not None:
                    items[number] = _item(row, image, annotations[number], nouns)
            if type(number) is int:
                seen.add(number)
    return list(items.values())


def _item(row: dict[str, Any], image: Path, annotation: dict[str, Any], nouns: Nouns) -> Item:
    key, unit, prompt = str(row["id"]), str(row["image"]), row["query"]
    if annotation["type"] == "generative":
        about = nouns.about(annotation["truth"], annotation["hallu"])
        return Item(key=key, unit=unit, image=image, prompt=prompt, kind="text", about=about)
    return Item(
        key=key,
        unit=unit,
        image=image,
        prompt=prompt,
        label=annotation["truth"],
        options=yes_no.OPTIONS,
        about={"type": annotation["type"]},
    )


def _annotations(source: Source, path: Path) -> dict[int, dict[str, Any]]:
    """Annotations by their ids; the bad ones are told and left out."""
    found: dict[int, dict[str, Any]] = {}
    for where, row in source.rows(path, ("id", "type", "truth")):
        truth = row["truth"]
        if type(row["id"]) is not int or row["id"] in found:
            source.bad(where, f"expected an id of its own, got {row['id']!r:.40}")
        elif row["type"] == "generative":
            if is_words(truth) and is_words(row.get("hallu")):
                found[row["id"]] = row
            else:
                source.bad(where, "expected lists of words, truth and hallu")
        elif str(row["type"]) not in _DIMENSIONS:
            source.bad(where, f"expected a type that AMBER has, got {row['type']!r:.40}")
        elif truth not in ("yes", "no"):
            source.bad(where, f"expected the truth yes or no, got {truth!r:.40}")
        else:
            found[row["id"]] = row
    return found


def score(given: Sequence[Given], scores: Scores) -> None:
    """The numbers of what was asked; see the module's docstring."""
    pictures = [one for one in given if one.item.kind == "text"]
    if pictures:
        _generative(pictures, scores)
    groups: dict[str, list[Given]] = {}
    for one in given:
        if one.item.kind == "choice":
            for name in ("discriminative", *_DIMENSIONS[one.item.about["type"]]):
                groups.setdefault(name, []).append(one)
    for name, members in groups.items():
        yes_no.score(name, members, scores, positive="no")
        scores.mean(f"{name}.unclear", members, [not one.answer for one in members])
    dimensions = [f"{name}.accuracy" for name in ("existence", "attribute", "relation")]
    if all(name in scores for name in dimensions):
        scores.derive("mean_accuracy", lambda *three: sum(three) / 3, *dimensions)
    if pictures and groups:
        scores.derive(
            "score",
            lambda chair, f1: 50 * (1 - chair + f1),
            "generative.chair",
            "discriminative.f1",
        )


def _generative(given: list[Given], scores: Scores) -> None:
    counts = np.array([judge(one.answer, one.item.about) for one in given])
    nouns, wrong, covered, expected = counts.T
    there, hallu = ([len(one.item.about[name]) for one in given] for name in ("truth", "hallu"))
    scores.ratio("generative.chair", given, wrong, nouns)
    scores.ratio("generative.cover", given, covered, there)
    scores.mean("generative.hal", given, wrong > 0)
    scores.ratio("generative.cog", given, expected, hallu)
    scores.mean("generative.nouns", given, nouns)
    scores.mean("generative.words", given, [len(one.answer.split()) for one in given])


BENCHMARK = Benchmark(
    name="amber",
    about="descriptions (CHAIR, cover, hal, cog) and yes/no on existence, attribute, relation",
    needs="query_all.json, annotations.json, relation.json and safe_words.txt of the folder data "
    "of https://github.com/junyangwang0410/AMBER, and the pictures AMBER_1.jpg to AMBER_1004.jpg "
    "that its README links to",
    read=read,
    score=score,
    parse=lambda item, said: said if item.kind == "text" else yes_no_words(said),
    headline=(
        "score",
        "generative.chair",
        "generative.cover",
        "generative.hal",
        "generative.cog",
        "discriminative.accuracy",
        "discriminative.f1",
        "existence.accuracy",
        "attribute.accuracy",
        "relation.accuracy",
    ),
    text_tokens=512,
)
