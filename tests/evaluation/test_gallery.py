"""The scenes shown in the report are the evaluation's own answers."""

import json
from pathlib import Path

import pytest

from agevlm_mlx.data import scenes as drawing
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.evaluation import files, scenes
from agevlm_mlx.evaluation.benchmark import Settings
from agevlm_mlx.evaluation.gallery import SIDE, Card, cards
from agevlm_mlx.evaluation.metrics import NounVocabulary
from agevlm_mlx.evaluation.scene_folder import SceneFolder, SceneItem, read_scene_folder

from .fakes import Script, fake

IMAGES = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[SceneFolder, Path]:
    path = tmp_path_factory.mktemp("scenes") / "test"
    drawing.write_scenes(path, IMAGES, seed=8, split="test")
    return read_scene_folder(path), path


def answers(folder: SceneFolder, path: Path, script: Script, out: Path) -> list[dict]:
    """The rows as they come back from the .jsonl."""
    result = scenes.run(fake(folder, script), path, Settings(boots=10))
    files.write_json_lines(out, result.answers)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def shown(folder: tuple[SceneFolder, Path], tmp_path: Path) -> list[Card]:
    scene_folder, path = folder
    nouns = NounVocabulary(list(scene_folder.themes))

    def knows(item: SceneItem | None, question: str) -> str:
        if item is None or question.startswith("Describe"):
            return item.caption if item else ""
        return "Yes" if nouns.mentions(question)[0] in item.objects else "No"

    rows = {
        "concat": answers(scene_folder, path, lambda *_: "Yes", tmp_path / "a.jsonl"),
        "guided": answers(scene_folder, path, knows, tmp_path / "b.jsonl"),
    }
    preprocessor = Preprocessor()
    placed = {arm: (preprocessor, (8, 8)) for arm in rows}
    return cards(scene_folder.items, rows, placed, count=4)


def test_a_card_shows_what_each_arm_said(shown, folder):
    assert len(shown) == 4
    captions = {item.caption for item in folder[0].items}
    for card in shown:
        present, absent = card.questions
        assert (present.label, absent.label) == (True, False)
        assert card.noun in present.question
        assert present.answers == {"concat": True, "guided": True}
        assert absent.answers == {"concat": True, "guided": False}
        assert card.captions == {"concat": "Yes", "guided": card.caption}
        assert card.caption in captions
        assert max(card.picture.size) == SIDE
        assert {tile.size for tile in card.overlays.values()} == {card.picture.size}
        assert 0 < card.uniform < card.energy["guided"] <= 1


def test_the_scenes_are_spread_over_the_test_set_not_chosen(folder, tmp_path):
    scene_folder, path = folder
    rows = {"guided": answers(scene_folder, path, lambda *_: "No", tmp_path / "a.jsonl")}
    placed = {"guided": (Preprocessor(), (8, 8))}
    every = cards(scene_folder.items, rows, placed, count=100)
    some = cards(scene_folder.items, rows, placed, count=3)
    assert len(every) <= IMAGES
    assert some[0].caption == every[0].caption
    assert some[-1].caption == every[-1].caption
    assert cards(scene_folder.items, {"guided": []}, placed) == []
