"""The scenes benchmark with models whose scores are known beforehand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agevlm_mlx.data import scenes as drawing
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import metrics, scenes
from agevlm_mlx.evaluation.benchmark import Result, Settings, flatten
from agevlm_mlx.evaluation.scene_folder import (
    SceneFolder,
    SceneItem,
    read_pope,
    read_scene_folder,
    swap_noun,
)

from .fakes import Script, fake

IMAGES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "test"
    drawing.write_scenes(folder, IMAGES, seed=5, split="test")
    return folder


@pytest.fixture(scope="module")
def folder(data: Path) -> SceneFolder:
    return read_scene_folder(data)


def asked_noun(folder: SceneFolder, question: str) -> str:
    return metrics.NounVocabulary(list(folder.themes)).mentions(question)[0]


def oracle(folder: SceneFolder) -> Script:
    """Knows every picture."""

    def say(item: SceneItem | None, question: str) -> str:
        if item is None:
            return "No"
        if question.startswith("Describe"):
            return item.caption
        return "Yes" if asked_noun(folder, question) in item.objects else "No"

    return say


def habit(folder: SceneFolder) -> Script:
    """Never looks: answers from the words of the question."""

    def say(item: SceneItem | None, question: str) -> str:
        if question.startswith("Describe"):
            return "A dog and a cow."
        return "Yes" if asked_noun(folder, question) < "horse" else "No"

    return say


def score(folder: SceneFolder, data: Path, script: Script, **settings) -> Result:
    settings = {"batch_size": 7, "boots": 200, **settings}
    return scenes.run(fake(folder, script), data, Settings(**settings))


@pytest.fixture(scope="module")
def perfect(folder: SceneFolder, data: Path) -> Result:
    return score(folder, data, oracle(folder))


def test_a_model_that_knows_the_labels_gets_everything_right(perfect):
    flat = flatten(perfect.metrics)
    for split in ("random", "popular", "adversarial"):
        for key in ("accuracy", "text_accuracy", "f1", "precision", "recall", "auroc"):
            assert flat[f"pope.{split}.{key}"] == 1.0
        assert flat[f"pope.{split}.yes_ratio"] == 0.5
        assert flat[f"pope.{split}.constant_accuracy"] == 0.5
        # Without a picture this one always says no; half of the labels are no.
        assert flat[f"pope.{split}.blind_accuracy"] == 0.5
        assert flat[f"pope.{split}.shuffled_accuracy"] < 0.75
    assert flat["matching_auroc"] > 0.97  # two pictures may have the same caption
    assert flat["matching_auroc_hard"] == flat["matching_win_rate_hard"] == 1.0
    assert (flat["chair_i"], flat["chair_s"], flat["recall"]) == (0, 0, 1)
    assert (flat["caption_f1"], flat["repeated_mentions"]) == (1, 0)


def test_a_model_that_looks_at_the_object_wins_the_pointing_game(perfect):
    flat = flatten(perfect.metrics)
    assert flat["pointing_game"] > 0.9  # the fullest cell's centre can fall into a hole
    assert flat["pointing_game_tolerance"] == 1.0
    assert flat["pointing_game_half_heads"] == flat["pointing_game"]
    assert flat["energy_in_mask"] > 0.7 > 5 * flat["uniform_energy"]
    assert flat["energy_gain"] == pytest.approx(flat["energy_in_mask"] / flat["uniform_energy"])
    assert flat["attention_on_image"] == pytest.approx(0.4, abs=0.01)  # one of two heads, 0.8


def test_a_model_that_ignores_the_picture_scores_the_same_on_any_picture(folder, data):
    flat = flatten(score(folder, data, habit(folder)).metrics)
    for split in ("random", "popular", "adversarial"):
        accuracy = flat[f"pope.{split}.accuracy"]
        assert flat[f"pope.{split}.shuffled_accuracy"] == accuracy
        assert flat[f"pope.{split}.blind_accuracy"] == accuracy
    assert flat["matching_auroc_hard"] < 0.75
    # "A dog and a cow." about everything: worked out from the labels.
    said = [("dog" in i.objects) + ("cow" in i.objects) for i in folder.items]
    assert flat["chair_i"] == pytest.approx(1 - sum(said) / (2 * IMAGES))
    assert flat["chair_s"] == pytest.approx(np.mean([n < 2 for n in said]))
    assert flat["recall"] == pytest.approx(sum(said) / sum(len(i.objects) for i in folder.items))


def test_a_model_that_answers_at_random_is_within_its_interval_of_chance(folder, data):
    rng = np.random.default_rng(0)
    coin: dict[tuple[str, str], bool] = {}

    def say(item: SceneItem | None, question: str) -> str:
        key = (item.name if item else "", question)
        return "Yes" if coin.setdefault(key, bool(rng.random() < 0.5)) else "No"

    result = score(folder, data, say)
    low, high = result.intervals["pope.random.accuracy"]
    assert low <= 0.5 <= high
    assert high - low > 0.1


def test_a_model_that_says_yes_to_everything_has_the_known_scores(folder, data):
    flat = flatten(score(folder, data, lambda item, question: "Yes").metrics)
    for split in ("random", "popular", "adversarial"):
        assert flat[f"pope.{split}.accuracy"] == 0.5
        assert flat[f"pope.{split}.f1"] == pytest.approx(2 / 3)
        assert flat[f"pope.{split}.yes_ratio"] == 1.0


def test_text_and_logits_are_scored_apart(folder, data):
    # "Yes, not" starts with Yes, and by POPE's rule the text is a no.
    right = oracle(folder)

    def say(item: SceneItem | None, question: str) -> str:
        return right(item, question).replace("Yes", "Yes, not")

    result = score(folder, data, say)
    split = result.metrics["pope"]["random"]
    assert split["accuracy"] == 1.0
    assert split["text_accuracy"] == 0.5
    assert {r["answer"] for r in result.answers if r["task"] == "pope"} == {"Yes, not", "No"}


def test_batching_changes_nothing(folder, data, perfect):
    alone = score(folder, data, oracle(folder), batch_size=1)
    together = score(folder, data, oracle(folder), batch_size=100)
    assert alone.metrics == together.metrics == perfect.metrics
    assert alone.answers == together.answers


def test_every_answer_is_kept_with_its_picture(perfect, folder):
    rows = {task: [r for r in perfect.answers if r["task"] == task] for task in perfect.counts}
    assert len(rows["pope"]) == perfect.counts["pope"] == 3 * 2 * IMAGES
    assert len(rows["caption"]) == len(rows["matching"]) == IMAGES
    assert 0 < len(rows["grounding"]) <= IMAGES
    names = {item.name for item in folder.items}
    assert {row["image"] for row in perfect.answers} == names
    assert all(row["shuffled_image"] != row["image"] for row in rows["pope"])
    assert len(rows["grounding"][0]["map"]) == 64


def test_a_sample_depends_on_the_seed_alone(folder, data):
    some = [score(folder, data, habit(folder), limit=6, seed=s) for s in (0, 0, 1)]
    pictures = [{row["image"] for row in one.answers} for one in some]
    assert [len(p) for p in pictures] == [6, 6, 6]
    assert pictures[0] == pictures[1] != pictures[2]
    assert some[0].answers == some[1].answers
    with pytest.raises(UserError, match="at least 2"):
        score(folder, data, habit(folder), limit=1)


def test_intervals_hold_their_values(perfect, folder, data):
    result = score(folder, data, habit(folder))
    flat = flatten(result.metrics)
    assert {"pope.adversarial.accuracy", "pointing_game", "chair_i"} <= set(result.intervals)
    for name, (low, high) in result.intervals.items():
        assert low <= flat[name] <= high


def test_progress_counts_to_its_end(folder, data):
    seen: dict[str, list[tuple[int, int]]] = {}
    score(
        folder,
        data,
        oracle(folder),
        progress=lambda task, done, total: seen.setdefault(task, []).append((done, total)),
    )
    assert {"yes/no questions", "captions", "attention maps"} <= set(seen)
    for steps in seen.values():
        assert steps[-1][0] == steps[-1][1]
        assert steps == sorted(steps)


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


@pytest.mark.parametrize("name", ["pope_adversarial.json", "captions.json", "instances.json"])
def test_a_folder_that_is_not_scenes_says_what_is_missing(data, tmp_path, name):
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"agevlm scenes.*{name} missing") as error:
        read_scene_folder(copy)
    assert "\n" not in str(error.value)


def damage(copy: Path, kind: str) -> None:
    if kind == "pope":
        lines = (copy / "pope_random.json").read_text().splitlines()
        lines[2] = lines[2][:-5]
        (copy / "pope_random.json").write_text("\n".join(lines))
    elif kind == "label":
        row = {"question_id": 1, "image": "000000.png", "text": "Is there?", "label": "maybe"}
        (copy / "pope_random.json").write_text("\n" + json.dumps(row))
    elif kind == "coco":
        (copy / "instances.json").write_text('{"images": [], "annotations": 3, "categories": []}')
    elif kind == "annotation":
        table = json.loads((copy / "instances.json").read_text())
        table["annotations"][0].pop("category_id")
        (copy / "instances.json").write_text(json.dumps(table))
    elif kind == "outside":
        table = json.loads((copy / "instances.json").read_text())
        table["images"][0]["file_name"] = "../../secret.png"
        text = (copy / "pope_random.json").read_text().replace("000000.png", "../../secret.png")
        (copy / "pope_random.json").write_text(text)
        (copy / "instances.json").write_text(json.dumps(table))
        (copy / "../../secret.png").touch()
    elif kind == "image":
        (copy / "images" / "000003.png").unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pope", r"pope_random.json:3: malformed JSON"),
        ("label", r"pope_random.json:2: expected question_id"),
        ("coco", r"instances.json: expected a COCO file"),
        ("annotation", r"KeyError at 'category_id'"),
        ("outside", r"expected the image \.\./\.\./secret.png in it"),
        ("image", r"expected the image 000003.png"),
    ],
)
def test_damaged_files_are_named(data, tmp_path, kind, message):
    copy = shutil.copytree(data, tmp_path / "a" / "b" / "copy")
    damage(copy, kind)
    with pytest.raises(UserError, match=message):
        read_scene_folder(copy)


def test_pope_files_are_read_as_lines_and_as_an_array(data, tmp_path):
    lines = read_pope(data / "pope_random.json")
    (tmp_path / "array.json").write_text(json.dumps(lines, indent=2))
    assert read_pope(tmp_path / "array.json") == lines
    assert len(lines) == 2 * IMAGES
