"""RealWorldQA: parquet as published, letters and words told apart, and scores by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from agevlm_mlx.benchmarks.realworldqa import BENCHMARK
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.source import Source

LETTER = (
    "Which way does the wheel face?\n\nA. Left\nB. Straight\nC. Right\nPlease answer directly with "
    "only the letter of the correct option and nothing else."
)
WORD = "What is the speed limit?\nPlease answer directly with a single word or number."


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    (folder / "data").mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows))
    parquet.write_table(table, folder / "data" / "test-00000-of-00001.parquet")
    return folder


def picture(folder: Path, colour: str) -> dict[str, Any]:
    Image.new("RGB", (8, 8), colour).save(folder / "picture.webp")
    return {"bytes": (folder / "picture.webp").read_bytes(), "path": None}


def read(folder: Path) -> tuple[list[Item], list[str]]:
    with Source(folder) as source:
        return BENCHMARK.read(source), source.problems


def test_letters_and_words(tmp_path):
    red, blue = picture(tmp_path, "red"), picture(tmp_path, "blue")
    rows = [
        {"image": red, "question": LETTER, "answer": "C"},
        {"image": red, "question": LETTER, "answer": " b. "},
        {"image": blue, "question": WORD, "answer": "25"},
        {"image": blue, "question": "Which letter is on the sign?", "answer": "A"},
        {"image": blue, "question": "Yes or no?\n(A) Yes\n(B) No", "answer": "B"},
        {"image": blue, "question": LETTER, "answer": "Right"},
    ]
    items, problems = read(write(tmp_path / "set", rows))
    assert problems == []
    assert [item.kind for item in items] == ["choice", "choice", "text", "text", "choice", "text"]
    assert [item.label for item in items] == ["C", "B", "", "", "B", ""]
    assert items[0].options == ("A", "B", "C")
    assert items[0].about == {"choices": {"A": "Left", "B": "Straight", "C": "Right"}}
    assert items[0].prompt == LETTER
    assert items[2].about == {"answer": "25"}
    assert items[4].about == {"choices": {"A": "Yes", "B": "No"}}
    # The same picture is one unit of the bootstrap.
    assert items[0].unit == items[1].unit != items[2].unit == items[3].unit


def test_a_line_that_begins_with_a_letter_is_not_always_an_option(tmp_path):
    image = picture(tmp_path, "red")
    rows = [
        {"image": image, "question": "D. Lee's shop?\nA. Open\nB. Closed", "answer": "D"},
        {"image": image, "question": "Which row says\nA. Lee?", "answer": "A"},
        {"image": image, "question": "Which?\nA. One\nC. Three\nB. Two", "answer": "B"},
    ]
    items, problems = read(write(tmp_path / "set", rows))
    assert problems == []
    assert [item.kind for item in items] == ["text", "text", "choice"]
    assert items[2].options == ("A", "B")


def test_the_name_of_a_picture_is_its_unit_where_there_is_one(tmp_path):
    row = {
        "image": picture(tmp_path, "red"),
        "question": WORD,
        "answer": "1",
        "image_path": "0.webp",
    }
    items, _ = read(write(tmp_path / "set", [row]))
    assert items[0].unit == "0.webp"


def test_the_table_of_another_benchmark_beside_it_is_not_read(tmp_path):
    row = {"image": picture(tmp_path, "red"), "question": WORD, "answer": "1"}
    write(tmp_path / "all" / "POPE", [{"answer": "yes"}])
    write(tmp_path / "all" / "RealWorldQA", [row])
    items, problems = read(tmp_path / "all")
    assert (len(items), problems) == (1, [])


def test_odd_rows_are_named_and_the_others_read(tmp_path):
    good = picture(tmp_path, "red")
    rows = [
        {"image": good, "question": WORD, "answer": "2"},
        {"image": good, "question": WORD, "answer": "2"},
        {"image": good, "question": WORD, "answer": ""},
        {"image": good, "question": WORD, "answer": None},
        {"image": good, "question": " ", "answer": "2"},
        {"image": {"bytes": b"no picture", "path": None}, "question": WORD, "answer": "2"},
        {"image": None, "question": WORD, "answer": "2"},
    ]
    items, problems = read(write(tmp_path / "set", rows))
    assert len(items) == len({item.key for item in items}) == 2
    where = "data/test-00000-of-00001.parquet"
    assert [problem.split(" ")[0] for problem in problems] == [f"{where}:{n}:" for n in range(3, 8)]


def test_what_is_missing_is_said(tmp_path):
    with Source(tmp_path) as source:
        assert BENCHMARK.read(source) == []
        with pytest.raises(UserError, match=r"missing: data/test-\*\.parquet"):
            source.check(BENCHMARK.needs)


def letter(n: int, label: str, options: str = "ABC") -> Item:
    return Item(
        key=str(n),
        unit=str(n),
        image=None,
        prompt="?",
        label=label,
        options=tuple(options),
        about={"choices": {option: "" for option in options}},
    )


def word(n: int, answer: str) -> Item:
    return Item(
        key=str(n), unit=str(n), image=None, prompt="?", kind="text", about={"answer": answer}
    )


def scored(pairs: Sequence[tuple[Item, str]]) -> Scores:
    scores = Scores([item.unit for item, _ in pairs])
    BENCHMARK.score([Given(item, answer) for item, answer in pairs], scores)
    return scores


def test_scores_by_hand():
    """Letters: right, wrong, none, 1 of 3. Words: right with full stop, space and capital, not as
    a numeral, 2 of 3."""
    scores = scored(
        [
            (letter(0, "A"), "A"),
            (letter(1, "B"), "A"),
            (letter(2, "B"), ""),
            (word(3, "25"), "25."),
            (word(4, "downhill"), "Downhill "),
            (word(5, "2"), "two"),
        ]
    )
    assert scores["letters"] == pytest.approx(1 / 3)
    assert scores["words"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(1 / 2)
    assert scores["unclear"] == pytest.approx(1 / 3)


def test_letters_alone_are_not_called_the_accuracy_of_all():
    assert scored([(letter(0, "A"), "A")]).nested() == {"letters": 1, "unclear": 0}
    assert scored([(word(0, "25"), "")]).nested() == {"accuracy": 0, "words": 0}
    scores = Scores(["0"])
    BENCHMARK.score([], scores)
    assert scores.names == []


def test_answering_from_the_label_is_right_and_guessing_is_one_in_three():
    rng = np.random.default_rng(2)
    labels, guesses = rng.choice(list("ABC"), (2, 300)).tolist()
    items = [letter(n, label) for n, label in enumerate(labels)]
    right = scored([*((item, item.label) for item in items), (word(300, "Yes"), "yes")])
    assert (right["accuracy"], right["letters"], right["words"]) == (1, 1, 1)
    interval = scored(list(zip(items, guesses, strict=True))).interval("letters")
    assert interval is not None
    assert interval[0] < 1 / 3 < interval[1]


def test_answers_in_words():
    item = letter(0, "A")
    said = {"B": "B", "b.": "B", "The left one": "", "a car": "", "D": ""}
    assert {words: BENCHMARK.parse(item, words) for words in said} == said
