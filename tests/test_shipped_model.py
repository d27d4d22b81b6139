"""The model in the package keeps what its card says, on scenes that no training or choice saw."""

from pathlib import Path
from typing import Any

import pytest

from agevlm_mlx.benchmarks.scenes import BENCHMARK
from agevlm_mlx.data.nouns import Split
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.data.styles import Style
from agevlm_mlx.evaluation import scoring
from agevlm_mlx.evaluation.answers import AnswerFile
from agevlm_mlx.evaluation.run import Run, Settings
from agevlm_mlx.evaluation.source import Source
from agevlm_mlx.respondents import Ours
from agevlm_mlx.weights import load

pytestmark = pytest.mark.e2e

SHIPPED = Path(__file__).parents[1] / "agevlm_mlx" / "assets" / "model"


def asked(folder: Path, split: Split, style: Style = "plain") -> Any:
    """way -> number -> value, of 60 scenes."""
    write_scenes(folder / "scenes", 60, 7700, split, style=style)
    with Source(folder / "scenes", False) as source:
        items = BENCHMARK.read(source)
    with AnswerFile(folder / "answers.jsonl") as file:
        Run(Ours(load(None)), BENCHMARK, Settings(), file).ask(items)
        rows = list(file.rows.values())
    return scoring.score(BENCHMARK, rows, scoring.units(rows), 1, 0)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 10_000_000


@pytest.mark.parametrize(
    ("split", "chair", "recall"), [("test", 0.06, 0.93), ("uniform", 0.14, 0.83)]
)
def test_it_answers_from_the_picture(
    split: Split, chair: float, recall: float, tmp_path: Path
) -> None:
    found = asked(tmp_path, split)
    assert found["text"]["pope.adversarial.accuracy"] >= 0.94
    assert found["shuffled.text"]["pope.adversarial.accuracy"] <= 0.62
    assert found["look"]["pointing_game_tolerance"] >= 0.95
    assert found["logits"]["matching_auroc_hard"] >= 0.95
    assert found["text"]["chair_i"] <= chair
    assert found["text"]["recall"] >= recall


@pytest.mark.parametrize("style", ["recoloured", "outlined", "blurred", "scaled"])
def test_it_knows_things_in_looks_that_it_never_saw(style: Style, tmp_path: Path) -> None:
    assert asked(tmp_path, "test", style)["text"]["pope.adversarial.accuracy"] >= 0.85
