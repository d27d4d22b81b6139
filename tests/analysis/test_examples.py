"""Pictures with captions, hard negatives and masks, from every format they come in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.analysis.examples import Example, read_examples
from agevlm_mlx.data import scenes
from agevlm_mlx.data.noun_vocabulary import NounVocabulary
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.targets import rle_encode


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "test"
    scenes.write_scenes(folder, 8, seed=1, split="test")
    return folder


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)


def coco(root: Path, name: str = "_val2017", images: str = "val2017") -> Path:
    """Three pictures as COCO publishes them, of which the third is not there."""
    categories = [
        {"id": 18, "name": "dog", "supercategory": "animal"},
        {"id": 17, "name": "cat", "supercategory": "animal"},
        {"id": 19, "name": "horse", "supercategory": "animal"},
        {"id": 3, "name": "car", "supercategory": "vehicle"},
        {"id": 6, "name": "bus", "supercategory": "vehicle"},
    ]
    rows = [{"id": n, "file_name": f"{n}.png", "height": 30, "width": 40} for n in (1, 2, 3)]
    square = [[10, 10, 20, 10, 20, 20, 10, 20]]
    crowd = np.zeros((30, 40), bool)
    crowd[:, 30:] = True
    annotations = [
        {"image_id": 1, "category_id": 18, "bbox": [10, 10, 10, 10], "segmentation": square},
        {
            "image_id": 1,
            "category_id": 18,
            "bbox": [30, 0, 10, 30],
            "iscrowd": 1,
            "segmentation": rle_encode(crowd, compressed=False),
        },
        {"image_id": 1, "category_id": 3, "bbox": [10, 10, 10, 10], "segmentation": square},
        {"image_id": 2, "category_id": 3, "bbox": [10, 10, 10, 10], "segmentation": square},
    ]
    said = [
        (1, "A dog and another dog."),
        (1, "Two dogs by a bus."),
        (2, " Cars. "),
        (3, "A cat."),
    ]
    tables = root / "annotations"
    tables.mkdir(parents=True, exist_ok=True)
    (tables / f"instances{name}.json").write_text(
        json.dumps({"images": rows, "annotations": annotations, "categories": categories})
    )
    captions = [{"image_id": n, "caption": text} for n, text in said]
    (tables / f"captions{name}.json").write_text(
        json.dumps({"images": rows, "annotations": captions})
    )
    for n in (1, 2):
        picture(root / images / f"{n}.png")
    return root


def test_a_scenes_folder_gives_exact_masks_and_one_exchanged_noun(drawn):
    examples = read_examples(drawn)
    assert len(examples) == 8
    nouns = {c["name"] for c in json.loads((drawn / "instances.json").read_text())["categories"]}
    words = NounVocabulary(list(nouns))
    for example in examples:
        assert set(words.mentions(example.caption)) == set(example.objects)
        for mask in example.objects.values():
            assert mask().shape == (128, 128)
            assert mask().any()
        assert example.hard is not None
        before, after = (words.mentions(text) for text in (example.caption, example.hard))
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert len(changed) == 1
        assert changed[0][1] not in example.objects
        assert 0 < len(example.absent) <= max(1, len(example.objects))
        assert not set(example.absent) & set(example.objects)


def facts(examples: list[Example]) -> list[Any]:
    return [(e.image.name, e.caption, e.hard, e.absent) for e in examples]


def test_the_same_seed_gives_the_same_sample_and_a_picture_is_the_same_in_any(drawn):
    few = read_examples(drawn, limit=3, seed=4)
    assert facts(few) == facts(read_examples(drawn, limit=3, seed=4))
    assert facts(few) != facts(read_examples(drawn, limit=3, seed=5))
    every = facts(read_examples(drawn, seed=4))
    assert [fact for fact in every if fact in facts(few)] == facts(few)


def test_coco_as_published(tmp_path):
    one, two = read_examples(coco(tmp_path))  # the third picture is not there
    assert (one.image, one.caption) == (tmp_path / "val2017" / "1.png", "A dog and another dog.")
    assert two.caption == "Cars."
    mask = one.objects["dog"]()
    assert mask[15, 15]  # a polygon and a crowd's run lengths, of one category
    assert mask[5, 35]
    assert not mask[5, 5]
    # Only a caption knows of the bus in the first picture: it is not absent. Animals come first,
    # as there is one; the picture has two things, so at most two absent ones are asked for.
    assert set(one.absent) == {"cat", "horse"}
    assert one.hard in ("A cat and another dog.", "A horse and another dog.")
    assert two.absent == ("bus",)
    assert two.hard is None  # no noun that could be exchanged as it stands


def test_the_set_whose_pictures_are_there_is_taken(tmp_path):
    coco(tmp_path, "_train2017", "train2017")
    text = (tmp_path / "annotations" / "captions_train2017.json").read_text()
    for kind in ("captions", "instances"):
        (tmp_path / "annotations" / f"{kind}_val2017.json").write_text(text)
    assert read_examples(tmp_path)[0].image == tmp_path / "train2017" / "1.png"


def record(image: str, *texts: tuple[str, str], **more: Any) -> str:
    turns = [{"role": role, "content": text} for role, text in texts]
    return json.dumps({"id": image, "image": image, "conversations": turns, **more})


def test_records_with_boxes_and_masks(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    upper = np.arange(30)[:, None] * np.ones(40) < 10
    halves = [rle_encode(part) for part in (upper, ~upper)]
    ask = ("user", "What is it?")
    lines = [
        record("a.png", ("user", "Is there a cat?"), ("assistant", "No")),
        record(
            "a.png",
            ask,
            ("assistant", "A red ball on grass."),
            phrases=[
                {"text": "A red ball", "turn": 1, "start": 0, "end": 10, "box": [2, 3, 7.5, 9]},
                *(
                    {"text": "grass", "turn": 1, "start": 14, "end": 19, "mask": half}
                    for half in halves
                ),
            ],
        ),
        record(
            "b.png",
            ask,
            ("assistant", "A dog."),
            kind="caption",
            phrases=[{"text": "dog", "turn": 1, "start": 2, "end": 5, "box": [0, 0, 99, 99]}],
        ),
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    one, two = read_examples(tmp_path / "data.jsonl")
    assert one.caption == "A red ball on grass."
    box = one.objects["red ball"]()
    assert box.sum() == 6 * 6
    assert box[3:9, 2:8].all()
    assert one.objects["grass"]().all()
    assert one.absent == ("dog",)
    assert one.hard in ("A dog on grass.", "A red ball on dog.")
    assert two.objects["dog"]().all()  # a box that reaches out of the picture ends with it


def test_what_cannot_be_used_is_said(tmp_path, drawn):
    with pytest.raises(UserError, match="no such folder"):
        read_examples(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--limit: expected at least 2"):
        read_examples(drawn, limit=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected"):
        read_examples(tmp_path / "empty")
    root = coco(tmp_path / "alone")
    (root / "val2017" / "2.png").unlink()
    with pytest.raises(UserError, match=r"at least 2 images with captions .*got 1"):
        read_examples(root)
    (root / "val2017" / "1.png").unlink()
    with pytest.raises(UserError, match="found none of its images; looked in"):
        read_examples(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["images"][0].update(file_name="../../etc/passwd"), "inside"),
        (lambda t: t["images"][0].pop("file_name"), "captions_val2017.json: not as COCO"),
        (lambda t: t["annotations"][1].pop("caption"), "captions_val2017.json: annotation 2"),
        (lambda t: t.update(annotations=7), "not as COCO tables are"),
    ],
)
def test_a_damaged_table_is_named(change, message, tmp_path):
    path = coco(tmp_path) / "annotations" / "captions_val2017.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path)


@pytest.mark.parametrize("segmentation", [None, 3, [[1, "a"]], {"size": [30, 40], "counts": [7]}])
def test_a_damaged_mask_is_named_when_it_is_read(segmentation, tmp_path):
    path = coco(tmp_path) / "annotations" / "instances_val2017.json"
    table = json.loads(path.read_text())
    table["annotations"][0]["segmentation"] = segmentation
    path.write_text(json.dumps(table))
    mask = read_examples(tmp_path)[0].objects["dog"]
    with pytest.raises(UserError, match=r"instances_val2017\.json: annotation 1"):
        mask()


def test_records_without_places_are_refused(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    lines = [
        record(n, ("user", "?"), ("assistant", "A dog."), kind="caption")
        for n in ("a.png", "b.png")
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="no phrase in it has a box or mask"):
        read_examples(tmp_path)
