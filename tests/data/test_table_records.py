"""Which columns are what, and the records of a row."""

from pathlib import Path
from typing import Any

import pytest

from agevlm_mlx.data.records import CAPTION_PROMPT, Problem, Record
from agevlm_mlx.data.table_records import Columns
from agevlm_mlx.errors import UserError

IMAGE = Path("a.jpg")
CAPTIONED = [CAPTION_PROMPT, "A"]
ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog"}]


def found(row: dict[str, Any]) -> list[Record | Problem]:
    columns = Columns.of(list(row), "t.parquet")
    return list(columns.records(row, IMAGE, "t:1", "t.parquet: row 1"))


def texts(row: dict[str, Any]) -> list[list[str]]:
    """The texts of each record."""
    records = [one for one in found({"image": b"x", **row}) if isinstance(one, Record)]
    assert all(record.image == IMAGE for record in records)
    return [[turn.text for turn in record.turns] for record in records]


@pytest.mark.parametrize(
    ("names", "form", "said"),
    [
        (["image", "text"], "caption", ("text",)),
        (["Image", "Caption"], "caption", ("Caption",)),
        (["jpg", "text", "caption"], "caption", ("caption",)),
        (["image", "text", "question", "answers"], "question", ("question", "answers")),
        (["image", "question", "text"], "caption", ("text",)),
        (["images", "texts", "question", "answer"], "pairs", ("texts",)),
        (["images", "texts", "messages"], "chat", ("messages",)),
    ],
)
def test_columns_are_known_by_name(names: list[str], form: str, said: tuple[str, ...]) -> None:
    columns = Columns.of(names, "t")
    assert (columns.form, columns.said, columns.image) == (form, said, names[0])


def test_only_what_is_wanted_is_read() -> None:
    columns = Columns.of(["image", "ID", "messages", "phrases", "clip_score"], "t")
    assert columns.without_image == ["messages", "ID", "phrases"]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Yes ", "Yes"),
        (["no", "yes", "yes"], "yes"),
        (["b", "a"], "b"),
        ([{"answer": "two", "answer_id": 1}, {"answer": "2"}, {"answer": "2"}], "2"),
        ([None, " ", "last"], "last"),
    ],
)
def test_of_several_answers_the_most_frequent(answer: Any, wanted: str) -> None:
    assert texts({"question": "How many?", "answer": answer}) == [["How many?", wanted]]


def test_captions_alone_and_several() -> None:
    assert texts({"text": " A dog.\n"}) == [[CAPTION_PROMPT, "A dog."]]
    assert texts({"caption": ["A", "B"]}) == [[CAPTION_PROMPT, "A"], [CAPTION_PROMPT, "B"]]
    (first, bad, third) = found({"image": b"x", "captions": ["A", " ", "C"], "id": "k"})
    assert isinstance(first, Record)
    assert isinstance(third, Record)
    assert (first.id, first.kind, third.id) == ("k-1", "caption", "k-3")
    assert bad == Problem("t.parquet: row 1", "a message of the assistant is empty", "k-2")


def test_messages_in_parts() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [
                {"type": "image", "text": None},
                {"type": "text", "text": "What is it? "},
                {"type": "text", "text": "Say it."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        ]
    }  # fmt: skip
    assert texts(row) == [["What is it?\nSay it.", "A dog."]]


def test_llava_keys_of_a_table_that_fills_up_with_nothing() -> None:
    said = [
        {"from": "human", "value": "<image>\nHi", "role": None, "content": None},
        {"from": "gpt", "value": "Hello", "role": None, "content": None},
    ]
    assert texts({"conversations": said}) == [["Hi", "Hello"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "expected text in a message, got None"),
        ({"text": 3}, "expected text in a message, got 3"),
        ({"text": "nul \0"}, "got NUL characters"),
        ({"caption": "half \ud83d"}, "expected UTF-8 text"),
        ({"question": "Q", "answer": []}, "expected text in a message, got None"),
        ({"question": None, "answer": "A"}, "expected text in a message, got None"),
        ({"texts": None}, "expected a list of messages"),
        ({"texts": ["x"]}, "expected text in a message, got None"),
        ({"messages": "x"}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer to learn from"),
        (
            {"messages": ASKED, "phrases": [{"text": "cat"}]},
            "expected text, turn, start and end in a phrase",
        ),
    ],
)
def test_rows_that_say_nothing_of_use(row: dict[str, Any], message: str) -> None:
    try:
        (problem,) = found({"image": b"x", **row})
    except UserError as error:
        problem = Problem.of(error, "t.parquet: row 1")
    assert isinstance(problem, Problem)
    assert message in problem.problem
    assert problem.where == "t.parquet: row 1"


def test_lists_that_are_stored_turned_around() -> None:
    said = {"from": ["human", "gpt"], "value": ["<image>\nHi", "Hello"]}
    assert texts({"conversations": said}) == [["Hi", "Hello"]]
    assert texts({"texts": {"user": ["A?"], "assistant": ["B"]}}) == [["A?", "B"]]
    answers = {"answer": ["a", "b", "b"], "answer_id": [1, 2, 3]}
    assert texts({"question": "Q?", "answers": answers}) == [["Q?", "b"]]


def test_rows_of_other_splits_are_passed_over() -> None:
    assert texts({"text": "A", "split": "train"}) == [CAPTIONED]
    assert texts({"text": "A", "split": "restval"}) == [CAPTIONED]
    assert texts({"text": "A", "split": None}) == [CAPTIONED]
    assert texts({"text": "A", "split": "test"}) == texts({"text": "A", "split": "val"}) == []


def test_columns_that_name_the_picture() -> None:
    def names(**row: Any) -> tuple[str, ...]:
        (record,) = found({"image": b"x", "text": "A", **row})
        assert isinstance(record, Record)
        return record.image_names

    assert names(File_Name="a.jpg", coco_url="http://x/b.jpg") == ("a.jpg", "http://x/b.jpg")
    assert names(image_id=458752) == names(cocoid="458752") == ("000000458752",)
    assert names(id="000000033471") == ("000000033471",)
    assert names(id="7") == names(id=33471, image_id=None, filename="") == ()
