"""MMVP: both layouts as published, the odd rows, and pair accuracy against a table by hand."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from agevlm_mlx.benchmarks.mmvp import BENCHMARK
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.source import Source

OPEN = "(a) Open (b) Closed"
ROWS = [
    ["1", "Are the doors open or closed?", OPEN, "(a)"],
    ["2", "Are the doors open or closed?", OPEN, "(b)"],
    ["3", "How many wheels, with the spare one?", "(a) 3 (b) 4", "(b)"],
    ["4", "How many wheels, with the spare one?", "(a) 3 (b) 4", "(a)"],
]


def write(folder: Path, rows: Sequence[Sequence[str]], index: str = "lndex") -> Path:
    """The authors' folder; a picture for every row with a number."""
    (folder / "MMVP Images").mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([index, "Question", "Options", "Correct Answer"])
        table.writerows(rows)
    for number in {row[0] for row in rows if row[0].isdigit()}:
        size = (8 + int(number) % 50, 8)
        Image.new("RGB", size).save(folder / "MMVP Images" / f"{number}.jpg")
    return folder


def read(folder: Path) -> tuple[list[Item], list[str]]:
    with Source(folder) as source:
        return BENCHMARK.read(source), source.problems


@pytest.mark.parametrize("index", ["lndex", "Index"])
def test_the_authors_folder(tmp_path, index):
    items, problems = read(write(tmp_path, ROWS, index))
    assert problems == []
    assert [item.key for item in items] == ["1", "2", "3", "4"]
    assert [item.unit for item in items] == ["1", "1", "2", "2"]
    assert [item.label for item in items] == ["A", "B", "B", "A"]
    assert items[0].prompt == "Are the doors open or closed?\nA. Open\nB. Closed"
    assert items[0].options == ("A", "B")
    assert items[2].about == {"index": 3, "choices": {"A": "3", "B": "4"}}
    assert [item.image and item.image.name for item in items] == [
        "1.jpg",
        "2.jpg",
        "3.jpg",
        "4.jpg",
    ]
    assert BENCHMARK.prompt.replace("{question}", "?").endswith("given choices directly.")


def test_the_parquet_files_of_the_hub(tmp_path):
    picture = tmp_path / "one.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    rows = [
        {
            "Index": n,
            "Question": "Short or long?",
            "Options": "(a) Long (b) Short",
            "Correct Answer": answer,
            "image": {"bytes": picture.read_bytes(), "path": f"{n}.jpg"},
        }
        for n, answer in ((99, "(b)"), (100, "(a)"))
    ]
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), data / "train-00000-of-00001.parquet")
    items, problems = read(tmp_path / "hub")
    assert problems == []
    assert [(item.key, item.unit, item.label) for item in items] == [
        ("99", "50", "B"),
        ("100", "50", "A"),
    ]


def test_odd_rows_are_named_and_the_others_read(tmp_path):
    rows = [
        *ROWS[:2],
        ["2", "Again?", OPEN, "(a)"],
        ["five", "Which?", OPEN, "(a)"],
        ["6", "", OPEN, "(a)"],
        ["7", "Which?", "Open or closed", "(a)"],
        ["8", "Which?", "(a) Open (b)", "(a)"],
        ["9", "Which?", OPEN, "(c)"],
        ["10", "Which?", OPEN, ""],
        ["11", "Which?", OPEN, "(a)"],
        ["12", "Which?", OPEN, "(a)"],
        ["13", "Which?", OPEN],
        ["14", "Which?", OPEN, " (B). "],
    ]
    folder = write(tmp_path, rows)
    (folder / "MMVP Images" / "11.jpg").unlink()
    (folder / "MMVP Images" / "12.jpg").write_bytes(b"\xff\xd8 not a picture")
    items, problems = read(folder)
    assert [item.key for item in items] == ["1", "2", "14"]
    assert items[-1].label == "B"
    told = [
        "Questions.csv:4: the index 2 is there twice",
        "Questions.csv:5: expected an index",
        "Questions.csv:6: expected a question",
        "Questions.csv:7: expected options",
        "Questions.csv:8: expected options",
        'Questions.csv:9: expected the answer "(a)" or "(b)"',
        "Questions.csv:10: expected the answer",
        "Questions.csv:11: ",
        "Questions.csv:12: ",
        "Questions.csv:13: ",
    ]
    assert len(problems) == len(told)
    for problem, start in zip(sorted(problems), sorted(told), strict=True):
        assert problem.startswith(start)


def test_what_is_missing_is_said(tmp_path):
    with Source(tmp_path) as source:
        assert BENCHMARK.read(source) == []
        with pytest.raises(UserError, match=r"Questions\.csv.*\n.*missing: Questions\.csv"):
            source.check(BENCHMARK.needs)


def items_of(answers: Sequence[str]) -> list[Item]:
    """Pairs by hand: the right answers of rows 1, 2, ..."""
    return [
        Item(
            key=str(n),
            unit=str((n + 1) // 2),
            image=None,
            prompt=f"Question {(n + 1) // 2}",
            label=answer,
            options=("A", "B"),
            about={"index": n, "choices": {"A": "on", "B": "off"}},
        )
        for n, answer in enumerate(answers, 1)
    ]


def scored(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    scores = Scores(list(dict.fromkeys(item.unit for item in items)))
    BENCHMARK.score([Given(*one) for one in zip(items, answers, strict=True)], scores)
    return scores


def test_pairs_by_hand():
    """Right, right | right, wrong | wrong, none | right alone, its twin not asked.

    Pairs: 1 of the 3 whole ones. Items: 4 of 7. Unclear: 1 of 7.
    """
    scores = scored(items_of("ABBAABA"), ["A", "B", "B", "B", "B", "", "A"])
    assert scores["pair_accuracy"] == pytest.approx(1 / 3)
    assert scores["item_accuracy"] == pytest.approx(4 / 7)
    assert scores["unclear"] == pytest.approx(1 / 7)
    assert "corrected_answers" not in scores


def test_answering_from_the_label_is_right_and_one_answer_to_all_never_is():
    items = items_of("AB" * 20)
    assert scored(items, [item.label for item in items])["pair_accuracy"] == 1
    for answer in "AB":  # also what a model does that sees no picture: both prompts are the same
        scores = scored(items, [answer] * 40)
        assert (scores["pair_accuracy"], scores["item_accuracy"]) == (0, 0.5)
        assert scores.interval("pair_accuracy") == (0, 0)


def test_guessing_is_a_quarter_within_the_interval():
    items = items_of("AB" * 200)
    guesses = np.random.default_rng(0).choice(["A", "B"], 400)
    scores = scored(items, guesses.tolist())
    for name, chance in (("pair_accuracy", 0.25), ("item_accuracy", 0.5)):
        interval = scores.interval(name)
        assert interval is not None
        assert interval[0] < chance < interval[1]


@pytest.mark.parametrize(("answers", "corrected"), [("ABAB", 0), ("BABA", 4), ("ABBA", 2)])
def test_which_answers_the_files_have(answers, corrected):
    numbers = (99, 100, 279, 280)
    items = [
        Item(
            key=str(n),
            unit=str(n),
            image=None,
            prompt="?",
            label=label,
            options=("A", "B"),
            about={"index": n},
        )
        for n, label in zip(numbers, answers, strict=True)
    ]
    assert scored(items, ["A"] * 4)["corrected_answers"] == corrected


def test_without_answers_there_are_no_numbers():
    scores = Scores(["1"])
    BENCHMARK.score([], scores)
    assert scores.names == []


def test_answers_in_words():
    item = items_of("A")[0]
    said = {"A": "A", "on": "A", "The off one": "", "(b)": "B", "a lamp": "", "": ""}
    assert {words: BENCHMARK.parse(item, words) for words in said} == said
