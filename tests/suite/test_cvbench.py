"""CV-Bench: parquet and JSON lines as published, the odd rows, and the authors' formula by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from agevlm_mlx.benchmarks.cvbench import BENCHMARK
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.source import Source

COUNT: dict[str, Any] = {
    "idx": 0,
    "type": "2D",
    "task": "Count",
    "question": "How many cups are in the image?",
    "choices": ["3", "2", "1", "0"],
    "answer": "(C)",
    "prompt": "How many cups are in the image? Select from the following choices.\n(A) 3\n(B) 2\n"
    "(C) 1\n(D) 0",
    "filename": "img/2D/count/ade20k_0.png",
    "source": "ADE20K",
    "source_dataset": "ADE20K Validation Set",
    "source_filename": "ADE_val_00000001.jpg",
}
DEPTH: dict[str, Any] = {
    **COUNT,
    "idx": 1438,
    "type": "3D",
    "task": "Depth",
    "choices": ["cup", "chair"],
    "answer": "(A)",
    "filename": "img/3D/depth/omni3d_0.png",
    "source": "Omni3D",
    "source_filename": None,
}


def write_lines(folder: Path, name: str, rows: Sequence[dict[str, Any] | str]) -> None:
    with (folder / name).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
            if isinstance(row, dict) and isinstance(row.get("filename"), str):
                (folder / row["filename"]).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(folder / row["filename"])


def write_parquet(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    picture = folder / "picture.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    image = {"bytes": picture.read_bytes(), "path": "picture.png"}
    parquet.write_table(
        pa.Table.from_pylist([{**row, "image": image} for row in rows]), folder / name
    )


def read(folder: Path) -> tuple[list[Item], list[str]]:
    with Source(folder) as source:
        return BENCHMARK.read(source), source.problems


def test_json_lines_and_their_pictures(tmp_path):
    write_lines(tmp_path, "test_2d.jsonl", [COUNT])
    write_lines(tmp_path, "test_3d.jsonl", [DEPTH])
    items, problems = read(tmp_path)
    assert problems == []
    count, depth = items
    assert (count.label, count.options, count.prompt) == (
        "C",
        ("A", "B", "C", "D"),
        COUNT["prompt"],
    )
    assert count.unit == "ADE20K/ADE_val_00000001.jpg"
    assert count.image == tmp_path / "img/2D/count/ade20k_0.png"
    assert count.about["choices"] == {"A": "3", "B": "2", "C": "1", "D": "0"}
    assert (depth.label, depth.options) == ("A", ("A", "B"))
    assert depth.unit == "Omni3D/img/3D/depth/omni3d_0.png"
    assert (depth.about["type"], depth.about["task"]) == ("3D", "Depth")


def test_parquet_files_come_before_json_lines_and_nothing_is_read_twice(tmp_path):
    write_lines(tmp_path, "test_2d.jsonl", [COUNT, COUNT, COUNT])
    write_parquet(tmp_path, "test_2d.parquet", [COUNT, {**COUNT, "source": "COCO"}])
    write_lines(tmp_path, "test_3d.jsonl", [DEPTH])
    items, problems = read(tmp_path)
    assert problems == []
    assert [item.about["source"] for item in items] == ["ADE20K", "COCO", "Omni3D"]
    assert len({item.key for item in items}) == 3


def test_the_one_file_of_before(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data", "test-00000-of-00001.parquet", [COUNT, DEPTH])
    items, problems = read(tmp_path)
    assert problems == []
    assert [item.about["task"] for item in items] == ["Count", "Depth"]


def test_odd_rows_are_named_and_the_others_read(tmp_path):
    rows = [
        COUNT,
        COUNT,
        {**COUNT, "answer": "(E)"},
        {**COUNT, "answer": ""},
        {**COUNT, "choices": "3, 2"},
        {**COUNT, "choices": ["3"]},
        {**COUNT, "source": "KITTI"},
        {**COUNT, "prompt": None},
        {**COUNT, "task": 3},
        '{"idx": 9,',
        "[]",
        {**COUNT, "filename": "img/2D/count/gone.png"},
        {**COUNT, "filename": "img/2D/count/broken.png"},
        {**COUNT, "answer": "b"},
        {key: value for key, value in COUNT.items() if key != "source"},
    ]
    write_lines(tmp_path, "test_2d.jsonl", rows)
    (tmp_path / "img/2D/count/gone.png").unlink()
    (tmp_path / "img/2D/count/broken.png").write_bytes(b"\x89PNG")
    items, problems = read(tmp_path)
    assert [item.key for item in items] == [f"test_2d.jsonl:{line}" for line in (1, 2, 14)]
    assert items[-1].label == "B"
    told = [f"test_2d.jsonl:{line}:" for line in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15)]
    assert [problem.split(" ")[0] for problem in problems] == told


def test_what_is_missing_is_said(tmp_path):
    with Source(tmp_path) as source:
        assert BENCHMARK.read(source) == []
        with pytest.raises(UserError, match=r"missing: test_2d and test_3d"):
            source.check(BENCHMARK.needs)


def items_of(table: Sequence[tuple[str, str, str]], options: str = "AB") -> list[Item]:
    """Questions by hand: their source, their task and the right answer."""
    return [
        Item(
            key=str(n),
            unit=str(n),
            image=None,
            prompt="?",
            label=label,
            options=tuple(options),
            about={"source": source, "task": task, "choices": {o: "" for o in options}},
        )
        for n, (source, task, label) in enumerate(table)
    ]


def scored(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    scores = Scores([item.unit for item in items])
    BENCHMARK.score([Given(*one) for one in zip(items, answers, strict=True)], scores)
    return scores


ADE, COCO, OMNI = ("ADE20K", "Count", "A"), ("COCO", "Relation", "B"), ("Omni3D", "Depth", "A")


def test_the_formula_by_hand(few):
    """ADE20K 1 of 4, COCO 1 of 2, Omni3D 2 of 3, one answer without an option.

    2D (1/4 + 1/2) / 2 = 3/8; all (3/8 + 2/3) / 2 = 25/48. By questions it is 4/9.
    """
    far = ("Omni3D", "Distance", "A")
    items = items_of([ADE, ADE, ADE, ADE, COCO, COCO, OMNI, OMNI, far])
    scores = scored(items, ["A", "B", "B", "", "B", "A", "A", "B", "A"])
    assert scores["source.ADE20K"] == pytest.approx(1 / 4)
    assert scores["source.COCO"] == pytest.approx(1 / 2)
    assert scores["2d"] == pytest.approx(3 / 8)
    assert scores["3d"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(25 / 48)
    assert scores["items"] == pytest.approx(4 / 9)
    assert scores["unclear"] == pytest.approx(1 / 9)
    assert scores["task.Depth"] == pytest.approx(1 / 2)
    assert scores["task.Distance"] == 1
    interval = scores.interval("accuracy")
    assert interval is not None
    assert interval[0] < scores["accuracy"] < interval[1]


def test_without_a_source_there_is_no_formula():
    assert "accuracy" not in scored(items_of([ADE, COCO]), ["A", "B"])
    half = scored(items_of([ADE, OMNI]), ["A", "B"])
    assert "2d" not in half
    assert half["3d"] == 0
    scores = Scores(["0"])
    BENCHMARK.score([], scores)
    assert scores.names == []


def test_answering_from_the_label_is_right():
    items = items_of([ADE, COCO, OMNI] * 5)
    assert scored(items, [item.label for item in items])["accuracy"] == 1


def test_guessing_is_one_in_four_within_the_interval():
    rng = np.random.default_rng(1)
    labels, guesses = rng.choice(list("ABCD"), (2, 400)).tolist()
    sources = [ADE, COCO, OMNI, OMNI] * 100
    table = [
        (source, task, label) for (source, task, _), label in zip(sources, labels, strict=True)
    ]
    interval = scored(items_of(table, "ABCD"), guesses).interval("accuracy")
    assert interval is not None
    assert interval[0] < 0.25 < interval[1]


def test_answers_in_words():
    item = items_of([ADE])[0]
    said = {"(A)": "A", "The cup": "", "A bed": "", "The answer is (B)": "B", "C": ""}
    assert {words: BENCHMARK.parse(item, words) for words in said} == said
