"""POPE: its files as published, its parse rule, and its numbers against tables made by hand."""

import json
from collections import Counter
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.benchmarks import benchmark
from agevlm_mlx.benchmarks.pope import BENCHMARK, SPLITS
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import yes_no
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.source import Source
from tests.suite import fakes


def row(number: int, image: str, thing: str, label: str) -> dict[str, Any]:
    return {
        "question_id": number,
        "image": image,
        "text": f"Is there a {thing} in the image?",
        "label": label,
    }


IMAGES = [f"COCO_val2014_{n:012}.jpg" for n in (42, 139)]
ROWS = [
    row(1, IMAGES[0], "dog", "yes"),
    row(2, IMAGES[0], "car", "no"),
    row(3, IMAGES[1], "cat", "yes"),
    row(4, IMAGES[1], "car", "no"),
]


def write_images(folder: Path, names: list[str] = IMAGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 6)).save(folder / name)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """COCO's three files as JSON lines, and one of GQA's as an indented array."""
    write_images(tmp_path / "val2014")
    write_images(tmp_path / "gqa", ["2405722.jpg"])
    (tmp_path / "coco").mkdir()
    for split in SPLITS:
        (tmp_path / "coco" / f"coco_pope_{split}.json").write_text(lines(ROWS))
    gqa = [row(1, "2405722.jpg", "bird", "yes"), row(2, "2405722.jpg", "key", "no")]
    seem = tmp_path / "gqa_pope_seem_adversarial.json"
    seem.write_text(json.dumps(gqa, indent=4))
    return tmp_path


read = partial(fakes.read, BENCHMARK)


def test_it_is_listed():
    assert benchmark("pope") is BENCHMARK


def test_the_files_as_published(published: Path):
    items, _ = read(published)
    assert len(items) == 14
    assert len({item.key for item in items}) == 14  # question_id starts anew in every file
    first = items[0]
    assert (first.key, first.unit) == ("coco/coco_pope_random.json:1", IMAGES[0])
    assert first.image == published / "val2014" / IMAGES[0]
    assert first.prompt == "Is there a dog in the image?"
    assert (first.kind, first.label, first.options) == ("choice", "yes", ("yes", "no"))
    assert first.about == {"source": "coco", "split": "random"}
    last = items[-1]
    assert last.about == {"source": "gqa", "split": "adversarial"}
    assert (last.label, last.unit) == ("no", "2405722.jpg")
    assert last.key == "gqa_pope_seem_adversarial.json:8"
    assert last.image == published / "gqa" / "2405722.jpg"


def test_the_order_of_files_and_images_is_the_same_in_every_run(published: Path):
    assert [item.key for item in read(published)[0]] == [item.key for item in read(published)[0]]


def picture(shade: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def mirror(rows: list[dict[str, Any]]) -> datasets.Dataset:
    features = {
        name: datasets.Value("string")
        for name in ("id", "question_id", "question", "answer", "image_source", "category")
    }
    return datasets.Dataset.from_list(
        rows, features=datasets.Features(**features, image=datasets.Image())
    )


MIRRORED = [
    {
        "id": str(n),
        "question_id": str(n % 2 + 1),
        "question": f"Is there a {thing} in the image?",
        "answer": "yes" if n % 2 == 0 else "no",
        "image_source": "COCO_val2014_000000000042",
        "image": {"bytes": picture(1), "path": None},
        "category": split,
    }
    for n, (split, thing) in enumerate(
        (split, thing) for split in ("adversarial", "popular", "random") for thing in ("dog", "car")
    )
]


def check_mirrored(folder: Path) -> None:
    with Source(folder) as source:
        items = BENCHMARK.read(source)
        source.check(BENCHMARK.needs)
        assert len({item.image for item in items}) == 1
        assert items[0].image is not None
        assert items[0].image.read_bytes() == picture(1)
    assert {item.unit for item in items} == {"COCO_val2014_000000000042"}
    assert sorted((item.about["split"], item.label) for item in items) == [
        (split, label) for split in sorted(SPLITS) for label in ("no", "yes")
    ]
    assert len({item.key for item in items}) == 6


def test_the_hubs_parquet(tmp_path: Path):
    """One table of all splits, and the same in tables of their own, are read once."""
    (tmp_path / "data").mkdir()
    (tmp_path / "Full").mkdir()
    mirror(MIRRORED).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    for split in SPLITS:
        mine = mirror([one for one in MIRRORED if one["category"] == split])
        mine.to_parquet(tmp_path / "Full" / f"{split}-00000-of-00001.parquet")
    check_mirrored(tmp_path)
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    check_mirrored(tmp_path)


def test_beside_another_benchmarks_parquet(tmp_path: Path):
    for name in ("POPE", "MME"):
        (tmp_path / name / "data").mkdir(parents=True)
    mirror(MIRRORED).to_parquet(tmp_path / "POPE" / "data" / "test-00000-of-00001.parquet")
    other = tmp_path / "MME" / "data" / "test-00000-of-00001.parquet"
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(other)
    check_mirrored(tmp_path)


def test_saved_to_disk(tmp_path: Path):
    mirror(MIRRORED).save_to_disk(tmp_path / "whole")
    check_mirrored(tmp_path / "whole")
    splits = datasets.DatasetDict()
    for split in SPLITS:
        splits[split] = mirror([one for one in MIRRORED if one["category"] == split])
    splits.save_to_disk(tmp_path / "splits")
    check_mirrored(tmp_path / "splits")


# --- what is wrong with a file ---------------------------------------------------------------


def test_bad_rows(published: Path):
    (published / "val2014" / "broken.jpg").write_bytes(b"no image")
    rows = [
        *ROWS,
        ROWS[0],  # a repeated row, with a repeated id, is asked again
        row(6, "gone.jpg", "dog", "yes"),
        row(7, "broken.jpg", "dog", "yes"),
        row(8, IMAGES[0], "dog", "maybe"),
        row(9, IMAGES[0], "dog", "NO"),
        {"question_id": 10, "image": IMAGES[0], "text": "", "label": "yes"},
        {"question_id": 11, "image": IMAGES[0], "label": "yes"},
        row(12, "../secret.jpg", "dog", "yes"),
        {"question_id": 13, "image": 13, "text": "Is it?", "label": "yes"},
        {"question_id": 14, "image": IMAGES[0], "text": ["Is it?"], "label": True},
    ]
    path = published / "coco" / "coco_pope_random.json"
    path.write_text(lines(rows) + '{"question_id": 15,\n')
    with pytest.raises(UserError) as caught:
        read(published)
    assert "9 rows cannot be used; --skip-bad leaves them out" in str(caught.value)
    assert "images of 1 rows are missing; expected the .json files" in str(caught.value)
    items, problems = read(published, skip_bad=True)
    mine = [item for item in items if item.about["split"] == "random"]
    assert [item.key.rpartition(":")[2] for item in mine] == ["1", "2", "3", "4", "5", "9"]
    assert mine[-1].label == "no"
    where = "coco/coco_pope_random.json:"
    for problem, (line, said) in zip(
        problems,
        {
            6: "no image 'gone.jpg'",
            7: "the image val2014/broken.jpg: not an image",
            8: "expected yes or no in 'label', got 'maybe'",
            10: "expected a question in 'text', got ''",
            11: "expected image, text, label, got question_id, image, label",
            12: "expected the name of an image in the folder, got '../secret.jpg'",
            13: "expected an image, got '13'",
            14: "expected a question in 'text', got ['Is it?']",
            15: "malformed JSON",
        }.items(),
        strict=True,
    ):
        assert problem.startswith(f"{where}{line}: {said}")


def test_nothing_there(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    said = str(caught.value)
    assert "https://github.com/AoiDragon/POPE" in said
    assert "missing: any of coco_pope_adversarial.json, gqa_pope_seem_adversarial.json" in said


def test_a_file_that_is_there_twice(published: Path):
    (published / "again").mkdir()
    (published / "again" / "coco_pope_random.json").write_text(lines(ROWS))
    items, problems = read(published, skip_bad=True)
    assert len(items) == 14
    assert problems == [
        "coco/coco_pope_random.json: expected coco_pope_random once in the folder, got another"
    ]


def test_a_mirror_with_another_benchmarks_rows(tmp_path: Path):
    mirror([{**MIRRORED[0], "category": "OCR"}]).to_parquet(tmp_path / "test-0.parquet")
    with pytest.raises(UserError, match="expected a category of POPE, got 'OCR'"):
        read(tmp_path)


# --- the parse rule and the numbers ----------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("No.", "no"),
        ("no, there is none", "no"),
        ("There is not a dog", "no"),
        # The official rule, to the letter: these are yes.
        ("NO", "yes"),
        ("Nope", "yes"),
        ("no\n", "yes"),
        ("", "yes"),
        ("Not a dog", "yes"),
        ("I see a cat. There is no dog", "yes"),
    ],
)
def test_the_parse_rule(said: str, means: str):
    item = Item(key="1", unit="1", image=None, prompt="", options=yes_no.OPTIONS, label="no")
    assert BENCHMARK.parse(item, said) == means


def answered(source: str, split: str, table: list[tuple[str, str, str]]) -> list[Given]:
    """Given answers, of (unit, label, answer)."""
    return [
        Given(
            Item(
                key=f"{split}:{n}",
                unit=unit,
                image=None,
                prompt="",
                label=label,
                options=yes_no.OPTIONS,
                about={"source": source, "split": split},
            ),
            answer,
        )
        for n, (unit, label, answer) in enumerate(table)
    ]


def scored(given: list[Given]) -> Scores:
    scores = Scores(sorted({one.item.unit for one in given}))
    BENCHMARK.score(given, scores)
    return scores


TABLES = {
    # TP 2, FN 1, FP 1, TN 2; one "no" unanswered
    "random": [
        ("a", "yes", "yes"),
        ("a", "yes", "yes"),
        ("a", "yes", "no"),
        ("b", "no", "yes"),
        ("b", "no", "no"),
        ("b", "no", "no"),
        ("b", "no", ""),
    ],
    # TP 1, FN 1, FP 0, TN 2
    "popular": [
        ("a", "yes", "yes"),
        ("a", "yes", "no"),
        ("b", "no", "no"),
        ("b", "no", "no"),
    ],
    # TP 2, FP 2: always yes
    "adversarial": [
        ("a", "yes", "yes"),
        ("a", "yes", "yes"),
        ("b", "no", "yes"),
        ("b", "no", "yes"),
    ],
}


def test_scores_by_hand(few):
    given = [one for split, table in TABLES.items() for one in answered("coco", split, table)]
    found = scored(given)
    expected = {
        "random": (4 / 7, 2 / 3, 2 / 3, 2 / 3, 3 / 7),
        "popular": (3 / 4, 1.0, 1 / 2, 2 / 3, 1 / 4),
        "adversarial": (1 / 2, 1 / 2, 1.0, 2 / 3, 1.0),
    }
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    for split, values in expected.items():
        assert [found[f"coco.{split}.{name}"] for name in names] == pytest.approx(values)
    means = [float(np.mean(column)) for column in zip(*expected.values(), strict=True)]
    assert [found[f"coco.mean.{name}"] for name in names] == pytest.approx(means)
    assert found["coco.mean.accuracy"] == pytest.approx((4 / 7 + 3 / 4 + 1 / 2) / 3)
    low, high = found.interval("coco.mean.accuracy") or (1, 0)
    assert low <= found["coco.mean.accuracy"] <= high
    assert set(found.nested()) == {"coco"}


def test_scores_are_those_of_the_official_counts():
    rng = np.random.default_rng(0)
    table = [
        (str(n // 6), *("yes" if one else "no" for one in rng.random(2) < 0.5)) for n in range(300)
    ]
    found = scored(answered("gqa", "popular", table))
    counts = Counter((said, label) for _, label, said in table)
    TP, FP = counts["yes", "yes"], counts["yes", "no"]
    TN, FN = counts["no", "no"], counts["no", "yes"]
    precision, recall = TP / (TP + FP), TP / (TP + FN)
    official = {
        "accuracy": (TP + TN) / 300,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": (TP + FP) / 300,
    }
    for name, value in official.items():
        assert found[f"gqa.popular.{name}"] == pytest.approx(value)


def test_means_are_of_whole_sources_only():
    given = answered("coco", "random", TABLES["random"])
    given += [one for split, table in TABLES.items() for one in answered("aokvqa", split, table)]
    found = scored(given)
    assert "coco.mean.f1" not in found
    assert found["aokvqa.mean.f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("yes", (0.5, 0.5, 1.0, 2 / 3, 1.0)), ("no", (0.5, 0.0, 0.0, 0.0, 0.0))],
)
def test_constant_answers(answer: str, expected: tuple[float, ...]):
    """The published reference: always yes has accuracy .5, F1 .667, yes_ratio 1."""
    table = [(str(n // 6), ("yes", "no")[n % 2], answer) for n in range(60)]
    found = scored(answered("coco", "adversarial", table))
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert [found[f"coco.adversarial.{name}"] for name in names] == pytest.approx(expected)
    right = scored(answered("coco", "random", [(unit, label, label) for unit, label, _ in table]))
    assert [right[f"coco.random.{name}"] for name in names] == pytest.approx([1, 1, 1, 1, 0.5])


def test_auroc_of_scores():
    """By hand: margins of yes 2, 0; of no -1, 0: pairs won 1, 1, 1, 0.5 of 4."""
    given = [
        Given(one.item, "yes", scores)
        for one, scores in zip(
            answered("coco", "random", TABLES["adversarial"]),
            [(-1.0, -3.0), (-2.0, -2.0), (-2.0, -1.0), (-4.0, -4.0)],
            strict=True,
        )
    ]
    assert scored(given)["coco.random.auroc"] == pytest.approx(3.5 / 4)


def test_no_answers():
    scores = Scores(["a picture"])
    BENCHMARK.score([], scores)
    assert not scores.names


def test_headline_names_are_scores():
    given = [
        one
        for source in ("coco", "gqa", "aokvqa")
        for split, table in TABLES.items()
        for one in answered(source, split, table)
    ]
    assert set(BENCHMARK.headline) <= set(scored(given).names)
