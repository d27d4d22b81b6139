"""Records from the files users have, and what is said about files that are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm_mlx.data.exclude import exclusions
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.records import Phrase, Problem, Record, Turn, image_name, parse_record, to_json
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_decode, rle_encode

QUESTION, ANSWER = "Is there a dog?", "Yes, a dog."
OURS: dict[str, Any] = {
    "id": "a",
    "image": "images/1.png",
    "kind": "presence",
    "conversations": [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ],
    "phrases": [
        {"text": "dog", "turn": 0, "start": 11, "end": 14, "box": [1, 2, 5, 6.5]},
        {"text": "a dog", "turn": 1, "start": 5, "end": 10, "point": [3, 4]},
    ],
}
LLAVA: dict[str, Any] = {
    "id": 7,
    "image": "images/1.png",
    "conversations": [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": ANSWER},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with one picture, 20 x 10 px."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "1.png")
    return tmp_path


def write(path: Path, *items: Any) -> Path:
    """The items as .jsonl or .json, whatever the suffix says."""
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]"
    path.write_text(text, encoding="utf-8")
    return path


def changed(item: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**item, **fields}


def phrase(**fields: Any) -> dict[str, Any]:
    """OURS with one phrase that differs in some fields."""
    return changed(OURS, phrases=[{**OURS["phrases"][0], **fields}])


# What is read ---------------------------------------------------------------------------------


def test_our_jsonl(folder: Path) -> None:
    file = write(folder / "data.jsonl", OURS, "", changed(OURS, id="b", phrases=[]))
    first, second = read_records(file)
    assert first == Record(
        "a",
        folder / "images" / "1.png",
        (Turn("user", QUESTION), Turn("assistant", ANSWER)),
        (
            Phrase("dog", 0, 11, 14, box=(1, 2, 5, 6.5)),
            Phrase("a dog", 1, 5, 10, point=(3, 4)),
        ),
        "presence",
    )
    assert (second.id, second.phrases) == ("b", ())
    assert list(read_records(folder)) == [first, second]  # the only .jsonl of the folder


def test_a_phrase_may_be_about_something_absent(folder: Path) -> None:
    bare = {key: OURS["phrases"][0][key] for key in ("text", "turn", "start", "end")}
    for said, absent in (({"absent": True}, True), ({"absent": False}, False), ({}, False)):
        item = changed(OURS, phrases=[{**bare, **said}])
        for name, one in (("x.jsonl", item), ("x.json", changed(LLAVA, phrases=item["phrases"]))):
            (record,) = records = read_records(write(folder / name, one))
            assert record.phrases[0].absent is absent
            assert records.absent.tolist() == [absent]
            assert records.guided.tolist() == [False]
    assert '"absent"' not in to_json(record)  # nothing new is written about what is not absent


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_llava_in_both_forms(folder: Path, name: str) -> None:
    (record,) = read_records(write(folder / name, LLAVA))
    assert record.id == "7"
    assert record.kind == "chat"
    assert record.turns == (Turn("user", QUESTION), Turn("assistant", ANSWER))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What is it?\n<image>", "What is it?"),
        ("Is <image> nice?", "Is nice?"),
        ("<image>\n<image>\nThe same?", "The same?"),
        (" no tag ", " no tag "),
    ],
)
def test_image_tags_leave_no_trace(folder: Path, text: str, plain: str) -> None:
    messages = [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes"}]
    (record,) = read_records(write(folder / "x.json", changed(LLAVA, conversations=messages)))
    assert record.turns[0].text == plain


def test_files_of_windows_begin_with_a_mark(folder: Path) -> None:
    (folder / "x.jsonl").write_text(json.dumps(OURS), encoding="utf-8-sig")
    assert len(read_records(folder)) == 1


def test_a_record_without_id_is_named_by_its_line(folder: Path) -> None:
    nameless = {key: value for key, value in OURS.items() if key != "id"}
    (record,) = read_records(write(folder / "x.jsonl", nameless))
    assert record.id.endswith("x.jsonl:1")


def test_several_turns_and_a_mask(folder: Path) -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:5, 3:9] = True
    item = changed(
        OURS,
        conversations=[*OURS["conversations"], *OURS["conversations"]],
        phrases=[{"text": "dog", "turn": 3, "start": 7, "end": 10, "mask": rle_encode(mask)}],
    )
    (record,) = read_records(write(folder / "x.jsonl", item))
    assert len(record.turns) == 4
    assert record.phrases[0].mask is not None
    np.testing.assert_array_equal(rle_decode(record.phrases[0].mask), mask)


# What is wrong --------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    ("{", "malformed JSON"),
    ('{"a": 1' + "0" * 5000 + "}", "malformed JSON"),
    ("[" * 200_000, "malformed JSON"),
    ("[1]", "expected an object, got list"),
    (changed(OURS, image=3), "expected the path of an image in 'image', got 3"),
    (changed(OURS, image=["a", "b"]), "expected one image in 'image', got 2"),
    (changed(OURS, image=None, images=["a", "b"]), "expected one image in 'images', got 2"),
    (changed(OURS, image=None, images=[3]), "expected the path of an image in 'images', got 3"),
    (changed(OURS, image="images/1\0.png"), "expected the path of an image"),
    ({"id": "a"}, "expected the path of an image in 'image', got None"),
    (json.dumps(OURS)[:-9] + "\0" + json.dumps(OURS)[-9:], "malformed JSON"),
    (json.dumps(changed(OURS, id="\ud83d")), "expected whole letters, got half of a surrogate"),
    (json.dumps(OURS)[:90], "malformed JSON"),
    (changed(OURS, image="../secret.png"), "expected an image inside"),
    (changed(OURS, image="images/../../secret.png"), "expected an image inside"),
    (changed(OURS, image="/etc/passwd"), "expected an image inside"),
    (changed(OURS, conversations=[]), "expected a list of messages"),
    (changed(OURS, conversations="hello"), "expected a list of messages"),
    (changed(OURS, conversations=["hello"]), "expected an object for each message"),
    (changed(OURS, conversations=OURS["conversations"][:1]), "no answer to learn from"),
    (
        changed(OURS, conversations=OURS["conversations"][::-1]),
        "expected a message of the user before the first answer",
    ),
    (
        changed(OURS, conversations=[{"role": "system", "content": "x"}, OURS["conversations"][1]]),
        "expected a message of the user before the first answer",
    ),
    (
        changed(OURS, conversations=[{"role": "robot", "content": "x"}]),
        "expected a message from user or human or assistant or gpt or system, got 'robot'",
    ),
    (changed(OURS, conversations=[{"role": "user", "content": 3}]), "expected text in a message"),
    (changed(OURS, conversations=[{"role": "user", "content": " \n"}]), "of the user is empty"),
    (changed(LLAVA, conversations=[{"from": "human", "value": "<image>"}]), "user is empty"),
    (changed(OURS, phrases={"text": "dog"}), "expected a list in 'phrases'"),
    (changed(OURS, phrases=["dog"]), "expected text, turn, start and end in a phrase"),
    (phrase(start=None), "expected text, turn, start and end"),
    (json.dumps(phrase(turn=float("inf"))), "expected text, turn, start and end"),
    (phrase(start=12), "'dog' is not at characters 12..14 of turn 0"),
    (phrase(start=11, end=40), "is not at characters 11..40"),
    (phrase(turn=2), "of turn 2"),
    (phrase(turn=-1), "of turn -1"),
    (phrase(start=-4, end=-1), "is not at characters -4..-1"),
    (phrase(text="", start=3, end=3), "is not at characters 3..3"),
    (phrase(text=" dog", start=10), "begins or ends with a space"),
    (phrase(box=[5, 2, 1, 6]), "expected a box x0 y0 x1 y1"),
    (phrase(box=[-1, 2, 5, 6]), "expected a box x0 y0 x1 y1"),
    (phrase(box=[1, 2, 5]), "expected 4 numbers in 'box'"),
    (phrase(box=[1, 2, 5, "6"]), "expected 4 numbers in 'box'"),
    (phrase(box=[1, 2, 5, True]), "expected 4 numbers in 'box'"),
    (json.dumps(phrase(box=[1, 2, 5, float("nan")])), "expected 4 numbers in 'box'"),
    (phrase(box=[1, 2, 5, 10**400]), "expected 4 numbers in 'box'"),
    (phrase(mask=[1, 2]), "expected COCO RLE in 'mask', got list"),
    (phrase(point=[1]), "expected 2 numbers in 'point'"),
    (phrase(point=[-3, 1]), "expected a point x y inside"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_line_is_named_by_its_number(folder: Path, wrong: Any, message: str) -> None:
    file = write(folder / "data.jsonl", OURS, "", wrong)
    with pytest.raises(UserError) as caught:
        read_records(file)
    said = str(caught.value)
    assert said.startswith(f"{file}:3: ")
    assert message in said
    assert "\n" not in said


def test_a_wrong_record_of_an_array_is_named_by_its_number(folder: Path) -> None:
    file = write(folder / "data.json", LLAVA, changed(LLAVA, image=3))
    with pytest.raises(UserError, match=r"data\.json: record 2: expected the path"):
        read_records(file)
    file.write_text(f'[{json.dumps(LLAVA)},\n\n{{"id": ]')
    with pytest.raises(UserError, match=r"data\.json:3: malformed JSON: .* \(record 2\)"):
        read_records(file)


def test_missing_images_are_counted(folder: Path) -> None:
    items = [changed(OURS, image=f"images/{i}.png") for i in (1, 2, 2, 3, 4)]
    with pytest.raises(UserError, match=r"image not found: .*2\.png and 2 more"):
        read_records(write(folder / "x.jsonl", *items))


def test_an_image_path_may_be_absolute_inside_the_folder(folder: Path) -> None:
    image = folder / "images" / "1.png"
    (record,) = read_records(write(folder / "x.jsonl", changed(OURS, image=str(image))))
    assert record.image == image


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file or folder"),
        ("none", None, "no such file or folder"),
        ("x.txt", "[]", "expected a .json or .jsonl file, got .txt"),
        ("x.json", "{}", "expected a JSON array of records, got an object"),
        ("x.json", "3", "expected a JSON array of records, got '3'"),
        ("x.json", "", "expected at least one record, got an empty file"),
        ("x.json", " \n", "expected at least one record, got an empty file"),
        ("x.json", "[]", "expected at least one record"),
        ("x.jsonl", "", "expected at least one record, got none"),
        ("x.jsonl", "\n\n", "expected at least one record"),
        ("x.jsonl", b"\xff\xfe\x00", "expected UTF-8"),
        ("x.json", b"\xff\xfe\x00", "expected UTF-8"),
    ],
)
def test_files_that_are_no_records(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        read_records(path)
    assert name in str(caught.value)


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected llava\.json, one \.jsonl file, .*COCO"):
        read_records(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"holds 2 \.jsonl files"):
        read_records(tmp_path)


# Written and read back ------------------------------------------------------------------------

LETTERS = st.characters(exclude_categories=("Cs",))
WORDS = st.text(LETTERS, min_size=1).filter(str.strip)
COORDINATE = st.floats(0, 1e6) | st.integers(0, 10**6)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any record that a reader may give."""
    turns = [Turn("user", draw(WORDS)), Turn("assistant", draw(WORDS))] * draw(st.integers(1, 3))
    phrases = []
    for _ in range(draw(st.integers(0, 3))):
        turn = draw(st.integers(0, len(turns) - 1))
        text = turns[turn].text
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, len(text)))
        if text[start:end].strip() != text[start:end]:
            continue
        x, y, width, height = (draw(COORDINATE) for _ in range(4))
        box = (x, y, x + width, y + height) if x + width > x and y + height > y else None
        mask = draw(st.none() | st.just(rle_encode(np.eye(4, dtype=bool), compressed=False)))
        point = draw(st.none() | st.just((x, y)))
        place = (box, point, mask)
        absent = place == (None, None, None) and draw(st.booleans())
        phrases.append(Phrase(text[start:end], turn, start, end, *place, absent))
    name = draw(st.text(LETTERS.filter(lambda c: c != "\0"), min_size=1))
    image = draw(st.sampled_from([Path("/a/b"), Path("a")])) / name
    return Record(draw(st.text(LETTERS)), image, tuple(turns), tuple(phrases), draw(WORDS))


@settings(deadline=None)
@given(record=records())
def test_a_record_is_read_back_as_it_was_written(record: Record) -> None:
    line = to_json(record)
    assert "\n" not in line
    item = json.loads(line)
    name = image_name(item, "x")
    assert name is not None
    back = parse_record(item, Path(name), "x", exact=True)
    assert back == record
    assert repr(back) == repr(record)  # 1 is not 1.0


def test_a_text_about_image_tags_survives_the_way_to_disk_and_back() -> None:
    turns = (Turn("user", " <image>\n What is <image>? "), Turn("assistant", "A tag."))
    record = Record("1", Path("a.png"), turns)
    assert parse_record(json.loads(to_json(record)), Path("a.png"), "x", exact=True) == record


def test_conversations_without_an_image_are_counted(folder: Path) -> None:
    without = [changed(LLAVA, image=None), changed(LLAVA, image=""), changed(LLAVA, image=[])]
    without.append({key: value for key, value in LLAVA.items() if key != "image"})
    without.append(changed(LLAVA, image=None, images=[]))
    records = read_records(write(folder / "x.jsonl", LLAVA, *without))
    assert (len(records), records.text_only) == (1, 5)


def test_images_with_one_entry(folder: Path) -> None:
    plain = {key: value for key, value in LLAVA.items() if key != "image"}
    name = LLAVA["image"]
    both = [{**plain, "images": [name]}, {**plain, "image": [name]}]
    records = read_records(write(folder / "x.jsonl", LLAVA, *both))
    assert [r.image for r in records] == [records[0].image] * 3


def test_a_conversation_may_begin_with_the_system(folder: Path) -> None:
    said = [{"role": "system", "content": "Be brief."}, *OURS["conversations"]]
    moved = [{**one, "turn": one["turn"] + 1} for one in OURS["phrases"]]
    (record,) = read_records(
        write(folder / "x.jsonl", changed(OURS, conversations=said, phrases=moved))
    )
    assert record.turns[0] == Turn("system", "Be brief.")
    phrase = record.phrases[0]
    assert record.turns[phrase.turn].text[phrase.start : phrase.end] == phrase.text


def test_further_names_of_an_image_are_kept_and_excluded(folder: Path) -> None:
    named = changed(OURS, image_names=["COCO_val2014_000000310196.jpg"])
    file = write(folder / "x.jsonl", OURS, named, changed(OURS, image_names={"odd": 3}))
    records = read_records(file)
    assert [r.image_names for r in records] == [(), ("COCO_val2014_000000310196.jpg",), ()]
    again = json.loads(to_json(records[1]))
    assert parse_record(again, records[1].image, "x", exact=True) == records[1]
    assert (len(left := read_records(file, exclude=exclusions(["pope"]))), left.excluded) == (2, 1)


def test_a_line_end_in_an_id_leaves_one_line(folder: Path) -> None:
    problem = Problem("a.jpg", 'the box of "dog" is outside', "a\nb")
    assert "\n" not in str(Problem("a\nb", problem.problem).error())
