"""A benchmark's files: found, read, and every fault of theirs told with its place."""

import base64
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
from PIL import Image
from pyarrow import parquet

from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.source import Source


def picture(shade: int = 0, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def read(folder: Path, name: str, columns: tuple[str, ...] = ()) -> tuple[list, list[str]]:
    """The rows of a file, each with its place, and the problems."""
    source = Source(folder)
    (path,) = source.find(name)
    return list(source.rows(path, columns)), source.problems


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    def put(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        path.write_bytes(content)
        return path

    return put


# --- files -----------------------------------------------------------------------------------


def test_find(tmp_path: Path, write):
    for name in ("b.json", "coco/a.json", "data/test-1.parquet", "x/data/test-0.parquet"):
        write(name, "")
    for name in (".cache/huggingface/c.json", "__MACOSX/d.json", "coco/._a.json"):
        write(name, "")
    source = Source(tmp_path)

    def found(*patterns: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in source.find(*patterns)]

    assert found("*.json") == ["b.json", "coco/a.json"]
    assert found("coco/*.json", "*.json") == ["coco/a.json", "b.json"]
    assert found("data/test-*.parquet") == ["data/test-1.parquet", "x/data/test-0.parquet"]
    assert found("*.csv") == []
    assert found("../*.json") == []


def test_what_is_missing_is_listed(tmp_path: Path, write):
    write("a.json", [])
    source = Source(tmp_path)
    assert source.need("a.json", what="a.json") == [tmp_path / "a.json"]
    for name in ("b.json", "val2014", "b.json"):
        assert source.need(name, what=name) == []
    with pytest.raises(UserError) as caught:
        source.check("the files of X, from https://x.org")
    assert str(caught.value) == (
        f"{tmp_path}: expected the files of X, from https://x.org\n"
        "  missing: b.json\n  missing: val2014"
    )


def test_bad_rows_are_listed_unless_they_are_skipped(tmp_path: Path):
    for skip in (False, True):
        source = Source(tmp_path, skip_bad=skip)
        source.check("nothing")
        for n in range(25):
            source.bad(f"a.json:{n}", "expected\x1b[31m a label,\ngot \ud800")
        if skip:
            source.check("nothing")
        assert source.problems[24] == "a.json:24: expected\ufffd[31m a label, got \ufffd"
    source._skip_bad = False
    with pytest.raises(UserError) as caught:
        source.check("nothing")
    first, *listed = str(caught.value).splitlines()
    assert first == f"{tmp_path}: 25 rows cannot be used; --skip-bad leaves them out"
    assert listed[19].startswith("  a.json:19: ")
    assert listed[20:] == ["  and 5 more"]


def test_where_missing_images_are_from_is_said(tmp_path: Path):
    source = Source(tmp_path)
    for n in range(2):
        assert source.image(f"a.json:{n}", f"{n}.png") is None
    source.bad("a.json:3", "expected a label")
    with pytest.raises(UserError) as caught:
        source.check("the pictures of https://x.org")
    assert str(caught.value).splitlines()[1:] == [
        "  a.json:0: no image '0.png'",
        "  a.json:1: no image '1.png'",
        "  a.json:3: expected a label",
        "  images of 2 rows are missing; expected the pictures of https://x.org",
    ]


@pytest.mark.parametrize(
    ("name", "got"),
    [("no", "nothing there"), ("file", "a file"), ("x" * 5000, "File name too long")],
)
def test_no_folder(tmp_path: Path, name: str, got: str):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"expected a folder with a benchmark's files, got {got}"):
        Source(tmp_path / name)


def test_links_are_followed_once_and_names_do_not_lead_out(tmp_path: Path, write):
    write("outside/more.json", [{"a": 1}])
    write("outside/1.png", picture())
    inside = write("data/own.json", [{"a": 1}]).parent
    (inside / "images").symlink_to("../outside")
    (inside / "images" / "again").symlink_to("../data")  # a circle
    (inside / "same").symlink_to("../outside")
    (inside / "root").symlink_to("/")
    (inside / "up").symlink_to("..")
    (inside / "2.png").symlink_to("../outside/1.png")
    (inside / "loop.json").symlink_to("loop.json")
    (inside / "nowhere.json").symlink_to("gone.json")
    source = Source(inside)
    assert [source.folder / path for path in source.find("*.json")] == [
        inside / "images" / "more.json",
        inside / "own.json",
    ]
    for name in ("images/1.png", "2.png", "1.png"):
        found = source.image("x:1", name)
        assert found is not None
        assert found.resolve() == tmp_path / "outside" / "1.png"
    assert source.image("x:1", "../outside/1.png") is None
    assert source.problems == [
        "x:1: expected the name of an image in the folder, got '../outside/1.png'"
    ]


def test_the_hubs_cache_is_links_to_its_blobs(tmp_path: Path, write):
    write("datasets--org--name/blobs/abc", [{"a": 1}])
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / "1234"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "test.json").symlink_to("../../../blobs/abc")
    rows, problems = read(snapshot, "test.json")
    assert rows == [("data/test.json:1", {"a": 1})]
    assert not problems


def test_a_pipe_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "a.json")
    os.mkfifo(tmp_path / "a.png")
    source = Source(tmp_path)
    assert source.find("*.json") == []
    assert source.image("x:1", "a.png") is None


# --- text tables -----------------------------------------------------------------------------


def test_json_lines(tmp_path: Path, write):
    write(
        "a.json",
        '\ufeff{"a": 1}\r\n'
        "\n"
        '{"a": 2, }\n'
        '["a"]\n'
        '{"b": 3}\n'
        '{"a": "x\u2028y"}\n'
        '{"a": "\\ud83d\\ude00"}\n'
        '{"a": "\\ud83d"}\n'
        '{"a": ' + "9" * 5000 + "}\n" + "[" * 100_000 + "\n"
        '{"a": "\0"}\n'
        '{"a": 7}',
    )
    rows, problems = read(tmp_path, "a.json", ("a",))
    assert rows == [
        ("a.json:1", {"a": 1}),
        ("a.json:6", {"a": "x\u2028y"}),
        ("a.json:7", {"a": "\U0001f600"}),
        ("a.json:12", {"a": 7}),
    ]
    assert [problem.split(":")[1] for problem in problems] == ["3", "4", "5", "8", "9", "10", "11"]
    assert problems[0].startswith("a.json:3: malformed JSON: ")
    assert problems[1] == "a.json:4: expected an object, got \"['a']\""
    assert problems[2] == "a.json:5: expected a, got b"
    assert problems[6] == "a.json:11: expected UTF-8 text, got NUL characters"


def test_a_json_array(tmp_path: Path, write):
    write(
        "a.json", '\n [{"a": 1},\r\n  {"a":\n 2}, 3,\n\n{"b": 4}, {"a": "\\udc00"}, {"a": 5}\n]\n'
    )
    rows, problems = read(tmp_path, "a.json", ("a",))
    assert rows == [("a.json:2", {"a": 1}), ("a.json:3", {"a": 2}), ("a.json:6 row 6", {"a": 5})]
    assert problems == [
        "a.json:4: expected an object, got '3'",
        "a.json:6: expected a, got b",
        "a.json:6 row 5: expected UTF-8 text, got other bytes",
    ]


@pytest.mark.parametrize("rest", ['{"a": 2', '{"a": 2} {"a": 3}]', '{"a": 2},]', "", "[" * 99_999])
def test_a_broken_array_gives_what_is_before_the_fault(tmp_path: Path, write, rest: str):
    write("a.json", '[\n{"a": 1},\n' + rest)
    rows, problems = read(tmp_path, "a.json")
    assert rows[0] == ("a.json:2", {"a": 1})
    assert len(problems) == 1
    assert problems[0].startswith("a.json:3")
    assert ": malformed JSON: " in problems[0]
    assert problems[0].endswith("; the rest of the file is left out")


def test_an_array_in_one_line(tmp_path: Path, write):
    write("a.json", json.dumps([{"a": n} for n in range(3)])[:-1] + ", oops]")
    rows, problems = read(tmp_path, "a.json")
    assert [where for where, _ in rows] == ["a.json:1", "a.json:1 row 2", "a.json:1 row 3"]
    assert problems[0].startswith("a.json:1 row 4: malformed JSON")


def test_empty_tables(tmp_path: Path, write):
    for name, content in (("a.json", "[ ]"), ("b.json", " \n"), ("c.csv", ""), ("d.jsonl", "")):
        write(name, content)
        assert read(tmp_path, name) == ([], [])


def test_an_indented_object_is_one_fault(tmp_path: Path, write):
    write("a.json", json.dumps({"images": [{"a": 1}], "info": {}}, indent=1))
    assert read(tmp_path, "a.json") == (
        [],
        ["a.json:1: expected an array, or one object a line, got one object with 'images', 'info'"],
    )


def test_other_encodings(tmp_path: Path, write):
    text = '{"a": "\u00e9"}\n{"a": "2"}\n'
    write("wide.jsonl", text.encode("utf-16"))
    write("latin.jsonl", text.encode("latin-1"))
    write("unmarked.jsonl", text.encode("utf-16-le"))
    write("latin.csv", "a,b\n\u00e9,1\n2,3\n".encode("latin-1"))
    write("latin.json", '[{"a": "\u00e9"}, {"a": 2}]'.encode("latin-1"))
    assert [row for _, row in read(tmp_path, "wide.jsonl")[0]] == [{"a": "\u00e9"}, {"a": "2"}]
    other = ":1: expected UTF-8 text, got other bytes"
    assert read(tmp_path, "latin.jsonl") == (
        [("latin.jsonl:2", {"a": "2"})],
        ["latin.jsonl" + other],
    )
    rows, problems = read(tmp_path, "unmarked.jsonl")
    assert not rows
    assert problems[0].startswith("unmarked.jsonl:1: expected UTF-8 text, got ")
    assert read(tmp_path, "latin.csv") == (
        [("latin.csv:3", {"a": "2", "b": "3"})],
        ["latin.csv:2: expected UTF-8 text, got other bytes"],
    )
    assert read(tmp_path, "latin.json") == (
        [("latin.json:1 row 2", {"a": 2})],
        ["latin.json" + other],
    )


def test_csv(tmp_path: Path, write):
    write(
        "a.csv",
        '\ufefflndex, Question ,Options\r\n1,"Is it, or\nnot?",(a)\r\n\r\n,,\r\n'
        '2,too few\r\n3,too,many,values\r\n4,"a""b",c\r\n5,"a" b,c\r\n6,x,y\r\n7,"never closed\r\n',
    )
    rows, problems = read(tmp_path, "a.csv", ("Question", "Options"))
    assert rows == [
        ("a.csv:2", {"lndex": "1", "Question": "Is it, or\nnot?", "Options": "(a)"}),
        ("a.csv:8", {"lndex": "4", "Question": 'a"b', "Options": "c"}),
        ("a.csv:10", {"lndex": "6", "Question": "x", "Options": "y"}),
    ]
    assert problems[:2] == [
        "a.csv:6: expected 3 values, got 2",
        "a.csv:7: expected 3 values, got 4",
    ]
    assert [problem.split(": ")[0] for problem in problems[2:]] == ["a.csv:9", "a.csv:11"]
    assert all("malformed CSV" in problem for problem in problems[2:])


def test_tsv_with_base64_images(tmp_path: Path, write):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8))
    file = BytesIO()
    large.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert len(text) > 131_072  # the csv module's own limit
    write("a.tsv", f'index\timage\tquestion\n1\t{text}\tIs it 5" long, or not?\n')
    with Source(tmp_path) as source:
        ((where, row),) = source.rows(tmp_path / "a.tsv", ("index", "image", "question"))
        path = source.image(where, row["image"])
        assert path is not None
        assert path.read_bytes() == file.getvalue()
        assert row["question"] == 'Is it 5" long, or not?'
        assert not source.problems


def test_missing_columns_of_a_table_are_one_fault(tmp_path: Path, write):
    write("a.csv", "a,b\n1,2\n3,4\n")
    write("b.csv", "a,a\n1,2\n3,4\n")
    assert read(tmp_path, "a.csv", ("a", "c")) == ([], ["a.csv:2: expected a, c, got a, b"])
    assert read(tmp_path, "b.csv") == (
        [],
        ["b.csv:1: expected different column names; the rest of the file is left out"],
    )


def test_lines(tmp_path: Path, write):
    path = write("a/1.txt", b"Is it?\tYes\r\n\r\n\xff\tNo\nLast\tNo")
    source = Source(tmp_path)
    assert list(source.lines(path)) == [("a/1.txt:1", "Is it?\tYes"), ("a/1.txt:4", "Last\tNo")]
    assert list(source.lines(tmp_path / "gone.txt")) == []
    assert source.problems == [
        "a/1.txt:3: expected UTF-8 text, got other bytes",
        "gone.txt: cannot be read: No such file or directory",
    ]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv"])
def test_damaged_text(tmp_path: Path, write, ending: str):
    """Whatever bytes are changed, rows are rows and the rest is told."""
    rows = [{"a": str(n), "b": 'x, "y"\t\u00e9'} for n in range(6)]
    separator = "\t" if ending == "tsv" else ","
    quoted = "".join(f'{n}{separator}"x, ""y"" \u00e9"\n' for n in range(6))
    whole = {
        "json": json.dumps(rows, indent=1, ensure_ascii=False),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }.get(ending, f"a{separator}b\n{quoted}")
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(200):
        data = bytearray(whole.encode())
        for place in rng.integers(len(data), size=3):
            data[place] = rng.choice(list(b'\0\r\n"{}[],\t\\9\xff\xc3'))
        write(f"a.{ending}", bytes(data[: rng.integers(len(data) // 2, 2 * len(data))]))
        found, problems = read(tmp_path, f"a.{ending}")
        assert all(type(row) is dict for _, row in found)
        json.dumps(found, ensure_ascii=False).encode()
        told += bool(problems)
    assert told > 100


def test_no_table(tmp_path: Path, write):
    with pytest.raises(UserError, match=r"expected a table \(\.json, \.jsonl, \.tsv"):
        list(Source(tmp_path).rows(write("a.pkl", b"")))


def test_a_table_that_cannot_be_opened(tmp_path: Path):
    source = Source(tmp_path)
    assert list(source.rows(tmp_path / "gone.json")) == []
    assert source.problems == ["gone.json:1: cannot be read: No such file or directory"]


# --- parquet and Arrow -----------------------------------------------------------------------


def table(count: int = 40) -> pyarrow.Table:
    return pyarrow.table(
        {
            "question": [f"Is it {n}?" for n in range(count)],
            "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in range(count)],
        }
    )


def test_parquet(tmp_path: Path):
    parquet.write_table(table(), tmp_path / "test-0.parquet", row_group_size=25)
    rows, problems = read(tmp_path, "test-*.parquet", ("question", "image"))
    assert not problems
    assert [where for where, _ in rows] == [f"test-0.parquet:{n}" for n in range(1, 41)]
    assert rows[31][1] == {
        "question": "Is it 31?",
        "image": {"bytes": picture(31), "path": "31.png"},
    }
    assert read(tmp_path, "test-*.parquet", ("answer",)) == (
        [],
        ["test-0.parquet:1: expected answer, got question, image"],
    )


def test_damaged_parquet(tmp_path: Path, write):
    whole = tmp_path / "whole.parquet"
    parquet.write_table(table(), whole, compression="none", row_group_size=20)
    data = whole.read_bytes()
    place = data.rindex(b"Is it 35?")  # in the second row group
    for name, damaged, left in (
        ("cut", data[:-500], 0),
        ("empty", b"", 0),
        ("other", b"no parquet" * 100, 0),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", 0),
        ("middle", data[: place - 4] + b"\xff" * 4 + data[place:], 16),
    ):
        write(f"{name}.parquet", damaged)
        rows, problems = read(tmp_path, f"{name}.parquet")
        assert len(rows) == left, name
        assert len(problems) == 1
        expected = "a git-lfs pointer" if name == "pointer" else "damaged or truncated parquet: "
        assert problems[0].startswith(f"{name}.parquet:{left + 1}: {expected}")


def test_parquet_with_text_that_is_none(tmp_path: Path):
    values = pyarrow.array([b"ok", b"\xff\xfe", b"fine"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    parquet.write_table(pyarrow.table({"a": text}), tmp_path / "a.parquet")
    rows, problems = read(tmp_path, "a.parquet")
    assert [row for _, row in rows] == [{"a": "ok"}, {"a": "fine"}]
    assert problems[0].startswith("a.parquet:2: cannot be read: ")


def test_arrow_with_damaged_offsets(tmp_path: Path, write):
    """Unchecked, the second row would be read from outside the memory."""
    table = pyarrow.table({"a": [f"row {n}" for n in range(9)]})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue().to_pybytes()
    offsets = struct.pack("<5i", 0, 5, 10, 15, 20)
    assert data.count(offsets) == 1
    write("data-0.arrow", data.replace(offsets, struct.pack("<5i", 0, 5, 2**30, 15, 20)))
    rows, problems = read(tmp_path, "data-0.arrow")
    assert [row["a"] for _, row in rows] == [f"row {n}" for n in range(9) if n not in (1, 2)]
    assert [problem[:32] for problem in problems] == [
        "data-0.arrow:2: cannot be read: ",
        "data-0.arrow:3: cannot be read: ",
    ]


def test_datasets_saved_to_disk(tmp_path: Path):
    features = datasets.Features(question=datasets.Value("string"), image=datasets.Image())
    rows = [{"question": f"{n}?", "image": {"bytes": picture(n), "path": None}} for n in range(5)]
    made = datasets.Dataset.from_list(rows, features=features)
    splits = datasets.DatasetDict()
    splits["test"], splits["val"] = made, made.select([3])
    splits.save_to_disk(tmp_path / "dict", num_shards={"test": 2, "val": 1})
    made.save_to_disk(tmp_path / "one")
    named = datasets.Dataset.from_list(rows, features=features, split="train")
    named.save_to_disk(tmp_path / "named")

    source = Source(tmp_path / "dict")
    parts = source.find("data/test-*.parquet")
    assert [path.name for path in parts] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    found = [pair for part in parts for pair in source.rows(part, ("question", "image"))]
    assert [row["question"] for _, row in found] == ["0?", "1?", "2?", "3?", "4?"]
    assert found[3][0] == "test/data-00001-of-00002.arrow:1"
    assert found[3][1]["image"]["bytes"] == picture(3)
    assert len(list(source.rows(tmp_path / "dict"))) == 6
    assert len(source.find("val-*.parquet")) == 1
    assert len(Source(tmp_path / "dict" / "val").find("test-*.parquet")) == 1
    assert len(Source(tmp_path / "one").find("test-*.parquet")) == 1
    assert len(Source(tmp_path / "named").find("train-*.parquet")) == 1
    assert not source.problems


def test_a_damaged_dataset(tmp_path: Path):
    datasets.Dataset.from_dict({"a": list(range(5000))}).save_to_disk(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:20_000])
    for state in ("{", "[]", '{"_split": 3}'):
        (tmp_path / "state.json").write_text(state)
        source = Source(tmp_path)
        rows = list(source.rows(path))
        assert len(rows) < 5000
        assert len(source.problems) == 1
        assert "damaged or truncated arrow" in source.problems[0]


def test_without_pyarrow(tmp_path: Path, write, monkeypatch):
    write("a.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "agevlm-mlx\[datasets\]"'):
        read(tmp_path, "a.parquet")


def test_what_is_imported():
    code = (
        "import sys, agevlm_mlx.evaluation.source as s; "
        "assert not {'pyarrow', 'datasets', 'pandas', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parquet_is_not_read_whole(tmp_path: Path):
    """Ten row groups of 4 MB (the smallest part that a file can be read in)."""
    rng = np.random.default_rng(0)
    noise = [rng.bytes(400_000) for _ in range(100)]
    parquet.write_table(pyarrow.table({"image": noise}), tmp_path / "a.parquet", row_group_size=10)
    source = Source(tmp_path)
    before = pyarrow.total_allocated_bytes()
    peak, rows = 0, source.rows(tmp_path / "a.parquet")
    for (_, row), expected in zip(rows, noise, strict=True):
        assert row["image"] == expected
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert peak < 25_000_000


# --- images ----------------------------------------------------------------------------------


def test_images_by_name(tmp_path: Path, write):
    write("top.png", picture())
    write("images/val2014/a.png", picture())
    write("deep/er/b.png", picture())
    write("VD/ocr/0_1.png", picture())
    write("one/same.png", picture())
    write("two/same.png", picture())
    source = Source(tmp_path)

    def at(name: str, *folders: str) -> str | None:
        path = source.image("x:1", name, *folders)
        return path and path.relative_to(tmp_path).as_posix()

    assert at("top.png") == at("./top.png") == "top.png"
    assert at("a.png", "images/val2014") == at("a.png") == "images/val2014/a.png"
    assert at("val2014/a.png") == "images/val2014/a.png"
    assert at("er/b.png") == at("b.png") == at("elsewhere/b.png") == "deep/er/b.png"
    assert at("one/same.png") == at("same.png", "one") == "one/same.png"
    assert not source.problems
    # An image of another folder is not taken for one that is missing.
    assert at("VS/ocr/0_1.png") is None
    assert at("same.png") is None
    assert at("two/same.png/x") is None
    assert [problem.removeprefix("x:1: ") for problem in source.problems] == [
        "no image 'VS/ocr/0_1.png'",
        "the image 'same.png' is there 2 times, in different folders",
        "no image 'two/same.png/x'",
    ]


def test_images_as_bytes_are_written_once(tmp_path: Path):
    with Source(tmp_path) as source:
        one = source.image("x:1", {"bytes": picture(1), "path": "a.png"})
        again = source.image("x:2", picture(1))
        text = base64.encodebytes(picture(1)).decode()
        assert one is not None
        assert one == again == source.image("x:3", text)
        assert one == source.image("x:4", "data:image/png;base64," + text)
        other = source.image("x:5", picture(2, "JPEG"))
        assert other is not None
        assert other != one
        assert one.read_bytes() == picture(1)
        assert one.name == hashlib.sha256(picture(1)).hexdigest()
        folder = one.parent
        assert sorted(folder.iterdir()) == sorted([one, other])
        assert not source.problems
    assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_dict_with_a_path_only(tmp_path: Path, write):
    write("images/a.png", picture())
    source = Source(tmp_path)
    found = source.image("x:1", {"bytes": None, "path": "a.png"})
    assert found == tmp_path / "images" / "a.png"


def bomb() -> bytes:
    """A PNG whose header tells of 40 000 x 40 000 pixels."""
    data = bytearray(picture())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    return bytes(data)


def test_what_is_no_image(tmp_path: Path, write):
    write("text.png", "no image")
    write("bomb.png", bomb())
    write("big.png", b"")
    Image.new("1", (8000, 7000)).save(tmp_path / "big.png")
    (tmp_path / "folder.png").mkdir()
    values = {
        "text.png": "the image text.png: not an image that can be read",
        "bomb.png": "the image bomb.png: ",
        "big.png": "the image big.png: expected at most 50 megapixels, got 8000x7000",
        "folder.png": "no image",
        "gone.png": "no image 'gone.png'",
        "/etc/hostname": "expected the name of an image in the folder",
        "../x.png": "expected the name of an image in the folder",
        "a\0b.png": "expected the name of an image in the folder",
        "x" * 300 + ".png": "no image 'xxx",
        "": "expected an image, got ''",
        " ": "no image ' '",
        ".": "no image '.'",
        "A" * 2000: "its image: not an image",
        "A" * 2001 + "!": "expected an image, got 'AAA",
        b"": "expected an image, got",
        b"GIF": "its image: not an image",
        None: "expected an image, got 'None'",
        7: "expected an image, got '7'",
        ("a", "b"): "expected an image, got",
    }
    with Source(tmp_path) as source:
        for value in values:
            assert source.image("x:1", value) is None, value
        assert source.image("x:1", {}) is None
        assert source.image("x:1", {"bytes": [1, 2], "path": None}) is None
        assert source.image("x:1", {"bytes": bomb(), "path": "a.png"}) is None
    for problem, expected in zip(source.problems, values.values(), strict=False):
        assert problem.startswith(f"x:1: {expected}"), expected
    assert len(source.problems) == len(values) + 3
