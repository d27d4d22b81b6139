"""The scenes benchmark: a table worked out by hand, and models whose scores are known."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agevlm_mlx.benchmarks.scenes import BENCHMARK
from agevlm_mlx.data import scenes as drawing
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.noun_vocabulary import NounVocabulary
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import scoring
from agevlm_mlx.evaluation.answers import AnswerFile, Row
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from agevlm_mlx.evaluation.respondent import Looked, Request
from agevlm_mlx.evaluation.run import Run, Settings
from agevlm_mlx.evaluation.scene_folder import (
    POPE_SPLITS,
    SceneFolder,
    SceneItem,
    read_scene_folder,
    swap_noun,
)
from agevlm_mlx.evaluation.source import Source

from .fakes import Scripted

IMAGES = 24

# --- the numbers, by hand


def scored(given: Sequence[Given]) -> Scores:
    scores = Scores(["a", "b"], boots=50)
    BENCHMARK.score(given, scores)
    return scores


def item(unit: str, kind: Any, task: str, **rest: Any) -> Item:
    about = {"task": task, **rest.pop("about", {})}
    return Item(key="k", unit=unit, image=None, prompt="?", kind=kind, about=about, **rest)


def asked(unit: str, label: str, answer: str, margin: float, *splits: str) -> list[Given]:
    rest = {"label": label, "options": ("yes", "no")}
    return [
        Given(
            item(unit, "choice", "pope", about={"split": split}, **rest),
            answer,
            (margin - 3.0, -3.0),
        )
        for split in splits
    ]


QUESTIONS = [
    *asked("a", "yes", "yes", 2.0, "random", "popular"),
    *asked("a", "no", "yes", 1.0, "random"),
    *asked("b", "yes", "no", -1.0, "random"),
    *asked("b", "no", "no", -3.0, "random", "popular"),
]
CAPTIONS = [
    Given(item("a", "text", "caption", about={"objects": objects, "nouns": nouns}), said)
    for nouns in (["dog", "cat", "sofa"],)
    for objects, said in (
        (["dog", "sofa"], "A dog, two dogs and a cat."),
        (["cat"], "Nothing at all."),
    )
]
MATCHING = [
    Given(item("a", "likelihood", "matching", options=("x", "y", "z")), "z", (-1.0, -2.0, -0.5)),
    Given(item("b", "likelihood", "matching", options=("x", "y")), "y", (-3.0, -1.0)),
]


def test_pope_by_hand():
    scores = scored(QUESTIONS)
    # one each of right yes, wrong yes, wrong no, right no
    for key in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert scores[f"pope.random.{key}"] == 0.5
    # margins 2, -1 of what is there against 1, -3 of what is not: three of four pairs
    assert scores["pope.random.auroc"] == 0.75
    assert scores["pope.popular.accuracy"] == scores["pope.popular.f1"] == 1.0
    assert scores["pope.popular.yes_ratio"] == 0.5
    assert not any(name.startswith("pope.adversarial") for name in scores.names)


def test_an_answer_that_is_neither_is_wrong_and_no_yes():
    neither = [replace(one, answer="", scores=()) for one in QUESTIONS]
    scores = scored(neither)
    for key in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert scores[f"pope.random.{key}"] == 0.0
    assert "pope.random.auroc" not in scores


def test_captions_by_hand():
    scores = scored(CAPTIONS)
    assert scores["chair_i"] == pytest.approx(1 / 3)  # the cat, of three mentions
    assert scores["chair_s"] == 0.5
    assert scores["recall"] == pytest.approx(1 / 3)  # the dog, of three objects
    assert scores["caption_f1"] == pytest.approx(2 / (2 + 2 + 0 + 1))
    assert scores["repeated_mentions"] == pytest.approx(1 / 3)
    assert scores["mentions_per_caption"] == 1.5


def test_the_surest_or_best_confirmed_nouns_by_hand():
    objects, nouns = ["cat", "dog"], ["dog", "cat", "sofa"]
    about = {"objects": objects, "nouns": nouns}
    said = Given(item("a", "text", "caption", about=about), "A sofa and a dog.")
    # Surest where it said the sofa; asked about it, it takes it back.
    both = scored([replace(said, log_p=(-0.1, -0.2), confirmed=(-3.0, 2.0))])
    assert both["chair_i_at_recall.50"] == 0.5
    assert both["chair_i_confirmed_at_recall.50"] == 0.0
    assert "chair_i_at_recall.70" not in both.names  # the cat is never named
    neither = scored([said])
    assert not any("at_recall" in name for name in neither.names)


def test_matching_by_hand():
    scores = scored(MATCHING)
    assert scores["matching_auroc"] == (1 + 0.5 + 0 + 0) / 4
    assert scores["matching_win_rate"] == 0.5
    assert scores["matching_auroc_hard"] == scores["matching_win_rate_hard"] == 0.0


def test_matching_by_confirmed_nouns_by_hand():
    sure = [
        replace(MATCHING[0], confirmed=(4.0, -1.0, 5.0)),
        replace(MATCHING[1], confirmed=(2.0, 3.0)),
    ]
    scores = scored(sure)
    # true 4, 2 against -1, 3: three of four pairs
    assert scores["matching_confirmed_auroc"] == 0.75
    assert scores["matching_confirmed_auroc_hard"] == 0.0
    assert not any("confirmed" in name for name in scored(MATCHING).names)


def test_looks_by_hand():
    halves = {"hit_half_heads": True, "energy_half_heads": 0.5, "on_image": 0.75, "centre": 0.1}
    looks = [
        {"hit": True, "near": True, "energy": 0.6, "uniform": 0.1, "centre_hit": True, **halves},
        {"hit": False, "near": True, "energy": 0.2, "uniform": 0.3, "centre_hit": False, **halves},
    ]
    given = [Given(item("a", "look", "grounding"), look=look) for look in looks]
    scores = scored([*given, Given(item("b", "look", "grounding"))])  # a hidden one has none
    assert scores["pointing_game"] == 0.5
    assert scores["pointing_game_tolerance"] == scores["pointing_game_half_heads"] == 1.0
    assert scores["energy_in_mask"] == pytest.approx(0.4)
    assert scores["energy_in_mask_half_heads"] == 0.5
    assert scores["uniform_energy"] == pytest.approx(0.2)
    assert scores["energy_gain"] == pytest.approx(2.0)
    assert scores["attention_on_image"] == 0.75
    assert (scores["centre_pointing_game"], scores["centre_energy"]) == (0.5, pytest.approx(0.1))
    another = scored([*given, Given(item("a", "look", "another word"), look=looks[1])])
    assert another.nested() == scores.nested()  # it is there for the control alone


def test_only_what_was_answered_is_scored():
    assert scored([]).names == []
    assert all(name.startswith("pope.") for name in scored(QUESTIONS).names)
    assert all(name.startswith("matching_") for name in scored(MATCHING).names)
    assert scored([Given(item("a", "look", "grounding"))]).names == []


# --- models whose scores are known

#: What a fake says to a question about a picture (None: asked without one).
Says = Callable[[SceneItem | None, str], str]


class Fake(Scripted):
    """Knows the scenes by their files, and looks at the cell that the object covers most."""

    def __init__(self, folder: SceneFolder, says: Says) -> None:
        self.scenes = {scene.path: scene for scene in folder.items}
        super().__init__(lambda r: says(self.scenes[r.image] if r.image else None, r.prompt))

    def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
        return [self._looked(*pair) for pair in zip(requests, phrases, strict=True)]

    def _looked(self, request: Request, noun: str) -> Looked:
        self._check(request)
        assert request.image is not None
        mask = self.scenes[request.image].mask(noun)
        geometry = Preprocessor().geometry(*mask.shape[::-1])
        coverage = geometry.mask_to_grid(mask, (8, 8))
        first = (np.arange(64) == coverage.argmax()).reshape(8, 8) * 0.8
        heads = np.stack([first, np.full((8, 8), 1e-6)])  # the second is blank
        return Looked(heads[None].astype(np.float32), None, geometry)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "test"
    drawing.write_scenes(folder, IMAGES, seed=5, split="test")
    return folder


@pytest.fixture(scope="module")
def folder(data: Path) -> SceneFolder:
    return read_scene_folder(data)


def read(data: Path, skip_bad: bool = False) -> list[Item]:
    with Source(data, skip_bad) as source:
        items = BENCHMARK.read(source)
        source.check(BENCHMARK.needs)
    return items


def answers(
    folder: SceneFolder, data: Path, says: Says, out: Path, batch_size: int = 7
) -> list[Row]:
    out.unlink(missing_ok=True)
    with AnswerFile(out) as file:
        Run(Fake(folder, says), BENCHMARK, Settings(batch_size=batch_size), file).ask(read(data))
        return list(file.rows.values())


def numbers(rows: Sequence[Row]) -> dict[str, Scores]:
    return scoring.score(BENCHMARK, rows, scoring.units(rows), 200, 0)


def asked_noun(folder: SceneFolder, question: str) -> str:
    return NounVocabulary(list(folder.themes)).mentions(question)[0]


def oracle(folder: SceneFolder) -> Says:
    """Knows every picture."""

    def say(scene: SceneItem | None, question: str) -> str:
        if scene is None:
            return "No"
        if question.startswith("Describe"):
            return scene.caption
        return "Yes" if asked_noun(folder, question) in scene.objects else "No"

    return say


def test_nouns_that_the_model_denies_when_asked_go_first(
    folder: SceneFolder, data: Path, tmp_path: Path
) -> None:
    """It always begins with a dog, and knows better when it is asked."""
    know = oracle(folder)

    def say(scene: SceneItem | None, question: str) -> str:
        said = know(scene, question)
        return f"A dog. {said}" if question.startswith("Describe") else said

    text = numbers(answers(folder, data, say, tmp_path / "a.jsonl"))["text"]
    assert text["chair_i"] > 0.1
    for recall in (50, 70, 80, 90):
        assert text[f"chair_i_at_recall.{recall}"] > 0.1
        assert text[f"chair_i_confirmed_at_recall.{recall}"] == 0.0


def habit(folder: SceneFolder) -> Says:
    """Never looks: answers from the words of the question."""

    def say(scene: SceneItem | None, question: str) -> str:
        if question.startswith("Describe"):
            return "A dog and a cow."
        return "Yes" if asked_noun(folder, question) < "horse" else "No"

    return say


@pytest.fixture(scope="module")
def perfect(folder: SceneFolder, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return answers(folder, data, oracle(folder), tmp_path_factory.mktemp("out") / "a.jsonl")


def test_a_model_that_knows_the_labels_gets_everything_right(perfect):
    found = numbers(perfect)
    for split in POPE_SPLITS:
        for way in ("text", "logits"):
            for key in ("accuracy", "f1", "precision", "recall"):
                assert found[way][f"pope.{split}.{key}"] == 1.0
            assert found[way][f"pope.{split}.yes_ratio"] == 0.5
            # Without a picture this one always says no; half of the labels are no.
            assert found[f"blind.{way}"][f"pope.{split}.accuracy"] == 0.5
            assert found[f"shuffled.{way}"][f"pope.{split}.accuracy"] < 0.75
        assert found["logits"][f"pope.{split}.auroc"] == 1.0
        for always in ("yes", "no"):
            assert found[f"constant.{always}"][f"pope.{split}.accuracy"] == 0.5
        assert found["constant.yes"][f"pope.{split}.f1"] == pytest.approx(2 / 3)
    assert found["logits"]["matching_confirmed_auroc_hard"] == 1.0
    assert found["logits"]["matching_auroc"] > 0.97  # two pictures may have the same caption
    for key in ("matching_auroc_hard", "matching_win_rate_hard"):
        assert found["logits"][key] == 1.0
    text = found["text"]
    assert (text["chair_i"], text["chair_s"], text["recall"]) == (0, 0, 1)
    assert (text["caption_f1"], text["repeated_mentions"]) == (1, 0)
    assert found["shuffled.text"]["chair_i"] > 0.5  # another picture's caption, these objects


def test_a_model_that_looks_at_the_object_wins_the_pointing_game(perfect):
    look = numbers(perfect)["look"]
    assert look["pointing_game"] > 0.9  # the fullest cell's centre can fall into a hole
    assert look["pointing_game_tolerance"] == 1.0
    assert look["pointing_game_half_heads"] == look["pointing_game"]
    assert look["energy_in_mask"] > 0.7 > 5 * look["uniform_energy"]
    assert look["energy_gain"] == pytest.approx(look["energy_in_mask"] / look["uniform_energy"])
    assert look["attention_on_image"] == pytest.approx(0.4, abs=0.01)  # one of two heads, 0.8


def test_a_model_that_ignores_the_picture_scores_the_same_on_any_picture(folder, data, tmp_path):
    found = numbers(answers(folder, data, habit(folder), tmp_path / "a.jsonl"))
    for way in ("text", "logits"):
        for control in ("shuffled", "blind"):
            for name in found[way].names:
                # What is confirmed is asked about the own picture alone.
                if name.startswith(("pope", "chair", "matching")) and "confirmed" not in name:
                    assert found[f"{control}.{way}"][name] == found[way][name]
    assert found["logits"]["matching_auroc_hard"] < 0.75
    # "A dog and a cow." about everything: worked out from the labels.
    said = [("dog" in i.objects) + ("cow" in i.objects) for i in folder.items]
    text = found["text"]
    assert text["chair_i"] == pytest.approx(1 - sum(said) / (2 * IMAGES))
    assert text["chair_s"] == pytest.approx(np.mean([n < 2 for n in said]))
    assert text["recall"] == pytest.approx(sum(said) / sum(len(i.objects) for i in folder.items))


def test_a_model_that_answers_at_random_is_within_its_interval_of_chance(folder, data, tmp_path):
    rng = np.random.default_rng(0)
    coin: dict[tuple[str, str], bool] = {}

    def say(scene: SceneItem | None, question: str) -> str:
        key = (scene.name if scene else "", question)
        return "Yes" if coin.setdefault(key, bool(rng.random() < 0.5)) else "No"

    found = numbers(answers(folder, data, say, tmp_path / "a.jsonl"))
    interval = found["logits"].interval("pope.random.accuracy")
    assert interval is not None
    assert interval[0] <= 0.5 <= interval[1]
    assert interval[1] - interval[0] > 0.1


def test_text_and_logits_are_scored_apart(folder, data, tmp_path):
    # "Yes, not" starts with Yes, and by POPE's rule the text is a no.
    right = oracle(folder)
    rows = answers(
        folder, data, lambda *of: right(*of).replace("Yes", "Yes, not"), tmp_path / "a.jsonl"
    )
    found = numbers(rows)
    assert found["logits"]["pope.random.accuracy"] == 1.0
    assert found["text"]["pope.random.accuracy"] == 0.5
    assert {r["answer"] for r in rows if r["kind"] == "choice"} == {"Yes, not", "No"}


def test_batching_changes_no_answer(folder, data, perfect, tmp_path):
    together = answers(folder, data, oracle(folder), tmp_path / "a.jsonl", batch_size=100)
    kept = ("key", "answer", "scores", "blind_answer", "blind_scores", "look")
    for one, other in zip(*(sorted(r, key=lambda row: row["key"]) for r in (perfect, together)),
                          strict=True):  # fmt: skip
        assert [one.get(key) for key in kept] == [other.get(key) for key in kept]


# --- what is asked


def test_every_question_of_every_split_is_an_item(data, folder):
    items = read(data)
    assert len({one.key for one in items}) == len(items)
    assert {one.unit for one in items} == {scene.name for scene in folder.items}
    kinds = Counter(one.kind for one in items)
    assert kinds["likelihood"] == kinds["text"] == IMAGES
    tasks = Counter(one.about["task"] for one in items if one.kind == "look")
    assert tasks["grounding"] == IMAGES
    assert tasks["another word"] == sum(len(scene.objects) > 1 for scene in folder.items)
    pope = [one for one in items if one.kind == "choice"]
    assert Counter(one.about["split"] for one in pope) == dict.fromkeys(POPE_SPLITS, 2 * IMAGES)
    lines = (data / "pope_adversarial.json").read_text().splitlines()
    keyed = {one.key: one for one in pope}
    only = next(key for key in keyed if key.startswith("pope_adversarial.json:"))
    assert json.loads(lines[int(only.partition(":")[2]) - 1])["text"] == keyed[only].prompt


def test_what_is_looked_for_is_there_and_in_the_question(data, folder):
    scenes = {scene.name: scene for scene in folder.items}
    for one in read(data):
        if one.kind == "look":
            assert one.phrase in one.prompt
            assert one.mask is not None
            np.testing.assert_array_equal(one.mask(), scenes[one.unit].mask(one.phrase))
            assert one.mask().any()


def test_a_plural_is_not_looked_for(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    for split in POPE_SPLITS:
        path = copy / f"pope_{split}.json"
        path.write_text(re.sub(r"Is there an? (\w+)", r"Are there \1s", path.read_text()))
    kinds = Counter(one.kind for one in read(copy))
    assert kinds["choice"] > kinds["look"] == 0


def test_captions_to_tell_apart_are_the_same_in_every_run(data, folder):
    first, again = ([i for i in read(data) if i.kind == "likelihood"] for _ in range(2))
    assert first == again
    captions = Counter(scene.caption for scene in folder.items)
    for one, scene in zip(first, folder.items, strict=True):
        true, other, hard = one.options
        assert true == one.label == scene.caption
        assert other in captions
        assert other != true or captions[true] > 1
        assert hard != true
        assert len(set(hard.split()) - set(true.split())) <= 2  # a noun, and perhaps its article


THEMES = {"dog": "pets", "cat": "pets", "ant": "pets", "car": "road", "hot dog": "food"}


@pytest.mark.parametrize(
    ("caption", "nouns", "expected"),
    [
        ("A dog and a car.", ["dog", "car"], {"A cat and a car.", "An ant and a car."}),
        ("An ant.", ["ant", "cat"], {"A dog."}),
        ("A car and an ant.", ["car", "ant", "cat"], {"A car and a dog."}),
        ("A hot dog.", ["hot dog"], {None}),
        ("A boat.", [], {None}),
    ],
)
def test_one_noun_is_exchanged_inside_its_theme(caption, nouns, expected):
    swaps = {swap_noun(caption, nouns, THEMES, np.random.default_rng(seed)) for seed in range(20)}
    assert swaps == expected


# --- files that are missing or damaged


@pytest.mark.parametrize("name", ["pope_adversarial.json", "captions.json", "instances.json"])
def test_a_folder_that_is_not_scenes_says_what_is_missing(data, tmp_path, name):
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / name).unlink()
    for reader in (read, read_scene_folder):
        with pytest.raises(UserError, match=rf"agevlm scenes(.|\n)*missing: {name}"):
            reader(copy)


def damage(copy: Path, kind: str) -> None:
    pope, table = copy / "pope_random.json", json.loads((copy / "instances.json").read_text())
    lines = pope.read_text().splitlines()
    if kind == "pope":
        lines[2] = lines[2][:-5]
    elif kind == "label":
        lines[2] = json.dumps({"image": "000001.png", "text": "Is there?", "label": "maybe"})
    elif kind == "text":
        lines[2] = json.dumps({"image": "000001.png", "text": 3, "label": "no"})
    elif kind == "name":
        lines[2] = json.dumps({"image": 7, "text": "Is there?", "label": "no"})
    elif kind == "coco":
        table = {"images": [], "annotations": 3, "categories": []}
    elif kind == "annotation":
        table["annotations"][0].pop("category_id")
    elif kind == "category":
        table["annotations"][0]["category_id"] = 4711
    elif kind == "mask":
        for one in table["annotations"]:
            if one["image_id"] == 0:
                one["segmentation"]["counts"] = "junk"
    elif kind == "outside":
        table["images"][0]["file_name"] = "../../secret.png"
        lines = [line.replace("000000.png", "../../secret.png") for line in lines]
        shutil.copy(copy / "images" / "000003.png", copy / "../../secret.png")
    elif kind == "missing":
        (copy / "images" / "000003.png").unlink()
    elif kind == "corrupt":
        (copy / "images" / "000003.png").write_bytes(b"no picture")
    elif kind == "twice":
        table["images"].append(table["images"][0] | {"id": 999})
    pope.write_text("\n".join(lines) + "\n")
    (copy / "instances.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pope", r"pope_random.json:3: "),
        ("label", r"pope_random.json:3: expected yes or no .*'maybe'"),
        ("name", r"pope_random.json:3: expected an image's name, got 7"),
        ("text", r"pope_random.json:3: expected a question"),
        ("coco", r"instances.json: expected a COCO file, got none with lists annotations"),
        ("annotation", r"instances.json:annotations 1: expected category_id"),
        ("category", r"instances.json:annotations 1: .*got 4711"),
        ("mask", r"instances.json:annotations 1: expected a COCO segmentation: .*mask counts"),
        ("outside", r"instances.json:images 1: .*secret.png"),
        ("missing", r"instances.json:images 4: no image '000003.png'"),
        ("corrupt", r"instances.json:images 4: .*not an image"),
        ("twice", r"instances.json:images 25: expected every image once, got 000000.png again"),
    ],
)
def test_damaged_rows_are_named_and_can_be_left_out(data, tmp_path, kind, message):
    copy = shutil.copytree(data, tmp_path / "a" / "b" / "copy")
    damage(copy, kind)
    with pytest.raises(UserError, match=message):
        read(copy)
    if kind != "both":  # of reading for analysis both are questions
        with pytest.raises(UserError, match=message):
            read_scene_folder(copy)
    left = read(copy, skip_bad=True)
    assert len({one.unit for one in left}) >= IMAGES - 1 or kind == "coco"
    assert not any("secret" in str(one.image) for one in left)
    assert all(one.mask().any() for one in left if one.mask is not None)


def test_an_instances_file_of_polygons_and_supercategories_is_read(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    table = json.loads((copy / "instances.json").read_text())
    for one in table["annotations"]:
        x, y, w, h = one["bbox"]
        one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for one in table["categories"]:
        one["supercategory"] = "thing"
    (copy / "instances.json").write_text(json.dumps(table))
    folder = read_scene_folder(copy)
    assert set(folder.themes.values()) == {"thing"}
    first = table["annotations"][0]
    noun = next(c["name"] for c in table["categories"] if c["id"] == first["category_id"])
    scene = folder.items[first["image_id"]]
    x, y, w, h = first["bbox"]
    assert scene.mask(noun)[y : y + h, x : x + w].all()


def test_pope_files_are_read_as_lines_and_as_an_array(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    for split in POPE_SPLITS:
        path = copy / f"pope_{split}.json"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(json.dumps(rows, indent=2))
    kept = [[(one.prompt, one.label, one.about) for one in read(folder)] for folder in (data, copy)]
    assert kept[0] == kept[1]


def test_one_picture_has_nothing_to_be_told_from(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    for split in POPE_SPLITS:
        path = copy / f"pope_{split}.json"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    kinds = Counter(one.kind for one in read(copy))
    assert kinds == {"choice": kinds["choice"], "text": 1, "look": 2}
    with pytest.raises(UserError, match="at least two images"):
        read_scene_folder(copy)
