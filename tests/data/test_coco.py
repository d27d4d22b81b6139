"""COCO's tables as records: words of captions tied to instances, and what may be odd in them."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data import coco_nouns
from agevlm_mlx.data.coco import read_coco
from agevlm_mlx.data.outlines import instance_mask
from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.records import CAPTION_PROMPT, Problem, Record, Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_decode, rle_encode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with one picture, 20 x 10 px."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "1.png")
    return tmp_path


def test_a_scenes_folder_says_the_same_in_llava_and_coco(
    scenes: Path, records: list[Record]
) -> None:
    coco = good(read_coco(scenes / "captions.json", scenes / "instances.json", scenes / "images"))
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


def good(found: Iterable[Record | Problem]) -> list[Record]:
    """What was read, of which nothing is a problem."""
    found = list(found)
    assert not [one for one in found if isinstance(one, Problem)]
    return [one for one in found if isinstance(one, Record)]


def read(
    folder: Path, caption: Any, *annotations: dict[str, Any], **tables: Any
) -> list[Record | Problem]:
    """One caption about one picture; categories 1 dog, 2 hot dog, 3 cup, 4 dog house."""
    names = ("dog", "hot dog", "cup", "dog house")
    instances = {
        "images": [COCO_IMAGE],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "annotations": [{"image_id": 5, "iscrowd": 0, **a} for a in annotations],
        **tables,
    }
    captions = {
        "info": {"year": 2017},
        "images": [COCO_IMAGE],
        "annotations": [{"id": 9, "image_id": 5, "caption": caption}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps(captions))
    files = (folder / name for name in ("captions.json", "instances.json", "images"))
    return list(read_coco(*files))


def coco(folder: Path, caption: Any, *annotations: dict[str, Any]) -> list[Record]:
    """The same, of which nothing is a problem."""
    return good(read(folder, caption, *annotations))


def thing(category: int, x: int, y: int, w: int, h: int, form: str = "polygon") -> dict[str, Any]:
    """A rectangle of a category as a COCO annotation."""
    mask = np.zeros((10, 20), bool)
    mask[y : y + h, x : x + w] = True
    segmentation = {
        "polygon": [[x, y, x + w, y, x + w, y + h, x, y + h]],
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
    outlines = [[0, 0, 19.4, 0, 0, 9.7], [15, 8, 19, 8], [-5, 8.6, 3, 8.6, 3, 50, -5, 50]]
    triangle = {**thing(1, 0, 0, 20, 10), "segmentation": outlines}
    (record,) = coco(folder, "A dog.", triangle)
    assert record.phrases[0].mask is not None
    mask = rle_decode(record.phrases[0].mask)
    y, x = np.indices((10, 20)) + 0.5
    wanted = (x / 19.4 + y / 9.7 < 1) | ((x < 3) & (y > 8.6))  # the line has no pixel
    np.testing.assert_array_equal(mask, wanted)


def test_a_square_of_ten_pixels_has_a_hundred() -> None:
    square = {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}
    assert instance_mask(square, (20, 30), "").sum() == 100
    bow = {"segmentation": [[0, 0, 10, 10, 10, 0, 0, 10]]}  # crosses itself
    assert instance_mask(bow, (20, 30), "").sum() in range(40, 61)


def test_hyphens_of_captions_are_spaces(folder: Path) -> None:
    (record,) = coco(folder, "A dog-house, two well-fed DOGS.", thing(1, 3, 2, 6, 4))
    assert [p.text for p in record.phrases] == ["DOGS"]
    nouns = coco_nouns.of_classes(["hot dog", "fire hydrant", "truck"])
    text = "Hot-dogs, a fire-hydrant and a pick-up truck"
    assert [(name, text[a:b]) for name, a, b in nouns.find(text)] == [
        ("hot dog", "Hot-dogs"),
        ("fire hydrant", "fire-hydrant"),
        ("truck", "pick-up truck"),
    ]
    assert coco_nouns.ours().mentions(text) == ["truck"]  # CHAIR counts as it did


def test_coco_words_cover_all_instances_of_their_category(folder: Path) -> None:
    (record,) = coco(folder, "Two DOGS play.", thing(1, 0, 0, 3, 3), thing(1, 10, 5, 4, 4))
    (found,) = record.phrases
    assert (found.text, found.box) == ("DOGS", (0, 0, 14, 9))
    assert found.mask is not None
    assert rle_decode(found.mask).sum() == 9 + 16


@pytest.mark.parametrize(
    ("caption", "texts"),
    [
        ("A hot dog on a table", ["hot dog"]),
        ("A hot dog and a dog", ["hot dog", "dog"]),
        ("A cup beside a dog", ["cup", "dog"]),
        ("Dog houses", ["Dog houses"]),
        ("Two mugs and a PUPPY's hotdog", ["mugs", "PUPPY", "hotdog"]),
        ("A dog looks at a dog", ["dog", "dog"]),
        ("Cupcakes and dogmas", []),
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


def test_categories_of_other_data_sets_keep_their_names() -> None:
    nouns = coco_nouns.of_classes(["Traffic_Light", "dog", "sofa", "mug"])
    said = "Stoplights, a hot dog, a mug and a cup, a couch or sofa, a dog house, two puppies"
    assert nouns.mentions(said) == ["Traffic_Light", "mug", "sofa", "dog"]


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
        ({"bbox": [1, 2, -3, 3]}, "annotation 2: expected a bbox x y width height"),
        ({"bbox": None}, "annotation 2: expected a bbox x y width height"),
        ({"image_id": [5]}, r"annotation 2: expected an id, got \[5\]"),
        ({"category_id": None}, "annotation 2: expected an id"),
        ({"segmentation": [[1, 2, 3]]}, "annotation 2: .*expected x y"),
        ({"segmentation": [[1e300, 2, 3, 4]]}, "annotation 2: .*far outside"),
        ({"segmentation": [[float("nan"), 2, 3, 4]]}, "annotation 2: .*far outside"),
        ({"bbox": [30, 2, 4, 3]}, "annotation 2: expected a bbox"),
        ({"category_id": 77}, "instances.json: annotation 2: .*77"),
        ({"segmentation": {"size": [10, 20], "counts": [1]}}, "annotation 2: mask counts"),
        ({"segmentation": rle_encode(np.ones((4, 4), bool))}, r"annotation 2: .*\[10, 20\]"),
        ({"segmentation": [[1, "x"]]}, "not as COCO tables are"),
        ({"segmentation": 3}, "not as COCO tables are"),
    ],
)
def test_a_bad_instance_is_named_and_left_out(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    cup = thing(3, 0, 0, 2, 2)
    found = read(folder, "A dog and a cup", cup, {**thing(1, 1, 1, 4, 4), **fields})
    (problem,) = (one for one in found if isinstance(one, Problem))
    said = str(problem.error())
    assert said.startswith(f"{folder / 'instances.json'}: annotation 2: ")
    assert "\n" not in said
    assert re.search(message, said)
    (record,) = (one for one in found if isinstance(one, Record))
    assert [p.text for p in record.phrases] == ["cup"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"images": [{"id": 5}]}, r"instances\.json: image 1: expected an image with pixels"),
        ({"images": [{**COCO_IMAGE, "width": 10**9, "height": 10**9}]}, "image 1: .* at most"),
        ({"images": [{**COCO_IMAGE, "width": 0}]}, "image 1: expected an image with pixels"),
        ({"images": [{**COCO_IMAGE, "height": "10"}]}, "image 1: expected an image with pixels"),
        ({"categories": ["dog"]}, "category 1: expected an object, got 'dog'"),
        ({"categories": [{"id": 1, "name": 7}]}, "category 1: expected text in 'name', got 7"),
        ({"annotations": [1]}, "annotation 1: expected an object, got 1"),
    ],
)
def test_bad_entries_of_instances_leave_the_caption(
    folder: Path, tables: dict[str, Any], message: str
) -> None:
    found = read(folder, "A dog", thing(1, 1, 1, 4, 4), **tables)
    problems = [str(one.error()) for one in found if isinstance(one, Problem)]
    assert re.search(message, problems[0])
    assert "\n" not in problems[0]
    (record,) = (one for one in found if isinstance(one, Record))
    assert record.phrases == ()


@pytest.mark.parametrize(
    "tables", [{"categories": 3}, {"annotations": None}, {"images": {}}, {"annotations": []}]
)
def test_tables_of_another_kind_are_refused(folder: Path, tables: dict[str, Any]) -> None:
    (key,) = tables
    with pytest.raises(UserError, match=rf"instances\.json: not as COCO .* expected {key}, got"):
        read(folder, "A dog", thing(1, 1, 1, 4, 4), **tables)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one JSON object with lists in it, got the end of the file"),
        ("[]", "expected one JSON object with lists in it, got '\\['"),
        ('{"images": [', ":1: malformed JSON"),
        ('{"images": [{}\n\n{}]}', ":3: malformed JSON: expected , or \\], got '{'"),
        ('{\n"images" []}', ":2: malformed JSON: expected :, got '\\['"),
        ('{"images": [{"id": ]}', ":1: malformed JSON"),
        ('{"images": [], "a": 1' + "0" * 5000 + "}", ":1: malformed JSON"),
        ('{"images": ' + "[" * 200_000, ":1: malformed JSON"),
        (b"\xff\xfe{\0}\0", "expected one JSON object"),
    ],
)
def test_files_that_are_no_tables_are_refused(
    folder: Path, text: str | bytes, message: str
) -> None:
    captions = folder / "captions.json"
    captions.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        list(read_coco(captions, None, folder / "images"))
    assert str(caught.value).startswith(str(captions))
    assert "\n" not in str(caught.value)


def captions_of(folder: Path, **tables: Any) -> list[Record | Problem]:
    """What a table of captions alone gives, with some lists of it replaced."""
    texts = {
        "images": [COCO_IMAGE],
        "annotations": [{"id": 9, "image_id": 5, "caption": "A dog"}],
    }
    (folder / "captions.json").write_text(json.dumps({**texts, **tables}))
    return list(read_coco(folder / "captions.json", None, folder / "images"))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"annotations": [{"id": 9, "image_id": 5, "caption": " \n"}]}, "expected text in 'cap"),
        ({"annotations": [{"id": 9, "image_id": 5, "caption": 3}]}, "expected text in 'caption'"),
        ({"annotations": [{"image_id": 5, "caption": "\ud83d"}]}, "1: expected whole letters"),
        ({"annotations": [{"id": 9, "image_id": 5}]}, "annotation 1: expected text in 'caption'"),
        ({"annotations": [{"id": 9, "caption": "x"}]}, "annotation 1: expected an id, got None"),
        ({"annotations": [{"image_id": 6, "caption": "x"}]}, "1: its image 6 is not in 'images'"),
        ({"images": [{"id": 5, "file_name": "../1.png"}]}, "image 1: expected an image inside"),
        ({"images": [{"id": 5, "file_name": "/etc/passwd"}]}, "image 1: expected an image inside"),
        ({"images": [{"id": 5, "file_name": "a\0b"}]}, "image 1: expected text in 'file_name'"),
        ({"images": [{"id": 5}]}, "image 1: expected text in 'file_name', got None"),
        ({"images": [{"file_name": "1.png"}, COCO_IMAGE]}, "image 1: expected an id, got None"),
    ],
)
def test_a_bad_caption_is_named_and_left_out(
    folder: Path, tables: dict[str, Any], message: str
) -> None:
    problem, *others = captions_of(folder, **tables)
    assert isinstance(problem, Problem)
    said = str(problem.error())
    assert re.search(message, said)
    assert said.startswith(f"{folder / 'captions.json'}: ")
    assert "\n" not in said
    assert len(others) == ("file_name': '1.png'}, {" in str(tables))  # only there is a good one


def test_captions_are_read_without_instances_and_in_any_letters(folder: Path) -> None:
    said = ["Ein Hund \U0001f415 im Gr\xfcnen.\n", "A dog."]
    rows = [{"id": n, "image_id": 5, "caption": text} for n, text in enumerate(said)]
    first, second = good(captions_of(folder, annotations=rows))
    assert first.turns[1].text == "Ein Hund \U0001f415 im Gr\xfcnen."
    assert (first.id, second.id, first.phrases) == ("0", "1", ())
    text = json.dumps({"images": [COCO_IMAGE], "annotations": rows}, ensure_ascii=False)
    (folder / "captions.json").write_text(text, encoding="utf-8-sig")
    files = folder / "captions.json", None, folder / "images"
    assert good(read_coco(*files)) == [first, second]


def test_captions_of_a_picture_stand_together_whatever_their_order(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "images" / "2.png")
    pictures = [COCO_IMAGE, {"id": "six", "file_name": "2.png"}]
    rows = [{"id": n, "image_id": ["six", 5][n % 2], "caption": f"Text {n}"} for n in range(6)]
    # The annotations may also come first.
    (folder / "captions.json").write_text(json.dumps({"annotations": rows, "images": pictures}))
    found = good(read_coco(folder / "captions.json", None, folder / "images"))
    assert [(r.image.name, r.id) for r in found] == [
        ("2.png", "0"), ("2.png", "2"), ("2.png", "4"),
        ("1.png", "1"), ("1.png", "3"), ("1.png", "5"),
    ]  # fmt: skip


def test_tables_longer_than_what_is_read_at_a_time(folder: Path) -> None:
    rows = [{"id": n, "image_id": 5, "caption": f"Text {n} " + "x" * 997} for n in range(2500)]
    found = good(captions_of(folder, annotations=rows))
    assert (folder / "captions.json").stat().st_size > 2 << 20
    assert [r.turns[1].text for r in found] == [row["caption"] for row in rows]


def test_crowds_and_things_without_outline_belong_to_the_mask(folder: Path) -> None:
    crowd = {**thing(1, 10, 5, 4, 4, "rle"), "iscrowd": 1}
    boxed = {**thing(1, 0, 8, 3, 2), "segmentation": []}
    (record,) = coco(folder, "Dogs", thing(1, 0, 0, 3, 3), crowd, boxed)
    (found,) = record.phrases
    assert found.box == (0, 0, 14, 10)
    assert found.mask is not None
    wanted = np.zeros((10, 20), bool)
    wanted[0:3, 0:3] = wanted[5:9, 10:14] = wanted[8:10, 0:3] = True
    np.testing.assert_array_equal(rle_decode(found.mask), wanted)
    (record,) = coco(folder, "Dogs", thing(1, 0, 0, 3, 3), boxed)
    assert record.phrases[0].mask is not None
    wanted[5:9] = False
    wanted[8:10, 0:3] = True
    np.testing.assert_array_equal(rle_decode(record.phrases[0].mask), wanted)
    (record,) = coco(folder, "Dogs", boxed)  # detections only
    assert record.phrases[0].box == (0, 8, 3, 10)
    assert record.phrases[0].mask is None


def test_boxes_without_area_as_coco_has_them_are_passed_over(folder: Path) -> None:
    flat = {**thing(1, 3, 3, 4, 1), "bbox": [3, 3, 4.2, 0.0]}
    (record,) = coco(folder, "A dog", flat)
    assert record.phrases == ()


def test_the_mask_of_several_is_that_of_each_drawn_alone(folder: Path) -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        polygons = [np.round(rng.uniform(-3, (23, 13), (5, 2)), 2) for _ in range(3)]
        things = [
            {**thing(1, 0, 0, 20, 10), "segmentation": [polygon.ravel().tolist()]}
            for polygon in polygons
        ]
        (record,) = coco(folder, "Dogs", *things)
        alone = [instance_mask(item, (10, 20), "") for item in things]
        assert record.phrases[0].mask is not None
        np.testing.assert_array_equal(rle_decode(record.phrases[0].mask), np.any(alone, axis=0))


# Folders --------------------------------------------------------------------------------------


def published(root: Path, *splits: str, images: str = "{}") -> Path:
    """The tables and pictures of some splits as COCO publishes them."""
    (root / "annotations").mkdir(parents=True)
    for n, split in enumerate(splits, 1):
        place = root / images.format(split)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(place / f"{n:012}.jpg")
        picture = {**COCO_IMAGE, "file_name": f"{n:012}.jpg"}
        texts = [{"id": 1, "image_id": 5, "caption": f"A dog of {split}"}]
        tables = {
            "captions": {"images": [picture], "annotations": texts},
            "instances": {
                "images": [picture],
                "annotations": [{"image_id": 5, **thing(18, 1, 1, 4, 4)}],
                "categories": [{"id": 18, "name": "dog"}],
            },
        }
        for kind, table in tables.items():
            (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(table))
    return root


@pytest.mark.parametrize("images", ["{}", "images/{}", "images"])
def test_coco_as_published(tmp_path: Path, images: str) -> None:
    root = published(tmp_path / "coco", "train2017", "val2017", images=images)
    records = read_records(root)  # of several splits, that of training
    assert [r.turns[1].text for r in records] == ["A dog of train2017"]
    assert records[0].image == root / images.format("train2017") / "000000000001.jpg"
    assert [p.text for p in records[0].phrases] == ["dog"]
    assert records.root == root
    records = read_records(root / "annotations" / "captions_val2017.json")
    assert [r.turns[1].text for r in records] == ["A dog of val2017"]
    assert records.root == root


def test_of_two_training_splits_one_has_to_be_named(tmp_path: Path) -> None:
    root = published(tmp_path, "train2014", "train2017")
    with pytest.raises(
        UserError, match=r"captions_train2014\.json, captions_train2017\.json; pass"
    ):
        read_records(root)


def test_a_missing_picture_is_told(tmp_path: Path) -> None:
    root = published(tmp_path, "train2017")
    (root / "train2017" / "000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"image not found: .*000000000001\.jpg"):
        read_records(root)
