"""Winoground: its layouts and our own, and text, image and group score against a table by hand."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from agevlm_mlx.benchmarks.winoground import BENCHMARK
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.source import Source

EXAMPLE: dict[str, Any] = {
    "id": 0,
    "image_0": "ex_0_img_0",
    "image_1": "ex_0_img_1",
    "caption_0": "a plant on a lamp",
    "caption_1": "a lamp on a plant",
    "tag": "Noun",
    "secondary_tag": "",
    "num_main_preds": 1,
    "collapsed_tag": "Object",
}
GUESSING = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


def lines(path: Path, rows: Sequence[dict[str, Any] | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    said = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(said) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[list[Item], list[str]]:
    with Source(folder) as source:
        return BENCHMARK.read(source), source.problems


def test_the_authors_lines_and_pictures(tmp_path):
    other = {
        **EXAMPLE,
        "image_0": "ex_1_img_0",
        "image_1": "ex_1_img_1",
        "num_main_preds": 2,
        "secondary_tag": "Symbolic, Series",
    }
    lines(tmp_path / "data" / "examples.jsonl", [EXAMPLE, other])
    names = [f"ex_{n}_img_{side}.png" for n in (0, 1) for side in (0, 1)]
    pictures(tmp_path / "data" / "images", *names)
    items, problems = read(tmp_path)
    assert problems == []
    assert [item.image and item.image.name for item in items] == names
    assert [item.unit for item in items] == ["data/examples.jsonl:1"] * 2 + [
        "data/examples.jsonl:2"
    ] * 2
    assert len({item.key for item in items}) == 4
    zero, one = items[:2]
    assert zero.options == one.options == ("a plant on a lamp", "a lamp on a plant")
    assert (zero.label, one.label) == zero.options
    assert {item.kind for item in items} == {"likelihood"}
    assert {item.prompt for item in items} == {"Describe the image."}
    assert zero.about == {"side": 0, "tags": ["Object", "predicates 1"]}
    assert items[3].about == {"side": 1, "tags": ["Object", "predicates 2", "Symbolic", "Series"]}


def test_the_parquet_files_of_the_hub(tmp_path):
    pictures(tmp_path, "0.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    images = [{"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None} for n in (0, 1)]
    row = {**EXAMPLE, "image_0": images[0], "image_1": images[1]}
    (tmp_path / "hub").mkdir()
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "hub/test-00000-of-00001.parquet")
    items, problems = read(tmp_path / "hub")
    assert problems == []
    assert [item.about["side"] for item in items] == [0, 1]
    assert items[0].image != items[1].image


def test_pairs_of_ones_own(tmp_path):
    row = {"image_0": "a.jpg", "caption_0": "red on blue", "image_1": "b.jpg", "caption_1": "blue"}
    lines(tmp_path / "pairs.jsonl", [row, {**row, "tag": "colour"}])
    pictures(tmp_path, "a.jpg", "b.jpg")
    items, problems = read(tmp_path)
    assert problems == []
    assert [item.about["tags"] for item in items] == [[], [], ["colour"], ["colour"]]


def test_odd_rows_are_named_and_the_others_read(tmp_path):
    row = {"image_0": "a.png", "caption_0": "one", "image_1": "b.png", "caption_1": "two"}
    rows = [
        row,
        {**row, "caption_1": ""},
        {**row, "caption_0": None},
        {**row, "caption_0": "two "},
        {**row, "image_1": "gone.png"},
        {**row, "image_0": "broken.png"},
        {**row, "image_1": "../b.png"},
        {**row, "image_1": "a.png"},
        '{"image_0": ',
        {"image_0": "a.png"},
        row,
    ]
    lines(tmp_path / "pairs.jsonl", rows)
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "broken.png").write_bytes(b"")
    items, problems = read(tmp_path)
    assert [item.unit for item in items] == ["pairs.jsonl:1"] * 2 + ["pairs.jsonl:11"] * 2
    assert [problem.split(" ")[0] for problem in problems] == [
        f"pairs.jsonl:{line}:" for line in range(2, 11)
    ]


def test_what_is_missing_is_said(tmp_path):
    with Source(tmp_path) as source:
        assert BENCHMARK.read(source) == []
        with pytest.raises(UserError, match=r"missing: examples\.jsonl"):
            source.check(BENCHMARK.needs)


#: Scores of an example: ((s(c0, i0), s(c1, i0)), (s(c0, i1), s(c1, i1))).
Table = tuple[tuple[float, float], tuple[float, float]]


def answers(
    tables: Sequence[Table],
    blind: tuple[float, float] | None = None,
    tags: Sequence[Sequence[str]] = (),
) -> list[Given]:
    captions = ("zero", "one")
    return [
        Given(
            Item(
                key=f"{n}:{side}",
                unit=str(n),
                image=None,
                prompt="Describe the image.",
                kind="likelihood",
                label=captions[side],
                options=captions,
                about={"side": side, "tags": list(tags[n]) if tags else []},
            ),
            captions[int(np.argmax(scores))],
            scores,
            blind or (),
        )
        for n, table in enumerate(tables)
        for side, scores in enumerate(table)
    ]


def scored(given: Sequence[Given]) -> Scores:
    scores = Scores(list(dict.fromkeys(one.item.unit for one in given)))
    BENCHMARK.score(given, scores)
    return scores


# text, image and group as each example is made; worked out beside it.
BOTH: Table = ((2, 1), (1, 2))  # 2>1, 2>1; 2>1, 2>1
TEXT: Table = ((2, 1), (3, 4))  # 2>1, 4>3; but s(c0, i0) = 2 < s(c0, i1) = 3
IMAGE: Table = ((4, 5), (3, 6))  # 4<5; s(c0): 4>3, s(c1): 6>5
NONE: Table = ((1, 2), (2, 1))


def test_scores_by_hand():
    """Text 2 of 5, image 2 of 5, group 1 of 5; a tie is wrong.

    Single captions above the other: 2, 2, 1, 0 and 1 of 2 each = 6 of 10.
    """
    tie: Table = ((2, 2), (1, 2))  # text: 2 = 2; image: s(c0) 2>1, s(c1) 2 = 2
    scores = scored(answers([BOTH, TEXT, IMAGE, NONE, tie]))
    assert scores["raw.text"] == pytest.approx(2 / 5)
    assert scores["raw.image"] == pytest.approx(2 / 5)
    assert scores["raw.group"] == pytest.approx(1 / 5)
    assert scores["raw.caption"] == pytest.approx(6 / 10)
    assert "pmi.text" not in scores


def test_pmi_takes_away_what_captions_are_likely_by_themselves():
    """Without a picture: c0 -1.5, c1 0, so PMI adds 1.5 to c0.

    IMAGE becomes ((5.5, 5), (4.5, 6)): 5.5 > 5 and 6 > 4.5, its text and group are right now.
    TEXT becomes ((3.5, 1), (4.5, 4)): 4 < 4.5, its text is wrong now. Image scores stay.
    """
    scores = scored(answers([IMAGE, TEXT, BOTH], blind=(-1.5, 0)))
    assert scores["raw.text"] == pytest.approx(2 / 3)
    assert scores["raw.group"] == pytest.approx(1 / 3)
    # BOTH becomes ((3.5, 1), (2.5, 2)): 2 < 2.5, wrong.
    assert scores["pmi.text"] == pytest.approx(1 / 3)
    assert scores["pmi.group"] == pytest.approx(1 / 3)
    assert scores["pmi.image"] == scores["raw.image"] == pytest.approx(2 / 3)
    assert scores["pmi.caption"] == pytest.approx(4 / 6)


def test_tags():
    tags = [["Object", "predicates 1"], ["Object"], ["Relation"], ["v. odd"]]
    nested = scored(answers([BOTH, NONE, TEXT, IMAGE], tags=tags)).nested()["raw"]["tags"]
    assert nested["Object"] == {"text": 0.5, "image": 0.5, "group": 0.5}
    assert nested["predicates 1"] == {"text": 1, "image": 1, "group": 1}
    assert nested["Relation"] == {"text": 1, "image": 0, "group": 0}
    assert nested["v  odd"] == {"text": 0, "image": 1, "group": 0}


def test_answering_from_the_label_is_right():
    scores = scored(answers([((-0.1, -5), (-5, -0.1))] * 6, blind=(-3, -4)))
    for name in ("text", "image", "group", "caption"):
        assert scores[f"raw.{name}"] == scores[f"pmi.{name}"] == 1


def test_guessing_is_chance_within_the_interval():
    """A 95 % interval misses now and then: of 20 sets of guesses at least 17 hold it."""
    rng = np.random.default_rng(0)
    held: Counter[str] = Counter()
    for numbers in rng.normal(size=(20, 400, 2, 2)).tolist():
        tables: list[Table] = [((a, b), (c, d)) for (a, b), (c, d) in numbers]
        scores = scored(answers(tables, blind=(-1.0, -1.0)))
        for name, chance in {**GUESSING, "caption": 1 / 2}.items():
            for kind in ("raw", "pmi"):
                interval = scores.interval(f"{kind}.{name}")
                assert interval is not None
                held[f"{kind}.{name}"] += interval[0] < chance < interval[1]
    assert len(held) == 8
    assert min(held.values()) >= 17


def test_ignoring_the_picture_is_less_than_guessing():
    """Both pictures give the same scores: no strict comparison of pictures holds, and one of the
    two captions is always on top. Half of the single captions are right; by PMI all are ties."""
    rng = np.random.default_rng(3)
    given = []
    for n, (zero, one) in enumerate(rng.normal(size=(50, 2)).tolist()):
        for side in answers([((zero, one), (zero, one))], blind=(zero, one)):
            item = Item(
                key=f"{n}:{side.item.about['side']}",
                unit=str(n),
                image=None,
                prompt="?",
                kind="likelihood",
                options=side.item.options,
                about=side.item.about,
            )
            given.append(Given(item, side.answer, side.scores, side.blind))
    scores = scored(given)
    for name in GUESSING:
        assert scores[f"raw.{name}"] == scores[f"pmi.{name}"] == 0
    assert scores["raw.caption"] == 0.5
    assert scores["pmi.caption"] == 0


def test_an_example_counts_with_both_its_pictures_only():
    scores = scored(answers([BOTH, NONE, BOTH])[:-1])
    assert scores["raw.text"] == pytest.approx(1 / 2)
    scores = Scores(["0"])
    BENCHMARK.score([], scores)
    BENCHMARK.score(answers([BOTH])[:1], scores)
    assert scores.names == []
