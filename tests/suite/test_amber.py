"""AMBER: its numbers on tables worked out by hand, and its files as published."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agevlm_mlx.benchmarks import benchmark
from agevlm_mlx.benchmarks.amber_nouns import judge
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from tests.suite import fakes

BENCHMARK = benchmark("amber")

RELATION = {
    "sky": [],
    "grass": ["ground"],
    "ground": ["floor"],
    "person": ["man", "people"],
    "road": ["path", "street"],
    "cloud": [],
    "dog": ["puppy"],
    "TV": ["television"],
    "can": [],
    "hot": [],
    "orange": [],
    "slippers": [],
    "knife": [],
}
#: id, image, query, type, truth, hallu. Captions first, as published.
ROWS = [
    (
        1,
        "Describe this image.",
        "generative",
        ["sky", "grass", "ground", "person"],
        ["cloud", "dog"],
    ),
    (2, "Describe this image.", "generative", ["TV", "road", "can"], ["person"]),
    (3, "Is the sky sunny in this image?", "discriminative-attribute-state", "yes", None),
    (3, "Is the sky cloudy in this image?", "discriminative-attribute-state", "no", None),
    (3, "Is there one dog in this image?", "discriminative-attribute-number", "no", None),
    (3, "Does the man walk in this image?", "discriminative-attribute-action", "yes", None),
    (1, "Is there a cloud in this image?", "discriminative-hallucination", "no", None),
    (1, "Is there a dog in this image?", "discriminative-hallucination", "no", None),
    (2, "Is there direct contact between the TV and road?", "discriminative-relation", "yes", None),
    (2, "Is there direct contact between the can and sky?", "relation", "no", None),
]


def queries() -> list[dict[str, Any]]:
    return [
        {"id": n, "image": f"AMBER_{image}.jpg", "query": query}
        for n, (image, query, *_) in enumerate(ROWS, 1)
    ]


def annotations() -> list[dict[str, Any]]:
    return [
        {"id": n, "type": kind, "truth": truth} | ({"hallu": hallu} if hallu else {})
        for n, (_, _, kind, truth, hallu) in enumerate(ROWS, 1)
    ]


def picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 3)).save(file, "JPEG")
    return file.getvalue()


def put(folder: Path, files: Mapping[str, Any] | None = None) -> Path:
    """A clone of the repository with the pictures in it; `files` in place of the usual ones."""
    content: dict[str, Any] = {
        "data/query/query_all.json": queries(),
        "data/annotations.json": annotations(),
        "data/relation.json": RELATION,
        "data/safe_words.txt": "orange\nlight\n",
        "data/metrics.txt": "chair_num=0.001\n",
        "image/AMBER_1.jpg": picture(),
        "image/AMBER_2.jpg": picture(),
        "image/AMBER_3.jpg": picture(),
    } | dict(files or {})
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            continue
        if not isinstance(value, str | bytes):
            value = json.dumps(value, indent=1)
        path.write_bytes(value.encode() if isinstance(value, str) else value)
    return folder


read = partial(fakes.read, BENCHMARK, skip_bad=True)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    items, problems = read(put(tmp_path))
    assert not problems
    return items


def scored(items: Sequence[Item], answers: Sequence[str]) -> Scores:
    scores = Scores(sorted({item.unit for item in items}), boots=50)
    given = [Given(item, answer) for item, answer in zip(items, answers, strict=True)]
    BENCHMARK.score(given, scores)
    return scores


# --- descriptions ----------------------------------------------------------------------------


def test_descriptions(items):
    # man, street, sky, dog, dog, ground, orange are nouns, and street, dog, dog are not there.
    # Covered: person (man), sky, grass (ground may be said for it); not the ground itself.
    # TV, people are nouns; the people are not there, and expected; 1 of 3 is covered.
    first = "A man walks on the street under the sky. A dog and two dogs. Green ground. An orange."
    scores = scored(items[:2], [first, "People watch TV."])
    assert scores["generative.chair"] == 4 / 9
    assert scores["generative.cover"] == (3 + 1) / (4 + 3)
    assert scores["generative.hal"] == 1
    assert scores["generative.cog"] == (1 + 1) / (2 + 1)
    assert scores["generative.nouns"] == 9 / 2
    assert scores["generative.words"] == (18 + 3) / 2
    assert not [n for n in scores.names if "accuracy" in n]
    assert "score" not in scores


def test_silence_makes_nothing_up_and_covers_nothing(items):
    scores = scored(items[:2], ["A TV on the road.", ""])
    assert scores["generative.chair"] == 1  # TV and road are not in the first picture
    assert scores["generative.hal"] == 1 / 2
    assert scores["generative.cover"] == scores["generative.cog"] == 0
    silent = scored(items[:2], ["", ""])
    assert silent["generative.chair"] == silent["generative.cover"] == silent["generative.hal"] == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # nouns, not shown, covered of (TV, road, can), expected named of (person)
        ("a television", (1, 0, 1, 0)),
        ("the streets and a path", (2, 0, 1, 0)),  # both are the road
        ("a man and people", (2, 2, 0, 1)),  # both are the person
        ("a puppy", (1, 1, 0, 0)),
        ("oranges and orange light", (2, 0, 0, 0)),  # safe, and "light" is no noun here
        ("a dog can be seen", (1, 1, 0, 0)),
        ("a can, the can, two cans", (3, 0, 1, 0)),
        ("a hot dog", (1, 1, 0, 0)),
        ("Knives. SLIPPERS", (2, 2, 0, 0)),
        ("ground, floor, grass", (3, 3, 0, 0)),
        ("a unicorn", (0, 0, 0, 0)),
    ],
)
def test_nouns(items, said, expected):
    about = json.loads(json.dumps(items[1].about))  # as it is kept beside the answer
    assert judge(said, about) == expected


def test_the_first_object_that_fits_is_covered(items):
    about = items[0].about  # sky, grass (ground), ground (floor), person
    assert judge("ground", about) == (1, 0, 1, 0)
    assert judge("ground, grass", about) == (2, 0, 1, 0)  # both are the grass
    assert judge("ground, floor", about) == (2, 0, 2, 0)  # the floor is the ground


def test_a_word_for_two_objects_is_the_first_one_and_what_is_shown_is_not_wrongly_expected():
    about = {
        "truth": ["road", "sign"],
        "hallu": ["path", "street", "dog"],
        "relation": {"road": ["street"], "sign": ["street"], "path": [], "street": [], "dog": []},
        "safe": [],
        "known": ["road", "sign", "street", "path", "dog"],
    }
    assert judge("a street and a sign", about) == (2, 0, 2, 0)
    assert judge("a street and a road", about) == (2, 0, 1, 0)
    assert judge("a path and a dog", about) == (2, 2, 0, 2)


# --- questions -------------------------------------------------------------------------------

#: state yes, no; number no; action yes; existence no, no; relation yes, no
LABELS = ["yes", "no", "no", "yes", "no", "no", "yes", "no"]
ANSWERS = ["yes", "", "no", "no", "no", "yes", "yes", "yes"]


def test_questions(items):
    assert [item.label for item in items[2:]] == LABELS
    scores = scored(items[2:], ANSWERS)

    def five(name: str) -> list[float]:
        metrics = ("accuracy", "precision", "recall", "f1", "no_ratio")
        return [scores[f"{name}.{metric}"] for metric in metrics]

    # "no" was said 3 times, twice rightly, and was right 5 times.
    assert five("discriminative") == [4 / 8, 2 / 3, 2 / 5, 4 / 8, 3 / 8]
    assert five("existence") == [1 / 2, 1, 1 / 2, 2 / 3, 1 / 2]
    assert five("attribute") == [2 / 4, 1 / 2, 1 / 2, 1 / 2, 2 / 4]
    assert five("attribute.state") == [1 / 2, 0, 0, 0, 0]
    assert five("attribute.number") == [1, 1, 1, 1, 1]
    assert five("attribute.action") == [0, 0, 0, 0, 1]
    assert five("relation") == [1 / 2, 0, 0, 0, 0]
    assert scores["discriminative.unclear"] == 1 / 8
    assert scores["mean_accuracy"] == pytest.approx((1 / 2 + 2 / 4 + 1 / 2) / 3)
    assert "generative.chair" not in scores
    assert "score" not in scores


def test_always_no_is_right_in_existence(items):
    scores = scored(items[2:], ["no"] * 8)
    for metric in ("accuracy", "precision", "recall", "f1"):
        assert scores[f"existence.{metric}"] == 1
    assert scores["discriminative.accuracy"] == scores["discriminative.precision"] == 5 / 8
    assert scores["discriminative.recall"] == 1
    assert scores["attribute.accuracy"] == 1 / 2


def test_always_yes_is_wrong_in_existence(items):
    scores = scored(items[2:], ["yes"] * 8)
    assert scores["existence.accuracy"] == scores["existence.f1"] == 0
    assert scores["discriminative.recall"] == scores["discriminative.precision"] == 0


def test_score(items, few):
    said = ["A dog under the sky.", "A TV and a road."]  # 1 of 4 nouns is not there
    scores = scored(items, [*said, *ANSWERS])
    assert scores["score"] == (100 - 25 + 50) / 2
    assert len(scores.drawn("score")) == 50
    labels = scored(items, ["Sky, grass, person.", "TV, road.", *LABELS])
    assert labels["score"] == 100
    assert scored(items, ["", "", *LABELS])["score"] == 100  # hence cover beside it


def test_one_dimension_alone(items):
    scores = scored([items[6], items[7]], ["no", "no"])
    assert scores["existence.accuracy"] == scores["discriminative.accuracy"] == 1
    assert "mean_accuracy" not in scores
    assert "attribute.accuracy" not in scores
    empty = Scores(["AMBER_1.jpg"])
    BENCHMARK.score([], empty)
    assert not empty.names


@pytest.mark.parametrize(
    ("said", "means"), [("No.", "no"), ("YES", "yes"), ("", ""), ("It is not", "")]
)
def test_what_an_answer_means(items, said, means):
    assert BENCHMARK.parse(items[2], said) == means
    assert BENCHMARK.parse(items[0], said) == said


# --- files -----------------------------------------------------------------------------------


def test_published_files(items, tmp_path):
    assert [item.key for item in items] == [str(n) for n in range(1, 11)]
    assert {item.unit for item in items} == {"AMBER_1.jpg", "AMBER_2.jpg", "AMBER_3.jpg"}
    caption, question = items[0], items[6]
    assert (caption.kind, caption.prompt) == ("text", "Describe this image.")
    assert caption.image == question.image == tmp_path / "image/AMBER_1.jpg"
    assert question.prompt == "Is there a cloud in this image?"
    assert (question.kind, question.label, question.options) == ("choice", "no", ("yes", "no"))


def test_the_parts_of_the_queries_in_place_of_all(tmp_path, items):
    parts = {
        "data/query/query_all.json": None,
        "data/query/query_generative.json": queries()[:2],
        "data/query/query_discriminative.json": queries()[2:],
        "data/query/query_discriminative-existence.json": [
            {**queries()[6], "query": "The first file that has an id counts."}
        ],
    }
    found, problems = read(put(tmp_path / "parts", parts))
    assert not problems
    assert [(i.key, i.prompt) for i in found] == [(i.key, i.prompt) for i in items]
    only = {"data/query/query_all.json": None, "data/query/query_generative.json": queries()[:2]}
    assert len(read(put(tmp_path / "only", only))[0]) == 2


def test_bad_rows_are_told_and_left_out(tmp_path):
    bad = {
        "an id of annotations.json, got 99": {"id": 99, "image": "AMBER_1.jpg", "query": "?"},
        "an id of annotations.json, got '1'": {"id": "1", "image": "AMBER_1.jpg", "query": "?"},
        "an id of annotations.json, got [1]": {"id": [1], "image": "AMBER_1.jpg", "query": "?"},
        "each id once in a file, got 1 again": queries()[0],
        "a query, got ''": {"id": 11, "image": "AMBER_1.jpg", "query": ""},
        "AMBER_9.jpg": {"id": 12, "image": "AMBER_9.jpg", "query": "?"},
    }
    annotated = {
        "an id of its own, got 1": annotations()[0],
        "lists of words, truth and hallu": {"id": 13, "type": "generative", "truth": ["sky"]},
        "a type that AMBER has, got 'x'": {"id": 13, "type": "x", "truth": "no"},
        "a type that AMBER has, got ['x']": {"id": 13, "type": ["x"], "truth": "no"},
        "the truth yes or no, got 'maybe'": {"id": 13, "type": "relation", "truth": "maybe"},
    }
    extra = [{"id": n, "type": "relation", "truth": "no"} for n in (11, 12)]
    files = {
        "data/query/query_all.json": [*queries(), *bad.values()],
        "data/annotations.json": [*annotations(), *extra, *annotated.values()],
    }
    items, problems = read(put(tmp_path, files))
    assert len(items) == 10
    assert len(problems) == len(bad) + len(annotated), problems
    for problem, expected in zip(problems, (*annotated, *bad), strict=True):
        assert expected in problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("relation.json", ["sky"], "expected an object of lists of words"),
        ("relation.json", {"sky": "blue"}, "expected an object of lists of words"),
        ("relation.json", {"...": []}, "expected an object of lists of words"),
        ("relation.json", "{", "malformed JSON"),
    ],
)
def test_a_damaged_relation_file(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(put(tmp_path, {f"data/{name}": content}))


def test_what_is_missing_is_listed(tmp_path):
    put(tmp_path)
    for name in ("relation.json", "query/query_all.json"):
        (tmp_path / "data" / name).unlink()
    missing = r"(?s)junyangwang0410/AMBER.*missing: query_all\.json.*missing: relation\.json"
    with pytest.raises(UserError, match=missing):
        read(tmp_path)
