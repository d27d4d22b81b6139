"""How often a model says what the scenes say: the script that measures it."""

import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from agevlm_mlx.data.record_set import read_records
from agevlm_mlx.evaluation.respondent import Request
from agevlm_mlx.scenes import main as scenes

ROOT = Path(__file__).parents[1]


class Knowing:
    """Gives the answers of the scenes, to all questions but those of one kind."""

    def __init__(self, data: Path, wrong: str) -> None:
        self.known = {
            (r.image, r.turns[0].text): "I cannot see it." if r.kind == wrong else r.turns[1].text
            for r in read_records(data)
        }

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        return {}

    def generate(self, requests: Sequence[Request], max_tokens: int) -> Iterator[tuple[int, str]]:
        for n in reversed(range(len(requests))):
            image = requests[n].image
            assert image is not None
            yield n, self.known.get((image, requests[n].prompt), "There is none.").lower()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts/measure_sentences.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "rich"
    scenes(["--out", str(folder), "--n", "12", "--seed", "4", "--texts", "rich"])
    return folder


def test_what_is_said_is_held_against_the_own_picture(script, data, capsys, monkeypatch):
    monkeypatch.setattr(script, "respondent", lambda name: Knowing(data, "sentence_position"))
    assert script.main(["--model", "any", "--data", str(data)]) == 0
    said = capsys.readouterr().out
    shares = {k: (r, s) for k, r, s in re.findall(r"^(sentence_\w+) +(\S+) +(\S+)", said, re.M)}
    assert shares.keys() == set(script.KINDS)
    for kind, (right, shuffled) in shares.items():
        assert float(right) == (kind != "sentence_position")
        assert float(shuffled) < 1
    assert said.count("(expected: The ") == script.SHOWN


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("the image shows a dog and a cat.", "The image shows a cat and a dog.", True),
        ("It shows a cat, a dog and a key.", "It shows a dog, a key and a cat.", True),
        ("The image shows a dog and a dog.", "The image shows a dog and a cat.", False),
        ("The dog is big", "The dog is big.", True),
        ("The dog is big.", "The dog is small.", False),
        ("Big is the dog.", "The dog is big.", False),
        ("No, there is no dog in the image.", "Yes, there is a dog in the image.", False),
    ],
)
def test_words_count_and_the_order_of_a_list_does_not(script, said, answer, right):
    assert script.same(said, answer) is right


def test_scenes_without_sentences_are_refused(script, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "short"
    scenes(["--out", str(folder), "--n", "2"])
    monkeypatch.setattr(script, "respondent", lambda name: Knowing(folder, ""))
    assert script.main(["--model", "any", "--data", str(folder)]) == 2
    assert "--texts rich makes them" in capsys.readouterr().err
