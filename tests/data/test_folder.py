"""Folders of pictures with captions beside them or in tables called metadata."""

import json
from pathlib import Path

import pytest
from PIL import Image

from agevlm_mlx.data.folder import is_folder, read_folder
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.records import CAPTION_PROMPT, Problem, Record, Turn
from agevlm_mlx.errors import UserError


def picture(path: Path, caption: str | bytes | None = None) -> Path:
    """A picture and the text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4)).save(path)
    if caption is not None:
        data = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(data)
    return path


def found(path: Path) -> tuple[list[str], list[Record]]:
    """What is said of the problems, and the records."""
    every = list(read_folder(path))
    said = [str(one.error()) for one in every if isinstance(one, Problem)]
    assert all("\n" not in one for one in said)
    return said, [one for one in every if isinstance(one, Record)]


def captions(records: list[Record]) -> dict[str, str]:
    """Id -> caption."""
    return {record.id: record.turns[1].text for record in records}


def test_texts_beside_pictures_in_all_folders(tmp_path: Path) -> None:
    picture(tmp_path / "b.jpg", "A  dog\nruns.\n")
    first = picture(tmp_path / "a.PNG", "\ufeffEin Hund im Gr\xfcnen")
    picture(tmp_path / "deep/er/c.webp", "A cat")
    picture(tmp_path / ".hidden/d.jpg", "Never seen")
    (tmp_path / "README.txt").write_text("About")
    records = read_records(tmp_path)
    assert captions(records[:]) == {
        "a.PNG": "Ein Hund im Gr\xfcnen",
        "b.jpg": "A dog runs.",
        "deep/er/c.webp": "A cat",
    }
    assert records[0] == Record(
        "a.PNG",
        first,
        (Turn("user", CAPTION_PROMPT), Turn("assistant", "Ein Hund im Gr\xfcnen")),
        (),
        "caption",
    )
    assert records.root == tmp_path


def test_of_splits_that_of_training_is_read(tmp_path: Path) -> None:
    for name in ("train/a", "test/b", "validation/c", "more/d", "more/test/e"):
        picture(tmp_path / f"{name}.jpg", name)
    assert list(captions(found(tmp_path)[1])) == ["more/d.jpg", "more/test/e.jpg", "train/a.jpg"]
    assert list(captions(found(tmp_path / "test")[1])) == ["b.jpg"]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (None, "b.jpg: expected its caption beside it, in b.txt"),
        ("", "b.txt: expected a caption, got an empty file"),
        (" \n\t", "b.txt: expected a caption, got an empty file"),
        (b"\xff\xfea", "b.txt: expected UTF-8 text, got other bytes"),
        ("nul \0", "b.txt: expected UTF-8 text, got NUL characters"),
        ("x" * (1 << 20) + "y", "b.txt: expected a caption of at most 1048576 bytes"),
    ],
)
def test_a_picture_without_a_caption_is_named(
    tmp_path: Path, caption: str | bytes | None, message: str
) -> None:
    picture(tmp_path / "a.jpg", "A dog")
    picture(tmp_path / "b.jpg", caption)
    said, records = found(tmp_path)
    assert said == [f"{tmp_path}/{message}"]
    assert list(captions(records)) == ["a.jpg"]


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", "A dog")
    picture(tmp_path / "b.jpg")
    (tmp_path / "b.txt").mkdir()
    said, records = found(tmp_path)
    # A folder is no text: the caption is missing as if it were not there.
    assert len(said) == 1
    assert "b.txt" in said[0]
    assert list(captions(records)) == ["a.jpg"]


TABLES = {
    "metadata.csv": 'file_name,text\nx/a.jpg,"A dog, brown"\nb.jpg,A cat\n',
    "metadata.tsv": "file_name\tcaption\nx/a.jpg\tA dog, brown\nb.jpg\tA cat\n",
    "metadata.jsonl": '{"file_name": "x/a.jpg", "text": "A dog, brown"}\n'
    '{"caption": "A cat", "file_name": "b.jpg"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_metadata(tmp_path: Path, name: str) -> None:
    first = picture(tmp_path / "sub/x/a.jpg")
    picture(tmp_path / "sub/b.jpg")
    (tmp_path / "sub" / name).write_text(TABLES[name])
    records = read_records(tmp_path)
    assert [r.turns[1].text for r in records] == ["A dog, brown", "A cat"]
    assert records[0].image == first
    assert records[0].kind == "caption"
    if name != "metadata.jsonl":  # given by itself it is a file of our own records
        assert [r.image for r in read_records(tmp_path / "sub" / name)] == list(records.images)


def test_tables_may_hold_questions_and_conversations(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    rows = [
        {"file_name": "a.jpg", "question": "Is there a dog?", "answer": "Yes"},
        {"file_name": "a.jpg", "messages": [
            {"role": "user", "content": "Where is the dog?"},
            {"role": "assistant", "content": "Here."}],
         "phrases": [{"text": "dog", "turn": 0, "start": 13, "end": 16, "box": [1, 1, 3, 3]}]},
        {"file_name": "a.jpg", "text": ["One", "Two"], "id": 7},
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said, records = found(tmp_path)
    assert not said
    assert [(r.id, r.turns[0].text, r.turns[1].text) for r in records] == [
        ("1", "Is there a dog?", "Yes"),
        ("2", "Where is the dog?", "Here."),
        ("7-1", CAPTION_PROMPT, "One"),
        ("7-2", CAPTION_PROMPT, "Two"),
    ]
    assert records[1].phrases[0].box == (1, 1, 3, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../a.jpg,A dog", ":2: expected an image inside"),
        ("/etc/passwd,A dog", ":2: expected an image inside"),
        (",A dog", ":2: expected a picture in 'file_name', got ''"),
        ("a.jpg, ", ":2: a message of the assistant is empty"),
        ("a.jpg", ":2: expected 2 values, got 1"),
    ],
)
def test_a_bad_row_is_named_and_left_out(tmp_path: Path, row: str, message: str) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{row}\na.jpg,A cat\n")
    said, records = found(tmp_path)
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'metadata.csv'}{message}")
    assert captions(records) == {"3": "A cat"}


def test_a_table_without_columns_of_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,label\na.jpg,3\n")
    with pytest.raises(
        UserError, match=r"metadata\.csv: expected .*caption or text; got file_name"
    ):
        read_records(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    rows = '{"file_name": "a.jpg", "label": 3}\n{"file_name": "a.jpg", "text": "A dog"}\n{"text'
    (tmp_path / "metadata.jsonl").write_text(rows)
    said, records = found(tmp_path)  # rows of JSON have columns of their own
    assert [one.partition(": ")[0] for one in said] == [
        f"{tmp_path}/metadata.jsonl:{n}" for n in (1, 3)
    ]
    assert list(captions(records).values()) == ["A dog"]


def test_a_missing_picture_of_a_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,A dog\n")
    with pytest.raises(UserError, match=r"image not found: .*a\.jpg"):
        read_records(tmp_path)


def test_what_is_no_such_folder(tmp_path: Path) -> None:
    assert not is_folder(tmp_path)
    picture(tmp_path / "a.jpg")
    assert not is_folder(tmp_path)
    picture(tmp_path / "b.jpg", "A dog")
    assert is_folder(tmp_path)


def test_names_of_columns_in_any_case(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_text("File_Name,Text\na.jpg,A dog\n")
    said, records = found(tmp_path)
    assert (said, list(captions(records).values())) == ([], ["A dog"])


def test_the_sheet_of_a_check_is_no_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", "A dog")
    picture(tmp_path / "data-check.png")
    said, records = found(tmp_path)
    assert (said, list(captions(records))) == ([], ["a.jpg"])


@pytest.mark.parametrize(("train", "other"), [("Train", "Test"), ("train2017", "val2017")])
def test_splits_by_other_names(tmp_path: Path, train: str, other: str) -> None:
    picture(tmp_path / train / "a.jpg", "A dog")
    picture(tmp_path / other / "b.jpg", "A cat")
    assert list(captions(found(tmp_path)[1])) == [f"{train}/a.jpg"]
