"""CHAIR: which words name a class, which objects a picture has, and scores worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agevlm_mlx.benchmarks import chair
from agevlm_mlx.benchmarks.coco_tables import read_table
from agevlm_mlx.data import coco_nouns
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.scoring import as_item
from agevlm_mlx.evaluation.source import Source

CATEGORIES = {1: "person", 17: "cat", 18: "dog", 62: "chair", 70: "toilet", 3: "car"}
#: image id -> categories of its instances, and its reference captions.
PICTURES: dict[int, tuple[list[int], list[str]]] = {
    9: ([18, 1, 1], ["A man plays with his dog.", "Someone throws a frisbee"]),
    25: ([17], ["Two kittens on the sofa."]),
    30: ([], ["A toilet with its seat up."]),
    42: ([3], ["A car."]),
}


def file_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As COCO is published; of picture 42 there are only annotations."""
    (tmp_path / "val2014").mkdir()
    (tmp_path / "annotations").mkdir()
    for number in (9, 25, 30):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / "val2014" / file_name(number))
    images = [
        {"license": 5, "file_name": file_name(n), "height": 6, "width": 8, "id": n}
        for n in PICTURES
    ]
    captions = [
        {"image_id": n, "id": 100 * n + k, "caption": text}
        for n, (_, texts) in PICTURES.items()
        for k, text in enumerate(texts)
    ]
    instances = [
        {
            "segmentation": [[0.0, 0.0, 4.0, 0.0, 4.0, 4.0]],
            "area": 8.0,
            "iscrowd": 0,
            "image_id": n,
            "bbox": [0.0, 0.0, 4.0, 4.0],
            "category_id": category,
            "id": 1000 * n + k,
        }
        for n, (categories, _) in PICTURES.items()
        for k, category in enumerate(categories)
    ]
    categories = [{"supercategory": "x", "id": n, "name": name} for n, name in CATEGORIES.items()]
    tables = {
        "captions": {"info": {"year": 2014}, "images": images, "annotations": captions},
        "instances": {"images": images, "annotations": instances, "categories": categories},
    }
    for name, table in tables.items():
        (tmp_path / "annotations" / f"{name}_val2014.json").write_text(json.dumps(table))
    return tmp_path


def change(folder: Path, name: str, part: str, entry: Any) -> None:
    """Put one more entry into a table."""
    path = folder / "annotations" / f"{name}_val2014.json"
    table = json.loads(path.read_text())
    table[part].append(entry)
    path.write_text(json.dumps(table))


def read(folder: Path) -> tuple[list[Item], list[str]]:
    with Source(folder) as source:
        items = chair.BENCHMARK.read(source)
        return items, source.problems


def scored(items: list[Item], answers: list[str]) -> dict[str, Any]:
    scores = Scores(sorted({item.unit for item in items}))
    chair.BENCHMARK.score([Given(i, a) for i, a in zip(items, answers, strict=True)], scores)
    return scores.nested()


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("A man and two women hold knives.", "person, person, knife"),
        (
            "The PEOPLE's skis, a policewoman, grandma's children and firemen",
            "person, skis, person, person, person, person",
        ),
        ("mice, geese, sheep and scissors", "mouse, bird, sheep, scissors"),
        ("a person, persons; a ski", "person, person, skis"),
        ("busses and buses on benches", "bus, bus, bench"),
        ("calves, oxen, puppies", "cow, cow, dog"),
        ("A hot dog is no dog; hotdogs", "hot dog, dog, hot dog"),
        ("teddy bears near a bear", "teddy bear, bear"),
        ("traffic lights and stop signs", "traffic light, stop sign"),
        ("a baby elephant and adult cows follow a baby", "elephant, cow, person"),
        ("mother ducks, a female lion, baby animals", "bird"),
        ("a passenger train, passengers, passenger jets", "train, person, airplane"),
        ("train tracks and a train station, a train", "train"),
        ("a toilet seat", "toilet"),
        ("the toilet has its seat up", "toilet"),
        ("the seat of a toilet", "toilet"),
        ("a seat and a stool", "chair, chair"),
        ("a bow tie, motor bikes and wine glasses", "tie, motorcycle, wine glass"),
        (
            "cell phones, tennis rackets and a baseball bat",
            "cell phone, tennis racket, baseball bat",
        ),
        ("potted plants on dining tables and desks", "potted plant, dining table, dining table"),
        ("a catsuit, a doghouse and concatenation", ""),
        ("", ""),
    ],
)
def test_words_of_our_table(text: str, classes: str):
    assert coco_nouns.ours().mentions(text) == [c for c in classes.split(", ") if c]


def test_the_table_has_cocos_80_classes_and_no_word_for_two():
    words = [
        w for words in coco_nouns.SYNONYMS.values() for w in " ".join(words.split()).split(",")
    ]
    words = [w.strip() for w in words if w.strip()]
    assert len(coco_nouns.SYNONYMS) == 80
    assert len(words) == len(set(words))
    assert not set(words) & set(coco_nouns.SYNONYMS)
    nouns = coco_nouns.ours()
    for name, own in coco_nouns.SYNONYMS.items():
        for word in (name, *(w.strip() for w in own.split(","))):
            assert nouns.mentions(word) == ([name] if word else [])


def test_words_of_a_published_table():
    lines = [
        "person, man,  baby",
        "cow, bison ,ox",
        "toilet",
        "chair, seat",
        "tie, bow",
        "train, , jet",
    ]
    nouns = coco_nouns.published(lines)
    assert nouns.mentions("Men with a baby and bison and oxen") == [
        "person",
        "person",
        "cow",
        "cow",
    ]
    assert nouns.mentions("a woman on a sofa") == []  # of our table only
    assert nouns.mentions("a baby cow, an adult bear, baby animals") == ["cow"]
    assert nouns.mentions("a seat, a bow tie, passenger jets") == ["chair", "tie", "train"]
    assert nouns.mentions("the toilet seat; its seat") == ["toilet"]
    assert nouns.mentions("a train on train tracks") == ["train"]


# --- reading ---------------------------------------------------------------------------------


def test_the_pictures_that_are_there_with_their_objects(folder: Path):
    items, problems = read(folder)
    assert problems == []
    assert [item.key for item in items] == [file_name(n) for n in (9, 25, 30)]
    assert [item.about["objects"] for item in items] == [
        ["dog", "frisbee", "person"],  # instances and captions together
        ["cat", "couch"],
        ["toilet"],  # not a chair
    ]
    one = items[0]
    assert (one.kind, one.unit) == ("text", one.key)
    assert one.prompt == "Please describe this image in detail."
    assert one.image == folder / "val2014" / file_name(9)
    assert one.about["synonyms"] == "ours"
    assert chair.BENCHMARK.max_tokens == 64


def test_outlines_are_not_kept(folder: Path, monkeypatch):
    tables = []

    def spy(*args: Any) -> Any:
        tables.append(read_table(*args))
        return tables[-1]

    monkeypatch.setattr(chair, "read_table", spy)
    assert len(read(folder)[0]) == 3
    assert all(set(a) <= {"id", "image_id", "category_id"} for a in tables[1]["annotations"])


def test_a_published_table_in_the_folder_is_used_and_told(folder: Path):
    names = [*CATEGORIES.values(), "couch, sofa", "frisbee"]
    (folder / "synonyms.txt").write_text("\n".join(names).replace("dog", "dog, wolfhound"))
    items, problems = read(folder)
    assert problems == []
    assert items[0].about["synonyms"] == ["person", "cat", "dog, wolfhound", *names[3:]]
    # "kittens" is not in this table, the cat's instance is
    assert items[1].about["objects"] == ["cat", "couch"]
    # As a result file gives the items back: scoring needs no other file.
    row = {key: getattr(items[0], key) for key in ("key", "unit", "prompt", "kind", "label")}
    row |= {"image": "x.jpg", "options": [], "about": items[0].about}
    again = as_item(json.loads(json.dumps(row)))
    numbers = scored([again], ["A wolfhound and a kitten, a man?"])
    assert (numbers["chair_i"], numbers["recall"]) == (0, 1 / 3)
    plain = scored(read_without_table(folder), ["A wolfhound and a kitten, a man?", "", ""])
    assert (plain["chair_i"], plain["recall"]) == (1 / 2, 1 / 6)


def read_without_table(folder: Path) -> list[Item]:
    (folder / "synonyms.txt").unlink()
    return read(folder)[0]


def test_a_split_without_pictures_needs_no_instances(folder: Path):
    other = {"images": [{"id": 1, "file_name": "COCO_train2014_1.jpg"}], "annotations": []}
    (folder / "annotations" / "captions_train2014.json").write_text(json.dumps(other))
    items, problems = read(folder)
    assert (len(items), problems) == (3, [])


def test_bad_rows_are_told_and_the_rest_is_read(folder: Path):
    change(folder, "captions", "annotations", {"image_id": 9, "id": 5, "caption": None})
    change(folder, "captions", "images", ["no object"])
    change(folder, "captions", "images", {"id": 77, "file_name": "broken.jpg"})
    change(folder, "instances", "annotations", {"image_id": 9, "category_id": 555})
    change(folder, "instances", "annotations", {"image_id": 9})
    change(folder, "instances", "categories", {"id": 900, "name": "unicorn"})
    (folder / "val2014" / "broken.jpg").write_bytes(b"not an image")
    items, problems = read(folder)
    assert [item.about["objects"][0] for item in items] == ["dog", "cat", "toilet"]
    told = "\n".join(problems)
    assert len(problems) == 6
    for part in (
        "annotations/captions_val2014.json: annotations 6: expected image_id, caption",
        "annotations/captions_val2014.json: images 5: expected id, file_name",
        "captions_val2014.json: images 6: the image val2014/broken.jpg: not an image",
        "annotations/instances_val2014.json: annotations 6: no category 555",
        "annotations/instances_val2014.json: annotations 7: expected image_id, category_id",
        "annotations/instances_val2014.json: categories 7: no class",
    ):
        assert part in told


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", '{"images": 3}', "\xff", "[" * 10**5])
def test_a_table_that_is_none(folder: Path, text: str):
    path = folder / "annotations" / "instances_val2014.json"
    path.write_text(text, encoding="latin1")
    _, problems = read(folder)
    assert problems
    path.rename(folder / "annotations" / "captions_val2014.json")
    items, problems = read(folder)
    assert items == []
    assert problems


def test_what_is_missing_is_listed(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    with Source(tmp_path / "empty") as source:
        assert chair.BENCHMARK.read(source) == []
        with pytest.raises(UserError, match="captions_val2014") as error:
            source.check(chair.BENCHMARK.needs)
    assert "pictures" in str(error.value)
    (folder / "annotations" / "instances_val2014.json").unlink()
    with Source(folder) as source:
        chair.BENCHMARK.read(source)
        with pytest.raises(UserError, match="missing: instances_val2014"):
            source.check(chair.BENCHMARK.needs)


def test_of_many_pictures_always_the_same_are_asked_about():
    names = [file_name(n) for n in range(1200)]
    chosen = chair.chosen(names)
    assert len(chosen) == 500
    assert chosen == chair.chosen(names[::-1]) == sorted(chosen)
    assert chosen[:3] == [file_name(n) for n in (0, 4, 6)]
    # A folder with fewer pictures keeps those of the list that it has.
    fewer = [name for name in names if name in set(chosen[:100]) or int(name[-8:-4]) % 7 == 0]
    assert set(chosen) & set(fewer) <= set(chair.chosen(fewer))
    assert chair.chosen(names[:500]) == names[:500]


# --- scores ----------------------------------------------------------------------------------


def test_scores_against_a_hand_computed_table(folder: Path):
    items, _ = read(folder)
    numbers = scored(
        items,
        [
            "A woman throws a frisbee to two dogs near a car.",  # 4 said, the car is absent
            "A cat and a cat on a bed",  # 3 said, the bed is absent
            "",
        ],
    )
    assert numbers["chair_i"] == pytest.approx(2 / 7)
    assert numbers["chair_s"] == pytest.approx(2 / 3)
    # person, frisbee, dog of 3; cat of 2; nothing of 1
    assert numbers["recall"] == pytest.approx(4 / 6)
    assert numbers["mentions_per_caption"] == pytest.approx(7 / 3)
    assert numbers["words_per_caption"] == pytest.approx((11 + 8 + 0) / 3)
    assert numbers["repeated_mentions"] == pytest.approx(1 / 7)


def test_naming_just_what_is_there_is_without_fault(folder: Path):
    items, _ = read(folder)
    numbers = scored(items, [" and ".join(item.about["objects"]) for item in items])
    assert (numbers["chair_i"], numbers["chair_s"], numbers["recall"]) == (0, 0, 1)


def test_silence_has_no_fault_and_no_recall(folder: Path):
    items, _ = read(folder)
    numbers = scored(items, ["No.", "", "NO"])
    assert (numbers["chair_i"], numbers["chair_s"], numbers["recall"]) == (0, 0, 0)


def test_another_pictures_caption_is_judged_by_this_ones_objects(folder: Path):
    items, _ = read(folder)
    said = [" and ".join(item.about["objects"]) for item in items]
    numbers = scored(items, [said[1], said[2], said[0]])
    assert (numbers["chair_i"], numbers["chair_s"], numbers["recall"]) == (1, 1, 0)


def test_the_interval_is_over_pictures(folder: Path, few):
    items, _ = read(folder)
    scores = Scores(sorted(item.unit for item in items))
    given = [Given(items[0], "a cat"), Given(items[1], "a cat"), Given(items[2], "a toilet")]
    chair.BENCHMARK.score(given, scores)
    assert scores["chair_s"] == pytest.approx(1 / 3)
    assert scores.interval("chair_s") == pytest.approx((0, 1))
