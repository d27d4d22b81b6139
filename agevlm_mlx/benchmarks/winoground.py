"""Winoground (Thrush et al., 2022, arXiv 2204.03162), and sets of pairs of one's own: two pictures
and two captions, of the same words in another order, to be matched.

With s(c, i) the score of caption c for picture i, an example is right for

- ``text`` when s(c0, i0) > s(c1, i0) and s(c1, i1) > s(c0, i1): each picture finds its caption;
- ``image`` when s(c0, i0) > s(c0, i1) and s(c1, i1) > s(c1, i0): each caption finds its picture;
- ``group`` when both.

Guessing gets 25, 25 and 16.67 %. The comparisons are strict, as published, so a model that ignores
the picture gets 0 of all three: less than guessing. ``caption`` counts each picture by itself (its
caption above the other, guessing 50 %), and is .5 for such a model unless the captions tie.

``raw``: s is the mean log-probability per token of the caption as the answer. ``pmi``: less the
same without a picture, which takes away what captions are likely by themselves. That changes
``text``; ``image`` compares the same caption and is the same by both. ``raw.tags`` and
``pmi.tags``: the examples of one tag (what is exchanged; the number of main predicates).

Read: data/examples.jsonl and its pictures, the parquet files of the hub, or ``pairs.jsonl`` of
one's own: lines {"image_0", "caption_0", "image_1", "caption_1"}, and "tag" if there is one.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.source import Source

_COLUMNS = ("image_0", "caption_0", "image_1", "caption_1")
#: Scores of an example: [picture][caption].
Table = tuple[tuple[float, ...], tuple[float, ...]]


def read(source: Source) -> list[Item]:
    """Two items an example, one a picture; rows that lack something are told to `source`."""
    tables = (
        source.find("examples.jsonl")[:1]
        or source.find("pairs.jsonl")[:1]
        or source.find("winoground/data/*.parquet")  # beside other benchmarks
        or source.need("test-*.parquet", what="examples.jsonl with its pictures, or pairs.jsonl")
    )
    items: list[Item] = []
    for path in tables:
        for where, row in source.rows(path, _COLUMNS):
            items += _items(source, where, row)
    return items


def _items(source: Source, where: str, row: dict[str, Any]) -> list[Item]:
    captions = (row["caption_0"], row["caption_1"])
    for caption in captions:
        if not (isinstance(caption, str) and caption.strip()):
            source.bad(where, f"expected a caption, got {str(caption)[:40]!r}")
            return []
    captions = (captions[0].strip(), captions[1].strip())
    if captions[0] == captions[1]:
        source.bad(where, f"expected two captions, got {captions[0][:40]!r} twice")
        return []
    images = [_image(source, where, row[name]) for name in ("image_0", "image_1")]
    if None not in images and images[0] == images[1]:
        source.bad(where, "expected two pictures, got one twice")
        return []
    return [
        Item(
            key=f"{where}:{side}",
            unit=where,
            image=image,
            prompt="Describe the image.",
            kind="likelihood",
            label=captions[side],
            options=captions,
            about={"side": side, "tags": _tags(row)},
        )
        for side, image in enumerate(images)
        if image is not None and None not in images
    ]


def _image(source: Source, where: str, value: Any) -> Path | None:
    """The authors' lines name a picture without its ending."""
    if isinstance(value, str) and value and not PurePosixPath(value).suffix:
        value += ".png"
    return source.image(where, value, "images")


def _tags(row: dict[str, Any]) -> list[str]:
    """What is exchanged (Object, Relation, Both) and what else is known; our own "tag"."""
    if "collapsed_tag" not in row:
        tags = [row.get("tag")]
    else:
        predicates = row.get("num_main_preds")
        tags = [row["collapsed_tag"], predicates and f"predicates {predicates}"]
        tags += str(row.get("secondary_tag") or "").split(",")
    return [str(tag).strip()[:40] for tag in tags if tag and str(tag).strip()]


def score(given: Sequence[Given], scores: Scores) -> None:
    """Text, image and group score, and the right captions, raw and PMI, of whole examples."""
    found: dict[str, dict[int, Given]] = defaultdict(dict)
    for one in given:
        if one.item.kind == "likelihood" and len(one.scores) == 2:
            found[one.item.unit][one.item.about["side"]] = one
    whole = [(sides[0], sides[1]) for sides in found.values() if len(sides) == 2]
    if not whole:
        return
    raw: list[Table] = [(zero.scores, one.scores) for zero, one in whole]
    _put(scores, "raw", whole, raw, raw)
    if all(len(side.blind) == 2 for pair in whole for side in pair):
        _put(scores, "pmi", whole, [(_pmi(zero), _pmi(one)) for zero, one in whole], raw)


def _pmi(one: Given) -> tuple[float, ...]:
    return tuple(s - b for s, b in zip(one.scores, one.blind, strict=True))


def _put(
    scores: Scores,
    name: str,
    whole: Sequence[tuple[Given, Given]],
    tables: Sequence[Table],
    raw: Sequence[Table],
) -> None:
    """`raw` decides ``image``: PMI takes the same from both sides, but not to the last bit."""
    firsts = [pair[0] for pair in whole]
    caption = [(i0[0] > i0[1], i1[1] > i1[0]) for i0, i1 in tables]
    image = [i0[0] > i1[0] and i1[1] > i0[1] for i0, i1 in raw]
    right = {
        "text": [all(both) for both in caption],
        "image": image,
        "group": [all(both) and pictures for both, pictures in zip(caption, image, strict=True)],
    }
    for measure, values in right.items():
        scores.mean(f"{name}.{measure}", firsts, values)
    scores.mean(f"{name}.caption", firsts, [sum(both) / 2 for both in caption])
    for tag in sorted({tag for one in firsts for tag in one.item.about["tags"]}):
        at = [n for n, one in enumerate(firsts) if tag in one.item.about["tags"]]
        for measure, values in right.items():
            title = f"{name}.tags.{tag.replace('.', ' ')}.{measure}"
            scores.mean(title, [firsts[n] for n in at], [values[n] for n in at])


BENCHMARK = Benchmark(
    name="winoground",
    about="Winoground, or pairs of one's own: two pictures and two captions to be matched",
    needs="data/examples.jsonl and the pictures (unpacked) of "
    "https://huggingface.co/datasets/facebook/winoground (after you agree to its licence), its "
    'parquet files, or pairs.jsonl with lines {"image_0", "caption_0", "image_1", "caption_1"}',
    read=read,
    score=score,
    headline=("raw.text", "raw.image", "raw.group", "pmi.text", "pmi.group"),
)
