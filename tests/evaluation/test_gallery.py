"""The scenes shown in the report are the evaluation's own answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from agevlm_mlx.benchmarks.scenes import BENCHMARK
from agevlm_mlx.data import scenes as drawing
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.evaluation.answers import Row
from agevlm_mlx.evaluation.benchmark import Item
from agevlm_mlx.evaluation.gallery import SIDE, Card, cards
from agevlm_mlx.evaluation.scene_folder import SceneFolder, read_scene_folder
from agevlm_mlx.evaluation.source import Source

IMAGES = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[SceneFolder, Path]:
    path = tmp_path_factory.mktemp("scenes") / "test"
    drawing.write_scenes(path, IMAGES, seed=8, split="test")
    return read_scene_folder(path), path


def items(path: Path) -> list[Item]:
    with Source(path) as source:
        return BENCHMARK.read(source)


def rows(asked: Sequence[Item], knows: bool) -> list[Row]:
    """The answers of a model that knows every picture, or of one that says yes and looks at the
    first cell."""
    found = []
    for item in asked:
        row: Row = {key: getattr(item, key) for key in ("key", "unit", "kind", "prompt", "label")}
        row |= {"options": list(item.options), "about": dict(item.about), "phrase": item.phrase}
        if item.kind == "choice":
            row["scores"] = [0.0, 1.0] if knows and item.label == "no" else [0.0, -1.0]
        elif item.kind == "text":
            row["answer"] = f"Of {item.unit}." if knows else "Yes"
        elif item.kind == "look":
            assert item.mask is not None
            mask = item.mask()
            coverage = Preprocessor().geometry(*mask.shape[::-1]).mask_to_grid(mask, (8, 8))
            cell = int(coverage.argmax()) if knows else 0
            attention = np.arange(64) == cell
            row["look"] = {
                "map": attention.astype(float).tolist(),
                "energy": float(coverage[cell]),
                "uniform": float(coverage.mean()),
                "hit": knows,
            }
        found.append(row)
    return found


PLACED = (Preprocessor(), (8, 8))


@pytest.fixture
def shown(folder: tuple[SceneFolder, Path]) -> list[Card]:
    asked = items(folder[1])
    found = {"concat": rows(asked, False), "guided": rows(asked, True)}
    return cards(folder[0].items, found, dict.fromkeys(found, PLACED), count=4)


def test_a_card_shows_what_each_arm_said(shown, folder):
    assert len(shown) == 4
    names = {item.caption: item.name for item in folder[0].items}
    for card in shown:
        present, absent = card.questions
        assert (present.label, absent.label) == (True, False)
        assert card.noun in present.question
        assert present.answers == {"concat": True, "guided": True}
        assert absent.answers == {"concat": True, "guided": False}
        assert card.captions == {"concat": "Yes", "guided": f"Of {names[card.caption]}."}
        assert card.hit == {"concat": False, "guided": True}
        assert max(card.picture.size) == SIDE
        assert {tile.size for tile in card.overlays.values()} == {card.picture.size}
        assert 0 < card.uniform < card.energy["guided"] <= 1


def test_the_scenes_are_spread_over_the_test_set_not_chosen(folder):
    scene_folder, path = folder
    found, placed = {"guided": rows(items(path), True)}, {"guided": PLACED}
    every = cards(scene_folder.items, found, placed, count=100)
    some = cards(scene_folder.items, found, placed, count=3)
    assert len(every) == IMAGES
    assert some[0].caption == every[0].caption
    assert some[-1].caption == every[-1].caption
    assert cards(scene_folder.items, {"guided": []}, placed) == []


def test_a_scene_whose_object_cannot_be_seen_is_not_shown(folder):
    scene_folder, path = folder
    found = rows(items(path), True)
    hidden = next(row for row in found if row["kind"] == "look")
    hidden["look"] = {}
    every = cards(scene_folder.items, {"guided": found}, {"guided": PLACED}, count=100)
    assert len(every) == IMAGES - 1
