"""RefCOCO's phrases as records: what is asked and answered, and what may be odd in its files."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.data.records import Phrase, Problem, Record, Turn
from agevlm_mlx.data.refcoco import bare, is_refcoco, place, read_refcoco
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_decode, rle_encode

WIDTH, HEIGHT = 30, 24
#: Annotation -> its picture and x y width height.
THINGS = {11: (1, [0, 0, 8, 8]), 12: (1, [20, 9, 10, 6]), 21: (2, [11, 9, 6, 5])}


def file_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def ref(ann: Any, split: str, *said: Any, **fields: Any) -> dict[str, Any]:
    """An entry of refs(...).p as published."""
    image = THINGS[ann][0] if ann in THINGS else 1
    sentences = [
        {"tokens": str(s).split(), "raw": str(s).upper(), "sent_id": n, "sent": s}
        for n, s in enumerate(said)
    ]
    return {
        "ann_id": ann, "image_id": image, "ref_id": 100 + ann, "split": split, "category_id": 1,
        "file_name": f"COCO_train2014_{image:012d}_{ann}.jpg", "sentences": sentences,
        "sent_ids": list(range(len(said))), **fields,
    }  # fmt: skip


def instances(**changed: Any) -> dict[str, Any]:
    """The table of instances; `changed`: fields of annotation 11."""
    rows = [
        {
            "id": ann, "image_id": image, "category_id": 1, "bbox": [x, y, w, h + 0.0],
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for ann, (image, (x, y, w, h)) in THINGS.items()
    ]  # fmt: skip
    rows[0] |= changed
    # Nobody asks about it, so that nobody is told what is wrong with it.
    rows.append({"id": 99, "image_id": 1, "category_id": 1, "bbox": "none", "segmentation": 3})
    return {
        "info": {},
        "images": [
            {"id": n, "file_name": file_name(n), "height": HEIGHT, "width": WIDTH} for n in (1, 2)
        ],
        "annotations": rows,
        "categories": [{"id": 1, "name": "person"}],
    }


REFS = [
    ref(11, "train", "the left man", "man in  blue."),
    ref(12, "val", "never trained on"),
    ref(21, "train", "A big dog"),
]


def write(root: Path, refs: Any = REFS, name: str = "refcoco", maker: str = "unc") -> Path:
    """A dataset as its authors publish it, with the pictures of COCO where REFER has them."""
    pictures = root / "images/mscoco/images/train2014"
    pictures.mkdir(parents=True, exist_ok=True)
    for n in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (n, 0, 0)).save(pictures / file_name(n))
    (root / name).mkdir(exist_ok=True)
    (root / name / f"refs({maker}).p").write_bytes(pickle.dumps(refs, 2))
    (root / name / "instances.json").write_text(json.dumps(instances()))
    return root / name


def test_training_phrases_as_published(tmp_path: Path) -> None:
    folder = write(tmp_path)
    records = read_records(folder)
    assert [r.id for r in records] == ["refcoco-111-1", "refcoco-111-2", "refcoco-121-1"]
    assert records.root == tmp_path  # the pictures lie beside the folder that was given
    first, second, third = records
    assert first.image == tmp_path / "images/mscoco/images/train2014" / file_name(1)
    assert first.kind == "refer"
    assert first.turns == (
        Turn("user", "Where is the left man?"),
        Turn("assistant", "At the top left."),
    )
    assert second.turns[0].text == "Where is the man in blue?"
    assert third.turns == (
        Turn("user", "Where is the big dog?"),
        Turn("assistant", "In the middle."),
    )
    (phrase,) = first.phrases
    assert phrase.mask is not None
    assert phrase == Phrase("left man", 0, 13, 21, (0, 0, 8, 8), None, phrase.mask)
    assert first.turns[0].text[phrase.start : phrase.end] == "left man"
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[:8, :8] = True
    np.testing.assert_array_equal(rle_decode(phrase.mask), wanted)


def test_a_data_folder_with_several_datasets(tmp_path: Path) -> None:
    write(tmp_path, [ref(11, "train", "google's")], maker="google")
    write(tmp_path)
    write(tmp_path, [ref(21, "train", "dog")], name="refcocog", maker="umd")
    records = read_records(tmp_path)
    # Of two splittings of RefCOCO one is read.
    assert [r.id.split("-")[0] for r in records] == ["refcoco", "refcoco", "refcoco", "refcocog"]
    assert records.root == tmp_path
    (only,) = read_records(tmp_path / "refcoco" / "refs(google).p")
    assert only.phrases[0].text == "google's"


def test_test_pictures_of_one_dataset_are_not_trained_on_by_another(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, [ref(21, "test", "dog"), ref(11, "train", "man")], "refcocog", "umd")
    records = read_records(tmp_path / "refcoco")  # alone, it is as published
    assert {r.image.name for r in records} == {file_name(1), file_name(2)}
    write(tmp_path, [ref(21, "test", "dog"), ref(21, "train", "a dog")], "refcocog", "umd")
    records = read_records(tmp_path)
    assert [r.id for r in records] == ["refcoco-111-1", "refcoco-111-2", "refcocog-121-1"]


def test_pictures_may_lie_below_the_dataset_itself(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (tmp_path / "images/mscoco/images/train2014").rename(folder / "train2014")
    records = read_records(folder)
    assert records.root == folder
    assert records[0].image == folder / "train2014" / file_name(1)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("the man", "man"),
        ("A  dog.", "dog"),
        ("an apple ?", "apple"),
        ("theatre", "theatre"),
        ("the", "the"),
        (" . ", ""),
    ],
)
def test_phrases_go_into_a_question(said: str, words: str) -> None:
    assert bare(said) == words


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ((0, 0, 9, 9), "At the top left."),
        ((12, 0, 18, 4), "At the top."),
        ((21, 20, 30, 30), "At the bottom right."),
        ((13, 25, 17, 30), "At the bottom."),
        ((0, 10, 4, 20), "On the left."),
        ((25, 12, 29, 18), "On the right."),
        ((0, 0, 30, 30), "In the middle."),
    ],
)
def test_answers_say_where_the_middle_is(box: tuple[float, ...], answer: str) -> None:
    x0, y0, x1, y1 = box
    assert place((x0, y0, x1, y1), (30, 30)) == answer
    # Thirds of each side, not of the longer one.
    assert place((x0 * 4, y0, x1 * 4, y1), (30, 120)) == answer


def found(folder: Path) -> tuple[list[str], list[str]]:
    """What is said of the problems, and the ids of the records."""
    every = list(read_refcoco(folder))
    said = [str(one.error()) for one in every if isinstance(one, Problem)]
    assert all("\n" not in one for one in said)
    return said, [one.id for one in every if isinstance(one, Record)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("x", r"expected ann_id, image_id, split, sentences, got 'x'"),
        (ref(11, "train", "x", ann_id="11"), "expected ann_id"),
        (ref(11, "train", "x", sentences=None), "expected ann_id"),
        (ref(11, "train", "x", image_id=3), "its picture 3 is not in instances.json"),
        (ref(77, "train", "x"), "its annotation 77 is not in instances.json"),
        (ref(11, "train", " "), "expected a phrase, got ' '"),
        (ref(11, "train", 5), "expected a phrase, got 5"),
        (ref(11, "train", "half \ud83d"), "expected a phrase"),
    ],
)
def test_a_bad_entry_is_named_and_left_out(tmp_path: Path, bad: Any, message: str) -> None:
    folder = write(tmp_path, [bad, *REFS])
    (said,), ids = found(folder)
    assert said.startswith(f"{folder / 'refs(unc).p'}: entry 1: ")
    assert re.search(message, said)
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bbox": [1, 2, 3]}, "annotation 1: expected 4 numbers in 'bbox'"),
        ({"bbox": [40, 2, 3, 3]}, "annotation 1: expected a bbox x y width height"),
        ({"bbox": [4, 2, 3, 0]}, "annotation 1: expected a bbox with an area"),
        ({"segmentation": [[1, 2, 3]]}, "annotation 1: .*expected polygons or RLE"),
        ({"segmentation": rle_encode(np.ones((4, 4), bool))}, "annotation 1: expected a mask of"),
    ],
)
def test_bad_outlines_are_named_and_left_out(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path)
    (folder / "instances.json").write_text(json.dumps(instances(**changed)))
    (said,), ids = found(folder)
    assert re.search(message, said)
    assert ids == ["refcoco-121-1"]


@pytest.mark.parametrize("name", ["../1.jpg", "/etc/passwd"])
def test_pictures_outside_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder, table = write(tmp_path), instances()
    table["images"][0]["file_name"] = name
    (folder / "instances.json").write_text(json.dumps(table))
    (said,), ids = found(folder)
    assert "expected an image inside" in said
    assert ids == ["refcoco-121-1"]


class Hostile:
    """Would make a folder when unpickled by a careless reader."""

    def __reduce__(self) -> Any:
        return Path.mkdir, (Path("made-by-a-pickle"),)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"refs": REFS}, "expected a pickle of a list, got dict"),
        ([Hostile()], "expected a pickle of lists, dicts, numbers and strings"),
        ([ref(12, "val", "x"), ref(12, "testA", "x")], "the split 'train', got testA, val"),
    ],
)
def test_files_that_are_not_refcocos_are_refused(tmp_path: Path, refs: Any, message: str) -> None:
    folder = write(tmp_path, refs)
    with pytest.raises(UserError, match=message):
        list(read_refcoco(folder))
    assert not Path("made-by-a-pickle").exists()


def test_instances_have_to_lie_beside_the_phrases(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "instances.json").unlink()
    with pytest.raises(UserError, match=r"instances\.json: no such file"):
        read_records(folder)
    assert is_refcoco(folder)
    assert not is_refcoco(folder / "instances.json")
