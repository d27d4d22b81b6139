"""Records on disk: the index, what is read when asked for, what is left out and why."""

import json
import os
import pickle
import random
import shutil
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm_mlx.data import record_lines, record_scan, record_set, stored
from agevlm_mlx.data.exclude import Excluded
from agevlm_mlx.data.formats import Format
from agevlm_mlx.data.record_lines import scan_array, scan_lines
from agevlm_mlx.data.record_set import Records, read_records, write_problems
from agevlm_mlx.data.records import Phrase, Problem, Record, Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_encode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with pictures 0.png to 3.png."""
    for i in range(4):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{i}.png")
    return tmp_path


def item(i: int, image: str | None = None, text: str = "Ein Hündchen 🐶", **more: Any) -> Any:
    """Record number `i`, about one of the pictures in turn."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{text} {i}"}]
    return {"id": str(i), "image": image or f"{i % 4}.png", "conversations": turns, **more}


def lines(path: Path, *items: Any, end: str = "\n") -> Path:
    """The items as JSON lines; text is written as it is."""
    text = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in items]
    path.write_text(end.join(text) + end, encoding="utf-8", newline="")
    return path


def array(path: Path, items: list[Any], ascii: bool = True, indent: int | None = None) -> Path:
    path.write_text(json.dumps(items, ensure_ascii=ascii, indent=indent), encoding="utf-8")
    return path


def ids(records: Iterable[Record]) -> list[str]:
    return [record.id for record in records]


# The index ------------------------------------------------------------------------------------


def test_what_is_kept_of_each_record(folder: Path) -> None:
    answer = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "a dög"}]
    mask = rle_encode(np.ones((10, 20), bool))
    phrase = {"text": "a", "turn": 0, "start": 0, "end": 1}
    gone = {**phrase, "absent": True}
    path = lines(
        folder / "x.jsonl",
        {"image": "1.png", "conversations": answer},
        {"image": "0.png", "conversations": answer * 2, "kind": "b", "phrases": [phrase]},
        {"image": "1.png", "conversations": answer, "phrases": [phrase, {**phrase, "mask": mask}]},
        {"image": "1.png", "conversations": answer, "phrases": [{**phrase, "point": [1, 2]}, gone]},
    )
    records = read_records(path)
    assert len(records) == 4
    assert records.root == folder
    assert list(records.images) == [folder / "1.png", folder / "0.png"]
    assert records.kinds == ["chat", "b"]
    for name, dtype, wanted in (
        ("image_of", np.int32, [0, 1, 0, 0]),
        ("kind_of", np.int16, [0, 1, 0, 0]),
        ("length_of", np.int32, [7, 14, 7, 7]),
        ("guided", np.bool_, [False, False, True, True]),
        ("masked", np.bool_, [False, False, True, False]),
        ("absent", np.bool_, [False, False, False, True]),
    ):
        values = getattr(records, name)
        assert values.dtype == dtype
        assert values.tolist() == wanted, name
    assert records.of_image(0).tolist() == [0, 2, 3]
    assert records.of_image(1).tolist() == [1]
    assert (records.problems, records.excluded, records.text_only) == ([], 0, 0)
    assert records.notes() == []
    for made in (Records.from_list(records), pickle.loads(pickle.dumps(records))):
        assert made.root == records.root
        assert list(made.images) == list(records.images)
        assert made.kinds == records.kinds
        for name in ("image_of", "kind_of", "length_of", "guided", "masked", "absent"):
            np.testing.assert_array_equal(getattr(made, name), getattr(records, name))
        assert list(made) == list(records)


def test_records_are_a_sequence(folder: Path) -> None:
    records = read_records(lines(folder / "x.jsonl", *map(item, range(7))))
    assert ids(records) == list("0123456")
    assert records[-1].id == "6"
    assert records[int(np.int32(2))].id == "2"
    assert ids(records[1:6:2]) == ["1", "3", "5"]
    assert ids(reversed(records)) == list("6543210")
    assert records[3] in records
    for i in (7, -8):
        with pytest.raises(IndexError):
            records[i]


def test_the_records_of_an_image_are_in_order() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    images = random.Random(0).choices([Path(f"/x/{i}.png") for i in range(5)], k=1000)
    records = Records.from_list(Record(str(n), i, turns) for n, i in enumerate(images))
    for number, image in enumerate(records.images):
        wanted = [n for n, one in enumerate(images) if one == image]
        assert records.of_image(number).tolist() == wanted


def test_the_first_images_are_data_of_their_own(folder: Path) -> None:
    phrase = {"text": "W", "turn": 0, "start": 0, "end": 1, "box": [1, 1, 5, 5]}
    gone = {"text": "W", "turn": 0, "start": 0, "end": 1, "absent": True}
    listed = [[gone], [phrase]]
    items = [item(i, kind=f"k{i % 3}", phrases=listed[i % 2]) for i in (2, 1, 5, 0, 6, 3, 9)]
    whole = read_records(lines(folder / "x.jsonl", *items))
    assert [image.name for image in whole.images] == ["2.png", "1.png", "0.png", "3.png"]
    few = whole.first_images(2)
    wanted = [record for record in whole if record.image.name in ("2.png", "1.png")]
    assert ids(few) == ids(wanted) == ["2", "1", "5", "6", "9"]
    assert few.root == whole.root
    made = Records.from_list(wanted, whole.root)
    assert list(few) == list(made)
    assert list(few.images) == list(made.images)
    assert [few.kinds[n] for n in few.kind_of] == [record.kind for record in wanted]
    for name in ("image_of", "length_of", "guided", "masked", "absent"):
        assert getattr(few, name).dtype == getattr(made, name).dtype
        np.testing.assert_array_equal(getattr(few, name), getattr(made, name))
    assert few.of_image(1).tolist() == [1, 2, 4]
    assert few[-1].id == "9"
    assert ids(few[1:3]) == ["1", "5"]
    assert list(pickle.loads(pickle.dumps(few))) == wanted
    one = whole.first_images(1)
    assert sorted(one.kinds) == ["k0", "k2"]  # those of its records, and no others
    assert list(whole.first_images(4)) == list(whole)
    few.close()
    with pytest.raises(ValueError, match="closed"):
        whole[0]


def test_an_empty_list_is_no_error() -> None:
    records = Records.from_list([])
    assert (len(records), list(records.images), records.kinds) == (0, [], [])


def test_a_list_finds_its_root() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"))

    def root(*images: str) -> Path:
        return Records.from_list(Record("1", Path(i), turns) for i in images).root

    assert root("/x/images/1.png", "/x/images/2.png") == Path("/x")
    assert root("/x/y/1.png", "/x/y/2.png") == Path("/x/y")
    assert root("/x/y/1.png", "/x/z/2.png") == Path("/x")
    record = Record("1", Path("/x/1.png"), turns)
    assert Records.from_list([record], Path("/")).root == Path("/")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii", [True, False])
def test_arrays_of_any_layout(folder: Path, ascii: bool, indent: int | None) -> None:
    items = [item(i) for i in range(9)]
    found = read_records(array(folder / "x.json", items, ascii, indent))
    assert list(found) == list(read_records(lines(folder / "x.jsonl", *items)))
    assert found[8].turns[1].text == "Ein Hündchen 🐶 8"


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    values=st.lists(VALUES, max_size=6),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    chunk=st.integers(1, 40),
)
def test_items_are_found_wherever_the_buffer_ends(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[Any],
    ascii: bool,
    indent: int | None,
    chunk: int,
) -> None:
    text = json.dumps(values, ensure_ascii=ascii, indent=indent)
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(record_lines, "_CHUNK", chunk)
        found = list(scan_array(file, path))
        data = path.read_bytes()
    assert [one.number for one in found] == list(range(1, len(values) + 1))
    for one, value in zip(found, values, strict=True):
        if not isinstance(one.value, Problem):  # half a letter
            assert one.value == value
            assert json.loads(data[one.offset : one.offset + one.length]) == value


@pytest.mark.parametrize("chunk", range(1, 9))
def test_numbers_are_not_cut_where_the_buffer_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(record_lines, "_CHUNK", chunk)
    values = [12345, 0.5, -0.25, 1e30, 1.5e-07, True, None, "é", [], {}]
    path = array(tmp_path / "x.json", values)
    with path.open("rb") as file:
        assert [one.value for one in scan_array(file, path)] == values


def test_windows_files(folder: Path) -> None:
    path = lines(folder / "x.jsonl", item(0), "", item(1), end="\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ids(read_records(path)) == ["0", "1"]
    text = json.dumps([item(0), item(1)], indent=1).replace("\n", "\r\n")
    (folder / "x.json").write_text(text, encoding="utf-8-sig", newline="")
    assert ids(read_records(folder / "x.json")) == ["0", "1"]


# LLaVA ----------------------------------------------------------------------------------------


def test_llava_pretrain(tmp_path: Path) -> None:
    images = tmp_path / "images" / "00453"
    images.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(images / "004539375.jpg")
    row = {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam topper"},
        ],
    }
    array(tmp_path / "blip_laion_cc_sbu_558k.json", [row])
    (record,) = read_records(tmp_path)  # the only array of the folder
    assert record.image == images / "004539375.jpg"
    assert record.turns[0].text == "Render a clear and concise summary of the photo."
    shutil.move(images, tmp_path)
    records = read_records(tmp_path)
    assert list(records.images) == [tmp_path / "00453" / "004539375.jpg"]
    assert records.root == tmp_path


def test_llava_instruct_leaves_text_only_conversations_out(tmp_path: Path) -> None:
    items = []
    for i, name in enumerate(("coco/train2017/1.jpg", "vg/VG_100K/2.jpg", "textvqa/3.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
        items.append(item(i, name))
    text_only = {key: value for key, value in item(9).items() if key != "image"}
    path = array(tmp_path / "mix.json", [items[0], text_only, *items[1:], text_only])
    records = read_records(path)
    assert ids(records) == ["0", "1", "2"]
    assert records.text_only == 2
    assert records.notes() == [f"{tmp_path}: 2 of 5 records are left out, they have no image"]
    with pytest.raises(UserError, match=r"at least one record, got 1 without 'image'"):
        read_records(array(path, [text_only]))


# Other formats --------------------------------------------------------------------------------


def reading(monkeypatch: pytest.MonkeyPatch, *given: Record | Problem) -> None:
    """Have any folder read as the given records."""

    def read(path: Path) -> Iterator[Record | Problem]:
        yield from given

    format = Format("anything", lambda path: True, read, lambda path: path / "..")
    monkeypatch.setattr(record_set, "FORMATS", (format,))


def test_a_reader_s_records_are_kept_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (Turn("user", "Was ist <image>? "), Turn("assistant", "Ein\nHündchen 🐶"))
    mask = rle_encode(np.eye(10, 20, dtype=bool), compressed=False)
    phrase = Phrase("Hündchen", 1, 4, 12, (1, 2.5, 3, 4.25), (2.5, 3), mask)
    given = [Record(str(i), folder / f"{i % 3}.png", turns, (phrase,), "k") for i in range(5)]
    reading(monkeypatch, *given)
    records = read_records(folder)
    assert list(records) == given
    assert records.root == folder / ".."
    assert records.masked.all()
    assert list(pickle.loads(pickle.dumps(records))) == given
    records.close()
    with pytest.raises(ValueError, match="closed"):
        records[0]


def test_a_reader_s_records_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    good = Record("good", folder / "0.png", turns)
    bad = [
        Problem("t.json: annotation 7", "no such image", "7"),
        Record("gone", folder / "9.png", turns),
        Record("span", folder / "0.png", turns, (Phrase("dog", 1, 0, 3),)),
        Record("mute", folder / "0.png", turns[:1]),
    ]
    reading(monkeypatch, good, *bad)
    with pytest.raises(UserError, match=r"^t\.json: annotation 7: no such image$"):
        read_records(folder)
    records = read_records(folder, on_error="skip")
    assert list(records) == [good]
    assert [(p.where, p.record) for p in records.problems] == [
        ("t.json: annotation 7", "7"),
        (f"{folder}: record gone", "gone"),
        (f"{folder}: record span", "span"),
        (f"{folder}: record mute", "mute"),
    ]
    assert records.problems[1].problem == f"image not found: {folder / '9.png'}"
    for one in bad[1:]:
        reading(monkeypatch, good, one)
        with pytest.raises(UserError):
            read_records(folder)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.jsonl", "bad_records.jsonl", "metadata.jsonl"], "a.jsonl"),
        (["llava.json", "a.jsonl", "b.jsonl"], "llava.json"),
        (["a.json", "object.json"], "a.json"),
    ],
)
def test_the_file_of_a_folder(folder: Path, names: list[str], wanted: str) -> None:
    for name in names:
        array(folder / name, [item(1, text=name)])
        if name.endswith(".jsonl"):
            lines(folder / name, item(1, text=name))
    (folder / "object.json").write_text("{}")
    assert read_records(folder)[0].turns[1].text == f"{wanted} 1"


# Left out -------------------------------------------------------------------------------------


def test_excluded_images(folder: Path) -> None:
    path = lines(folder / "x.jsonl", *map(item, range(8)), item(8, "gone.png"))
    out = Excluded(["1.jpg", "gone.png", "7.png"])
    records = read_records(path, exclude=out)  # the file that is missing is not needed
    assert ids(records) == ["0", "2", "3", "4", "6", "7"]
    assert records.excluded == 3
    assert folder / "1.png" not in records.images
    assert records.notes() == [
        f"{folder}: 3 of 9 records are left out, their images are on an exclusion list"
    ]
    with pytest.raises(UserError, match="got 9, all about images of an exclusion list"):
        read_records(path, exclude=Excluded(["0.png", "1.png", "2.png", "3.png", "gone.png"]))


WRONG_LINES = [
    ("{", "malformed JSON: Expecting property name", None),
    (b'{"id": "\xff"}', "expected UTF-8 text: invalid start byte", None),
    ("[]", "expected an object, got list", None),
    (item(1, "../1.png"), "expected an image inside", "1"),
    (item(1, "9.png"), "image not found: ", "1"),
    (item(1, "a" * 300), "File name too long", "1"),
    (item(1, "1\0.png"), "expected the path of an image", "1"),
    (item(1, conversations=[]), "expected a list of messages", "1"),
    (item(1, phrases=[{"text": "x", "turn": 0, "start": 0, "end": 1}]), "the phrase 'x'", "1"),
    (item(1, phrases=[{"text": "W", "turn": 0, "start": 0, "end": 10**400}]), "the phrase", "1"),
    (item(1, kind="\ud83d"), "expected whole letters, got half of a surrogate pair", None),
    ('{"id": 1' + "0" * 5000 + "}", "malformed JSON", None),
]


@pytest.mark.parametrize(("wrong", "message", "known"), WRONG_LINES)
def test_bad_lines_stop_or_are_listed(
    folder: Path, wrong: Any, message: str, known: str | None
) -> None:
    path = folder / "x.jsonl"
    if not isinstance(wrong, bytes):
        text = wrong if isinstance(wrong, str) else json.dumps(wrong)
        wrong = text.encode()
    good = json.dumps(item(0)).encode()
    path.write_bytes(b"\n".join([good, b"", wrong, good]))
    records = read_records(path, on_error="skip")
    assert ids(records) == ["0", "0"]
    (problem,) = records.problems
    assert problem.where == f"{path}:3"
    assert message in problem.problem
    assert problem.record == known
    assert records.notes() == [f"{folder}: 1 of 3 records could not be used and are left out"]
    with pytest.raises(UserError) as caught:
        read_records(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_bytes(wrong)
    with pytest.raises(UserError, match=r"expected at least one record, got 1 bad, the first "):
        read_records(path, on_error="skip")


@pytest.mark.parametrize("wrong", [3, "x", None, [], [item(1)], {"id": "a"}, item(1, "9.png")])
def test_bad_items_of_an_array(folder: Path, wrong: Any) -> None:
    path = array(folder / "x.json", [item(0), wrong, item(2)])
    records = read_records(path, on_error="skip")
    assert ids(records) == ["0", "2"]
    assert [p.where for p in records.problems] == [f"{path}: record 2"]
    with pytest.raises(UserError, match=r"x\.json: (record 2: expected|image not found)"):
        read_records(path)
    with pytest.raises(UserError, match="got 2 bad"):
        read_records(array(path, [wrong, wrong]), on_error="skip")


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("end", "line", "reason", "kept"),
    [
        ('{"id": "c', 4, "Unterminated string", "ab"),
        ('{"id": "c\\u00', 4, "", "ab"),
        ('{"id": 3,', 4, "Expecting property name", "ab"),
        ("", 4, "Expecting value", "ab"),
        ("]", 4, "Expecting value", "ab"),
        ("ITEM", 4, "the array does not end", "abc"),
        ("ITEM\n}", 5, "Expecting ',' delimiter", "abc"),
        ("ITEM ITEM]", 4, "Expecting ',' delimiter", "abc"),
        ("ITEM]]", 4, "Extra data", "abc"),
        ("ITEM]\n\nITEM", 6, "Extra data", "abc"),
        ("[" * 100_000, 4, "maximum recursion", "ab"),
        ("1" + "0" * 5000 + "]", 4, "Exceeds the limit", "ab"),
    ],
)
def test_an_array_that_is_broken(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    line: int,
    reason: str,
    kept: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(record_lines, "_CHUNK", chunk)
    text = [json.dumps(item(i, id=name)) for i, name in enumerate("abc")]
    path = folder / "x.json"
    path.write_text(f"[{text[0]},\n\n{text[1]},\n{end.replace('ITEM', text[2])}")
    with pytest.raises(UserError) as caught:
        read_records(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: malformed JSON: {reason}")
    assert said.endswith(f"(record {len(kept) + 1}); nothing after it can be read")
    assert "\n" not in said
    records = read_records(path, on_error="skip")
    assert ids(records) == list(kept)
    assert len(records.problems) == 1


def test_no_record_may_fill_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_lines, "LONGEST", 1000)
    monkeypatch.setattr(record_lines, "_CHUNK", 64)
    long = item(1, text="x" * 5000)
    records = read_records(lines(folder / "x.jsonl", item(0), long, item(2)), on_error="skip")
    assert ids(records) == ["0", "2"]
    assert [p.where for p in records.problems] == [f"{folder / 'x.jsonl'}:2"]
    assert "expected a record of less than" in records.problems[0].problem
    with pytest.raises(UserError, match=r"x\.json:1: malformed JSON.*record 2"):
        read_records(array(folder / "x.json", [item(0), long, item(2)]))


def test_too_many_kinds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_scan, "_KINDS", 2)
    kinds = [item(i, kind=str(i // 2)) for i in range(6)]
    path = lines(folder / "x.jsonl", *kinds, item(6, kind="0"))
    with pytest.raises(UserError, match=r"x\.jsonl:5: expected at most 2 kinds"):
        read_records(path)
    records = read_records(path, on_error="skip")
    assert ids(records) == ["0", "1", "2", "3", "6"]
    assert records.kinds == ["0", "1"]


def test_images_of_bad_records_are_no_images(folder: Path) -> None:
    path = lines(folder / "x.jsonl", item(0), item(1, conversations=[]), item(2))
    records = read_records(path, on_error="skip")
    assert list(records.images) == [folder / "0.png", folder / "2.png"]
    assert records.image_of.tolist() == [0, 1]


def test_an_image_is_looked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def exists(path: Path) -> bool:
        asked.append(path)
        return path.is_file()

    monkeypatch.setattr(record_scan, "image_exists", exists)
    path = lines(folder / "x.jsonl", *map(item, range(40)), *(item(i, "9.png") for i in range(9)))
    assert len(read_records(path, on_error="skip").problems) == 9
    assert sorted(asked) == [folder / f"{i}.png" for i in (0, 1, 2, 3, 9)]


def test_an_unreadable_file(folder: Path) -> None:
    (folder / "x.json").mkdir()
    with pytest.raises(UserError, match=r"x\.json: expected llava\.json"):
        read_records(folder / "x.json")
    os.mkfifo(folder / "y.jsonl")
    with pytest.raises(UserError, match=r"y\.jsonl: expected a \.json or \.jsonl file"):
        read_records(folder / "y.jsonl")


def test_problems_are_written_as_json_lines(tmp_path: Path) -> None:
    problems = [Problem("x.jsonl:3", 'malformed "JSON"\nö'), Problem("y", "image not found", "7")]
    write_problems(tmp_path / "bad_records.jsonl", problems)
    text = (tmp_path / "bad_records.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [Problem(**row) for row in rows] == problems
    write_problems(tmp_path / "bad_records.jsonl", [])
    assert (tmp_path / "bad_records.jsonl").read_text() == ""
    assert len(list(tmp_path.iterdir())) == 1


# Threads and processes ------------------------------------------------------------------------


@pytest.fixture
def many(folder: Path) -> Records:
    return read_records(lines(folder / "x.jsonl", *map(item, range(300))))


def test_threads_ask_at_the_same_time(many: Records) -> None:
    wrong: list[int] = []

    def ask(seed: int) -> None:
        order = random.Random(seed).sample(range(300), 300)
        wrong.extend(i for i in order if many[i].id != str(i))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def answer(records: Records, pipe: Any) -> None:
    pipe.send(ids(records[i] for i in range(299, -1, -1)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_ask_at_the_same_time(many: Records, method: str) -> None:
    context = get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(many, theirs))
    process.start()
    assert ids(many) == [str(i) for i in range(300)]
    assert ours.poll(60)
    assert ours.recv() == [str(i) for i in range(299, -1, -1)]
    process.join(60)
    assert process.exitcode == 0


def test_a_file_that_was_replaced_is_still_read(many: Records, folder: Path) -> None:
    lines(folder / "new.jsonl", item(1000))
    os.replace(folder / "new.jsonl", folder / "x.jsonl")
    assert many[299].id == "299"
    with pytest.raises(UserError, match=r"x\.jsonl: changed since it was read; start again"):
        pickle.loads(pickle.dumps(many))
    copy = pickle.dumps(many)
    (folder / "x.jsonl").unlink()
    with pytest.raises(UserError, match=r"x\.jsonl: cannot be read: No such file"):
        pickle.loads(copy)


def test_a_file_that_changes_is_noticed(many: Records, folder: Path) -> None:
    path = folder / "x.jsonl"
    data = path.read_bytes()
    start = data.index(b"299") - 20
    path.write_bytes(data[: start + 40])
    with pytest.raises(UserError, match=r"x\.jsonl:300: the file changed since it was read"):
        many[299]
    path.write_bytes(data.replace(b"chen", b"lein"))
    assert many[5].turns[1].text == "Ein Hündlein 🐶 5"  # of the same length: nobody can tell
    no_object = b"".join(b"[]" + b" " * (len(line) - 2) for line in data.splitlines(True))
    for changed in (data.replace("ü".encode(), b"ue"), data.replace(b"human", b"robot"), no_object):
        assert len(changed) == len(data)
        path.write_bytes(changed)
        with pytest.raises(UserError, match="the file changed"):
            many[5]


def test_close_gives_the_file_back(folder: Path) -> None:
    def opened() -> int:
        return len(os.listdir("/dev/fd"))

    before = opened()
    held = [read_records(lines(folder / "x.jsonl", item(0))) for _ in range(5)]
    assert opened() == before + 5
    held[0].close()
    held[0].close()
    assert opened() == before + 4
    with pytest.raises(ValueError, match="closed"):
        held[0][0]
    held.clear()
    assert opened() == before


def test_pieces_may_be_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        pieces = stored.Stored(file, path)
    pieces.add(7, 2, 40)
    pieces.add(0, 3, 41)
    assert [pieces.read(i) for i in range(len(pieces))] == [b"78", b"012"]
    assert [pieces.number(i) for i in range(2)] == [40, 41]


def test_lines_know_their_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n[2]')
    with path.open("rb") as file:
        found = list(scan_lines(file, path))
    assert [(one.offset, one.length, one.number) for one in found] == [(3, 10, 1), (14, 3, 3)]
    assert [one.value for one in found] == [{"a": 1}, [2]]
