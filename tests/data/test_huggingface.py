"""Data sets of the Hugging Face hub: parquet and saved ones, pictures that stay in them."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image
from pyarrow import parquet

from agevlm_mlx.data import columnar, image_files
from agevlm_mlx.data.columnar import Values
from agevlm_mlx.data.exclude import exclusions
from agevlm_mlx.data.huggingface import is_huggingface, read_huggingface
from agevlm_mlx.data.image import load_image
from agevlm_mlx.data.image_files import image_bytes, image_exists
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.records import CAPTION_PROMPT, Problem, Record, TextOnly, Turn
from agevlm_mlx.errors import UserError

TURN = {"from": Value("string"), "value": Value("string")}
PAIR = {"user": Value("string"), "assistant": Value("string")}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(red: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (red, 0, 0))


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    picture(red).save(buffer, "PNG")
    return buffer.getvalue()


def red(path: Path) -> int:
    """The colour of a record's picture, by which it is known."""
    pixel = load_image(image_bytes(path)).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel[0]


def made(n: int = 3, first: int = 0) -> Dataset:
    """Pictures with captions, of which each tells its number."""
    columns = {
        "image": [picture(first + i) for i in range(n)],
        "caption": [f"Picture {first + i}" for i in range(n)],
    }
    features = Features({"image": datasets.Image(), "caption": Value("string")})
    return Dataset.from_dict(columns, features=features)


def write(path: Path, dataset: Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)
    return path


def found(path: Path) -> tuple[list[str], list[Record]]:
    """What is said of the problems, and the records."""
    every = list(read_huggingface(path))
    said = [str(one.error()) for one in every if isinstance(one, Problem)]
    assert all("\n" not in one for one in said)
    return said, [one for one in every if isinstance(one, Record)]


# What is read ---------------------------------------------------------------------------------


def as_parquet(path: Path) -> Path:
    return write(path / "data" / "train-00000-of-00001.parquet", made()).parent.parent


def as_saved(path: Path) -> Path:
    made().save_to_disk(path)
    return path


def as_saved_splits(path: Path) -> Path:
    DatasetDict({"train": made(), "test": made(1, 9)}).save_to_disk(path)
    return path


@pytest.mark.parametrize("layout", [as_parquet, as_saved, as_saved_splits])
def test_pictures_stay_in_the_table(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    root = layout(tmp_path / "set")
    records = read_records(root)
    assert records.root == root
    assert [r.turns[1].text for r in records] == ["Picture 0", "Picture 1", "Picture 2"]
    assert [red(r.image) for r in records] == [0, 1, 2]
    assert records[2].image.parts[-2:] == ("2", "image")
    assert records[2].image.parent.parent.is_file()
    assert (records[1].kind, records[1].turns[0]) == ("caption", Turn("user", CAPTION_PROMPT))


def test_several_files_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "data/train-00000-of-00002.parquet", made(2))
    write(tmp_path / "data/train-00001-of-00002.parquet", made(2, 2))
    write(tmp_path / "data/validation-00000-of-00001.parquet", made(1, 7))
    _, records = found(tmp_path)
    assert [red(r.image) for r in records] == [0, 1, 2, 3]
    assert len({r.id for r in records}) == 4
    assert (
        found(tmp_path / "data/validation-00000-of-00001.parquet")[1][0].turns[1].text
        == "Picture 7"
    )
    for path in (tmp_path / "data").glob("train*"):
        path.unlink()
    with pytest.raises(UserError, match="expected the split train, got validation; pass the path"):
        found(tmp_path)


def test_folders_may_be_called_as_splits_are(tmp_path: Path) -> None:
    write(tmp_path / "test/set/0000.parquet", made(2))
    assert len(found(tmp_path / "test/set")[1]) == 2  # only what is below the path counts
    write(tmp_path / "conf/train/0000.parquet", made(1))
    write(tmp_path / "conf/test/0000.parquet", made(1))
    assert [r.id for r in found(tmp_path / "conf")[1]] == ["train/0000.parquet:1"]
    write(tmp_path / "last/dev-clean/train-0.parquet", made(1))
    write(tmp_path / "last/train-clean/test-0.parquet", made(1))
    assert [r.id for r in found(tmp_path / "last")[1]] == ["dev-clean/train-0.parquet:1"]


def test_rows_as_the_cauldron_has_them(tmp_path: Path) -> None:
    pairs = [
        [{"user": "Is there a dog?\n", "assistant": "Yes."}, {"user": "And?", "assistant": "No."}],
        [{"user": "One?", "assistant": "1"}],
        [{"user": "Two?", "assistant": "2"}],
        [],
        [{"user": "Five?", "assistant": None}],
    ]
    pictures = [[picture(n)] for n in range(5)]
    pictures[1], pictures[2] = [], [picture(1), picture(2)]
    features = Features({"images": List(datasets.Image()), "texts": [PAIR]})
    dataset = Dataset.from_dict({"images": pictures, "texts": pairs}, features=features)
    for path in (write(tmp_path / "x.parquet", dataset), tmp_path / "saved"):
        if not path.exists():
            dataset.save_to_disk(path)
        assert TextOnly() in list(read_huggingface(path))  # row 2
        said, (only,) = found(path)
        assert [turn.text for turn in only.turns] == ["Is there a dog?", "Yes.", "And?", "No."]
        assert (only.kind, red(only.image)) == ("chat", 0)
        assert [one.split(": ", 2)[1:] for one in said] == [
            ["row 3", "expected one picture in 'images', got 2"],
            ["row 4", "expected a list of messages in 'conversations'"],
            ["row 5", "expected text in a message, got None"],
        ]


def test_a_row_without_a_picture_is_named(tmp_path: Path) -> None:
    features = Features({"image": datasets.Image(), "text": Value("string")})
    columns = {"image": [picture(0), None], "text": ["A dog", "A cat"]}
    dataset = Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    for path in (write(tmp_path / "x.parquet", dataset), tmp_path / "saved"):
        (said,), (only,) = found(path)
        assert said.endswith(": row 2: expected a picture in 'image', got none")
        assert red(only.image) == 0


def table(path: Path, **columns: Any) -> Path:
    """A parquet file of plain columns."""
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_pictures_as_plain_bytes_and_as_files(tmp_path: Path) -> None:
    _, records = found(table(tmp_path / "a.parquet", jpg=[png(3), png(4)], text=["A", "B"]))
    assert [red(r.image) for r in records] == [3, 4]
    picture(5).save(tmp_path / "5.png")
    names = ["5.png", "../5.png", "", "/etc/passwd"]
    said, (only,) = found(table(tmp_path / "b.parquet", image=names, text=list("ABCD")))
    assert only.image == tmp_path / "5.png"
    assert [one.split(": ", 2)[2].partition(",")[0] for one in said] == [
        f"expected an image inside {tmp_path}",
        "expected the name of a picture",
        f"expected an image inside {tmp_path}",
    ]


def test_conversations_with_phrases(tmp_path: Path) -> None:
    said = [
        {"from": "human", "value": "<image>\nWhere is the dog?"},
        {"from": "gpt", "value": "Here"},
    ]
    phrase = {"text": "dog", "turn": 0, "start": 13, "end": 16, "box": [1.0, 1.0, 3.0, 3.5]}
    other = {"text": "Here", "turn": 1, "start": 0, "end": 4, "box": None}
    path = table(
        tmp_path / "a.parquet",
        image=[{"bytes": png(3), "path": "a.png"}],
        conversations=[said],
        phrases=[[phrase, other]],
        kind=["refer"],
        id=["x7"],
    )
    (record,) = read_records(path)
    assert (record.id, record.kind) == ("x7", "refer")
    assert record.turns == (Turn("user", "Where is the dog?"), Turn("assistant", "Here"))
    assert [(p.text, p.box) for p in record.phrases] == [("dog", (1, 1, 3, 3.5)), ("Here", None)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["A"]}, "expected a column for the picture .*; got text"),
        ({"image": [b"x"], "label": [3]}, "conversations or messages, .*; got image, label"),
        ({"image": [b"x"], "question": ["Q"]}, "question and answer, .*; got image, question"),
    ],
)
def test_tables_without_columns_of_use_say_what_is_wanted(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    path = table(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", b"PAR1 and no more", "damaged or truncated parquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        ("a.arrow", b"ARROW", "damaged or truncated arrow"),
        ("a.arrow", b"", "damaged or truncated arrow"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not image_exists(tmp_path / name / "0" / "image")
    with pytest.raises(UserError, match=message):
        image_bytes(tmp_path / name / "0" / "image")


def test_a_table_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    path = write(tmp_path / "train-0.parquet", made(40))
    made(40).save_to_disk(tmp_path / "saved")
    saved = tmp_path / "saved" / "data-00000-of-00001.arrow"
    texts = [f"Picture {n}" for n in range(3000)]
    stream = pyarrow.table({"image": [b"x"] * 3000, "text": texts}).to_batches(max_chunksize=1000)
    with pyarrow.ipc.new_stream(str(saved), stream[0].schema) as writer:
        for batch in stream:
            writer.write_batch(batch)
    saved.write_bytes(saved.read_bytes()[:-5000])
    (said,), records = found(tmp_path / "saved")
    assert len(records) == 2000
    assert said.startswith(f"{saved}: row 2001: damaged or truncated arrow: ")
    assert said.endswith("; the rest of the file is left out")
    assert len(found(path)[1]) == 40


def test_what_is_no_such_data(tmp_path: Path) -> None:
    assert not is_huggingface(tmp_path)
    (tmp_path / "a.csv").write_text("image,text\n")
    assert not is_huggingface(tmp_path)
    assert not is_huggingface(tmp_path / "a.csv")


# Single values --------------------------------------------------------------------------------


def test_a_path_into_a_table_is_only_that_where_there_is_one(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", image=[png(3)], text=["A"])
    for good, there in (
        ("0/image", True),
        ("1/image", False),
        ("0/photo", False),
        ("x/image", False),
    ):
        assert image_exists(path / good) is there
        if not there:
            with pytest.raises(UserError, match=r"no such row|cannot be read"):
                image_bytes(path / good)
    # A folder may have such a name too.
    plain = tmp_path / "b.parquet" / "0" / "image"
    plain.parent.mkdir(parents=True)
    plain.write_bytes(b"abc")
    assert image_exists(plain)
    assert image_bytes(plain) == b"abc"
    assert not image_exists(tmp_path / "none.parquet" / "0" / "image")


@pytest.mark.parametrize(
    "value", [None, b"", {"bytes": None, "path": None}, {"bytes": b"", "path": ""}]
)
def test_a_value_that_is_no_picture_is_told(tmp_path: Path, value: Any) -> None:
    full = {"bytes": b"x", "path": "x"} if isinstance(value, dict) else b"x"
    path = table(tmp_path / "a.parquet", image=[full, value])
    with pytest.raises(UserError, match=r"a\.parquet/1/image: expected a picture, got"):
        image_bytes(path / "1" / "image")


def test_a_picture_may_be_named_in_a_table_and_lie_beside_it(tmp_path: Path) -> None:
    picture(8).save(tmp_path / "8.png")
    values = [{"bytes": None, "path": name} for name in ("8.png", "../8.png")]
    path = table(tmp_path / "a.parquet", image=values)
    assert red(path / "0" / "image") == 8
    with pytest.raises(UserError, match="expected an image inside"):
        image_bytes(path / "1" / "image")


def grouped(path: Path, groups: int = 6, rows: int = 4) -> Path:
    """Values of 1000 bytes in row groups; each tells its row."""
    values = [f"{n:04}".encode() * 250 for n in range(groups * rows)]
    parquet.write_table(pyarrow.table({"image": values, "b": values}), path, row_group_size=rows)
    return path


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read from now on."""
    groups: list[int] = []
    read = columnar._Parquet.read

    def noting(self: Any, group: int, column: str) -> Any:
        groups.append(group)
        return read(self, group, column)

    monkeypatch.setattr(columnar._Parquet, "read", noting)
    return groups


def test_row_groups_are_read_once_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, groups = grouped(tmp_path / "a.parquet"), counted(monkeypatch)
    values = Values(kept_bytes=2 * 4200)  # two of them
    for row in (0, 3, 4, 7, 1, 9, 0, 23):
        assert values.get(path, row, "image") == f"{row:04}".encode() * 250
        assert values._size <= values.kept_bytes
    # 9 (group 2) drops group 1, not 0, which was asked for last; 0 is still there.
    assert groups == [0, 1, 2, 5]
    values.get(path, 4, "image")
    values.get(path, 4, "b")  # another column is another group
    assert groups == [0, 1, 2, 5, 1, 1]


def test_one_row_group_is_kept_however_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, groups = grouped(tmp_path / "a.parquet"), counted(monkeypatch)
    values = Values(kept_bytes=1)
    for row in (0, 1, 2, 5, 4):
        values.get(path, row, "image")
    assert groups == [0, 1]
    monkeypatch.setattr(columnar, "_MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"row group 3 has .* fewer rows in one"):
        values.get(path, 8, "image")


def test_a_table_written_anew_is_read_anew(tmp_path: Path) -> None:
    values, path = Values(), tmp_path / "a.parquet"
    table(path, image=[b"old"])
    assert values.get(path, 0, "image") == b"old"
    table(path, image=[b"newer", b"more"])
    assert values.get(path, 0, "image") == b"newer"
    assert values.has(path, 1, "image")
    path.unlink()
    assert not values.has(path, 0, "image")


@pytest.mark.parametrize("layout", [as_parquet, as_saved])
def test_threads_may_ask_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[[Path], Path]
) -> None:
    monkeypatch.setattr(image_files, "_VALUES", Values(kept_bytes=1))
    images = [r.image for r in read_records(layout(tmp_path / "set"))]
    wanted = [n % 3 for n in range(60)]
    start = threading.Barrier(6)

    def ask(part: int) -> list[int]:
        start.wait()
        return [red(images[n]) for n in wanted[part::6]]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    assert answers == [wanted[part::6] for part in range(6)]


def test_threads_that_want_the_same_row_group_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, groups, values = grouped(tmp_path / "a.parquet"), counted(monkeypatch), Values()
    read, start = columnar._Parquet.read, threading.Barrier(4)

    def slow(self: Any, group: int, column: str) -> Any:
        time.sleep(0.05)  # long enough for the others to ask meanwhile
        return read(self, group, column)

    monkeypatch.setattr(columnar._Parquet, "read", slow)

    def ask(row: int) -> bytes:
        start.wait()
        return values.get(path, row, "image")

    with ThreadPoolExecutor(4) as pool:
        assert [v[:4] for v in pool.map(ask, range(4))] == [b"0000", b"0001", b"0002", b"0003"]
    assert groups == [0]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("COCO_val2014_000000310196.jpg", {}),
        (None, {"file_name": ["COCO_val2014_000000310196.jpg", "b.jpg"]}),
        (None, {"image_id": [310196, 310197]}),
        (None, {"coco_url": ["http://x/val2014/000000310196.jpg", "http://x/b.jpg"]}),
    ],
)
def test_pictures_in_tables_are_excluded_by_their_names(
    tmp_path: Path, path: str | None, more: dict[str, Any]
) -> None:
    pictures = [{"bytes": png(1), "path": path}, {"bytes": png(2), "path": "x.jpg"}]
    file = table(tmp_path / "a.parquet", image=pictures, caption=["A", "B"], **more)
    records = read_records(file, exclude=exclusions(["pope"]))
    assert records.excluded == 1
    assert [red(r.image) for r in records] == [2]


def test_conversations_without_a_picture_are_counted(tmp_path: Path) -> None:
    said = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]] * 2
    pictures = [{"bytes": png(1), "path": None}, None]
    records = read_records(table(tmp_path / "a.parquet", image=pictures, conversations=said))
    assert (len(records), records.text_only) == (1, 1)


def test_files_of_an_earlier_save_are_not_read(tmp_path: Path) -> None:
    made(3).save_to_disk(tmp_path / "set", num_shards=3)
    made(2, 7).save_to_disk(tmp_path / "set", num_shards=1)
    assert len(list((tmp_path / "set").glob("*.arrow"))) == 4
    assert [red(r.image) for r in found(tmp_path / "set")[1]] == [7, 8]
    state = tmp_path / "set" / "state.json"
    for names, message in (
        ('[{"filename": "../x.arrow"}]', "expected names of files"),
        ('[{"filename": "gone.arrow"}]', "gone.arrow is missing"),
    ):
        state.write_text(f'{{"_data_files": {names}}}')
        with pytest.raises(UserError, match=message):
            found(tmp_path / "set")
    state.write_text("{}")
    assert len(found(tmp_path / "set")[1]) == 5


def test_splits_are_known_in_any_case(tmp_path: Path) -> None:
    write(tmp_path / "data/TEST-00000-of-00001.parquet", made(1))
    with pytest.raises(UserError, match="expected the split train, got test; pass the path"):
        found(tmp_path)
    write(tmp_path / "data/Training-00000-of-00001.parquet", made(2))
    assert len(found(tmp_path)[1]) == 2
