"""The file of docs/evaluation-harnesses.md that brings our models into VLMEvalKit, run as it is
there against a package with the same names."""

import os
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import generate, load
from agevlm_mlx.weights import shipped

DOCS = Path(__file__).parents[1] / "docs" / "evaluation-harnesses.md"
#: What VLMEvalKit's own run.py does with a model, in short.
RUN = """
from vlmeval.config import supported_VLM
model = supported_VLM["agevlm"]()
answers = [model.generate(message, dataset="POPE") for message in supported_VLM["asked"]]
supported_VLM["answers"] = answers
"""


class BaseModel:
    INTERLEAVE = False
    allowed_types = ("text", "image")

    def generate(self, message: Any, dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)  # pyright: ignore

    def message_to_promptimg(self, message: Any, dataset: str | None = None) -> Any:
        raise AssertionError("it drops pictures")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """VLMEvalKit's dictionary of models, with the recipe and a picture in the current folder."""
    supported: dict[str, Any] = {}
    members = {
        "vlmeval": {},
        "vlmeval.vlm": {},
        "vlmeval.config": {"supported_VLM": supported},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
    }
    for name, values in members.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    (recipe,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "run_agevlm.py").write_text(recipe, encoding="utf-8")
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "AGEVLM_MODEL", str(shipped("model")))
    return supported


def part(kind: str, value: str) -> dict[str, str]:
    return {"type": kind, "value": value}


def test_the_recipe_answers_as_we_do(asked: dict[str, Any]):
    question = [part("text", "Is there a dog"), part("text", "in the image?")]
    asked["asked"] = [[part("image", "1.png"), *question], question]
    runpy.run_path("run_agevlm.py", run_name="__main__")
    it = load(shipped("model"))
    words = "Is there a dog\nin the image?"
    assert asked["answers"] == [
        generate(it.model, it.tokenizer, it.preprocessor, words, images, max_tokens=64)
        for images in (["1.png"], [])
    ]


def test_several_pictures_are_refused(asked: dict[str, Any]):
    pictures = [part("image", "1.png"), part("image", "1.png")]
    asked["asked"] = [[*pictures, part("text", "What changed?")]]
    with pytest.raises(ValueError, match="POPE: agevlm takes one picture a question, got 2"):
        runpy.run_path("run_agevlm.py", run_name="__main__")
