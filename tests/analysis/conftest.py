"""A finished analysis of two tiny models, one of either fusion, shared by the tests."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agevlm_mlx.analysis import causal, looking, matching
from agevlm_mlx.analysis.examples import Example, read_examples
from agevlm_mlx.analysis.subject import OurSubject
from agevlm_mlx.data import scenes


@dataclass(frozen=True)
class Analysed:
    """A result as `agevlm analyze` writes it, and the pictures it is of."""

    examples: list[Example]
    whole: dict[str, Any]

    @property
    def captions(self) -> dict[str, str]:
        return {str(example.image): example.caption for example in self.examples}

    def result(self) -> dict[str, Any]:
        """A copy that a test may change."""
        return copy.deepcopy(self.whole)


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis") / "scenes"
    scenes.write_scenes(folder, 5, seed=3, split="test")
    return folder


@pytest.fixture(scope="session")
def analysed(scene_folder: Path, tiny_talker: Callable[[str], Any]) -> Analysed:
    examples = read_examples(scene_folder)
    models = []
    for fusion in ("concat", "cross"):
        one = OurSubject(tiny_talker(fusion))
        settings = matching.Settings(others=2, boots=50)
        models.append(
            {
                "about": {**one.about, "path": f"models/{fusion}"},
                "matching": matching.measure(one, examples, settings),
                "attention": looking.looking(one, examples, boots=50),
                "causal": causal.causal(one, examples, boots=50),
            }
        )
    whole = {
        "command": "agevlm analyze --data scenes",
        "finished": "2026-01-02T03:04:05+00:00",
        "seconds": 12.3,
        "data": {"path": "scenes", "images": len(examples)},
        "settings": {"limit": None, "seed": 0, "only": ["matching", "attention", "causal"]},
        "versions": {"mlx": "1.2.3"},
        "machine": {"device": "CPU"},
        "models": models,
    }
    return Analysed(examples, whole)
