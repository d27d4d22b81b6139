"""Records from the files users have, and what is said about files that are wrong."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from agevlm_mlx.data.coco import read_coco
from agevlm_mlx.data.records import CAPTION_PROMPT, Phrase, Record, Turn, read_records
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
    assert read_records(folder) == [first, second]  # the only .jsonl of the folder


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


def test_a_scenes_folder_says_the_same_in_llava_and_coco(
    scenes: Path, records: list[Record]
) -> None:
    coco = read_coco(scenes / "captions.json", scenes / "instances.json", scenes / "images")
    llava = [record for record in records if record.kind == "caption"]
    assert len(coco) == len(llava) == 48
    for ours, theirs in zip(llava, coco, strict=True):
        assert theirs.turns == ours.turns
        assert theirs.image == ours.image
        assert theirs.kind == "caption"
        assert [(p.text, p.turn, p.start, p.end, p.box) for p in theirs.phrases] == [
            (p.text, p.turn, p.start, p.end, p.box) for p in ours.phrases
        ]


def test_a_folder_with_coco_tables_only_is_read(tmp_path: Path, scenes: Path) -> None:
    for name in ("captions.json", "instances.json", "images"):
        os.symlink(scenes / name, tmp_path / name)
    assert {record.kind for record in read_records(tmp_path)} == {"caption"}


# COCO -----------------------------------------------------------------------------------------

COCO_IMAGE = {"id": 5, "file_name": "1.png", "width": 20, "height": 10}


def coco(folder: Path, caption: Any, *annotations: dict[str, Any], **tables: Any) -> list[Record]:
    """One caption about one picture; categories 1 dog, 2 hot dog, 3 cup, 4 dog house."""
    names = ("dog", "hot dog", "cup", "dog house")
    instances = {
        "images": [COCO_IMAGE],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "annotations": [{"image_id": 5, "iscrowd": 0, **a} for a in annotations],
        **tables,
    }
    captions = {
        "images": [COCO_IMAGE],
        "annotations": [{"id": 9, "image_id": 5, "caption": caption}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps(captions))
    return read_coco(folder / "captions.json", folder / "instances.json", folder / "images")


def thing(category: int, x: int, y: int, w: int, h: int, form: str = "polygon") -> dict[str, Any]:
    """A rectangle of a category as a COCO annotation."""
    mask = np.zeros((10, 20), bool)
    mask[y : y + h, x : x + w] = True
    segmentation = {
        "polygon": [[x, y, x + w - 1, y, x + w - 1, y + h - 1, x, y + h - 1]],
        "rle": rle_encode(mask, compressed=False),
        "compressed": rle_encode(mask),
    }[form]
    return {"category_id": category, "bbox": [x, y, w, h], "segmentation": segmentation}


@pytest.mark.parametrize("form", ["polygon", "rle", "compressed"])
def test_coco_masks_in_every_form(folder: Path, form: str) -> None:
    (record,) = coco(folder, "A dog sits.", thing(1, 3, 2, 6, 4, form))
    assert record.turns == (Turn("user", CAPTION_PROMPT), Turn("assistant", "A dog sits."))
    (found,) = record.phrases
    assert (found.text, found.turn, found.start, found.end) == ("dog", 1, 2, 5)
    assert found.box == (3, 2, 9, 6)
    assert found.mask is not None
    wanted = np.zeros((10, 20), bool)
    wanted[2:6, 3:9] = True
    np.testing.assert_array_equal(rle_decode(found.mask), wanted)


def test_coco_polygons_follow_their_corners(folder: Path) -> None:
    triangle = {**thing(1, 0, 0, 20, 10), "segmentation": [[0, 0, 19, 0, 0, 9], [15, 8, 19, 8]]}
    (record,) = coco(folder, "A dog.", triangle)
    picture = Image.new("1", (20, 10))
    ImageDraw.Draw(picture).polygon([0, 0, 19, 0, 0, 9], fill=1)
    assert record.phrases[0].mask is not None
    mask = rle_decode(record.phrases[0].mask)
    np.testing.assert_array_equal(mask[:, :14], np.asarray(picture)[:, :14])
    assert mask[8, 15:20].all()


def test_coco_words_cover_all_instances_of_their_category(folder: Path) -> None:
    (record,) = coco(folder, "Two DOGS play.", thing(1, 0, 0, 3, 3), thing(1, 10, 5, 4, 4))
    (found,) = record.phrases
    assert (found.text, found.box) == ("DOG", (0, 0, 14, 9))
    assert found.mask is not None
    assert rle_decode(found.mask).sum() == 9 + 16


@pytest.mark.parametrize(
    ("caption", "texts"),
    [
        ("A hot dog on a table", ["hot dog"]),
        ("A hot dog and a dog", ["hot dog", "dog"]),
        ("A cup beside a dog", ["cup", "dog"]),
        ("Dog houses", ["Dog house"]),
        ("Cupcakes and doggies", []),
        ("A table", []),
    ],
)
def test_coco_finds_whole_names_the_longest_first(
    folder: Path, caption: str, texts: list[str]
) -> None:
    things = [thing(c, 2 * c, 1, 3, 3) for c in (1, 2, 3, 4)]
    (record,) = coco(folder, caption, *things)
    assert [p.text for p in record.phrases] == texts
    assert all(caption[p.start : p.end] == p.text for p in record.phrases)


def test_coco_names_what_is_absent_without_a_phrase(folder: Path) -> None:
    (record,) = coco(folder, "A dog and a cup", thing(3, 1, 1, 3, 3))
    assert [p.text for p in record.phrases] == ["cup"]


def test_coco_boxes_that_reach_out_by_rounding_are_cut(folder: Path) -> None:
    item = {**thing(1, 10, 5, 10, 5), "bbox": [10, 5, 10.01, 5.004]}
    (record,) = coco(folder, "A dog", item)
    assert record.phrases[0].box == (10, 5, 20, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bbox": [1, 2, 3]}, "instances.json: annotation 2: expected 4 numbers in 'bbox'"),
        ({"bbox": [1, 2, 0, 3]}, "annotation 2: expected a bbox x y width height"),
        ({"bbox": [30, 2, 4, 3]}, "annotation 2: expected a bbox"),
        ({"category_id": 77}, "instances.json: annotation 2: .*77"),
        ({"segmentation": {"size": [10, 20], "counts": [1]}}, "annotation 2: mask counts"),
        ({"segmentation": rle_encode(np.ones((4, 4), bool))}, r"annotation 2: .*\[10, 20\]"),
        ({"segmentation": [[1, "x"]]}, "not as COCO tables are"),
        ({"segmentation": 3}, "not as COCO tables are"),
    ],
)
def test_coco_errors_name_the_annotation(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        coco(folder, "A dog and a cup", thing(3, 0, 0, 2, 2), {**thing(1, 1, 1, 4, 4), **fields})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tables",
    [
        {"images": [{"id": 5}]},
        {"images": [{**COCO_IMAGE, "width": 10**9, "height": 10**9}]},
        {"images": [{**COCO_IMAGE, "width": 0}]},
        {"categories": 3},
        {"categories": ["dog"]},
        {"annotations": None},
        {"annotations": [1]},
    ],
)
def test_coco_tables_of_another_kind_are_refused(folder: Path, tables: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"instances\.json|captions\.json") as caught:
        coco(folder, "A dog", thing(1, 1, 1, 4, 4), **tables)
    assert "\n" not in str(caught.value)


def test_coco_captions_must_say_something_about_a_known_image(folder: Path) -> None:
    with pytest.raises(UserError, match=r"captions\.json: annotation 1: the caption is empty"):
        coco(folder, " \n")
    (folder / "images" / "1.png").unlink()
    with pytest.raises(UserError, match=r"image not found: .*1\.png"):
        coco(folder, "A dog")


# What is wrong --------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    ("{", "malformed JSON"),
    ('{"a": 1' + "0" * 5000 + "}", "malformed JSON"),
    ("[" * 200_000, "malformed JSON"),
    ("[1]", "expected an object, got list"),
    (changed(OURS, image=None), "expected the path of an image"),
    (changed(OURS, image=""), "expected the path of an image"),
    (changed(OURS, image="../secret.png"), "expected an image inside"),
    (changed(OURS, image="images/../../secret.png"), "expected an image inside"),
    (changed(OURS, image="/etc/passwd"), "expected an image inside"),
    (changed(OURS, conversations=[]), "expected a list of messages"),
    (changed(OURS, conversations="hello"), "expected a list of messages"),
    (changed(OURS, conversations=["hello"]), "expected an object for each message"),
    (changed(OURS, conversations=OURS["conversations"][:1]), "no answer to learn from"),
    (
        changed(OURS, conversations=[{"role": "robot", "content": "x"}]),
        "expected a message from user or human or assistant or gpt, got 'robot'",
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
    file.write_text('[{"id": 1},\n\n{"id": ]')
    with pytest.raises(UserError, match=r"data\.json:3: malformed JSON"):
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
        ("x.json", "{}", "expected a JSON array of records, got dict"),
        ("x.json", "[]", "expected at least one record"),
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
    with pytest.raises(UserError, match=r"expected llava\.json, one \.jsonl file, or captions"):
        read_records(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"holds 2 \.jsonl files"):
        read_records(tmp_path)
