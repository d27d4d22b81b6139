"""`agevlm evaluate`: what it prints, what it writes, and what it says about bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agevlm_mlx import weights
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data import chat, scenes
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.evaluate import BENCHMARKS, main
from agevlm_mlx.evaluation.benchmark import flatten
from agevlm_mlx.models.agevlm import AgeVLM

IMAGES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "test"
    scenes.write_scenes(folder, IMAGES, seed=1, split="test")
    return folder


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_config: Callable[..., ModelConfig]
) -> Path:
    mx.random.seed(0)
    folder = tmp_path_factory.mktemp("models") / "mine"
    tokenizer = TokenizerWrapper(chat.build_tokenizer(["Is there a dog?", "Yes", "No"] * 3, 400))
    weights.save_model(
        folder, AgeVLM(tiny_model_config(400)), tokenizer, Preprocessor(image_size=16), "# mine\n"
    )
    return folder


@pytest.fixture
def command(data: Path, model: Path, tmp_path: Path) -> list[str]:
    out = str(tmp_path / "results")
    return [
        "--benchmark", "scenes", "--data", str(data), "--model", str(model), "--out", out,
    ]  # fmt: skip


def test_numbers_are_printed_and_written_with_all_that_made_them(command, model, tmp_path, capsys):
    assert main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "scenes-mine.json").read_text())
    for name, value in flatten(result["metrics"]).items():
        line = next(line for line in printed.splitlines() if line.strip().startswith(name + " "))
        assert f"{value:.3f}" in line
        if name in result["intervals"]:
            assert "[" in line
    assert result["counts"]["images"] == IMAGES
    assert result["model"]["fingerprint"] == weights.fingerprint(model)
    assert result["model"]["parameters"] > 1000
    assert "mlx" in result["versions"]
    assert result["machine"]["device"]
    assert result["command"].startswith("agevlm evaluate --benchmark scenes")
    assert result["settings"]["data"]["split"] == "test"
    answers = (tmp_path / "results" / "scenes-mine.jsonl").read_text().splitlines()
    tasks = [json.loads(line)["task"] for line in answers]
    assert tasks.count("pope") == 3 * 2 * IMAGES
    assert tasks.count("caption") == IMAGES


def test_the_same_seed_gives_the_same_answers(command, tmp_path):
    found = []
    for seed in ("3", "3", "4"):
        assert main([*command, "--limit", "3", "--seed", seed]) == 0
        found.append((tmp_path / "results" / "scenes-mine.jsonl").read_bytes())
    assert found[0] == found[1] != found[2]


def test_every_benchmark_is_listed_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in BENCHMARKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--benchmark", "pop"), "--benchmark: expected one of scenes"),
        (("--data", "nowhere"), "agevlm scenes --out nowhere"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
        (("--limit", "1"), "--limit"),
        (("--limit", "-3"), "--limit"),
    ],
)
def test_bad_input_is_one_line_and_writes_no_result(change, message, command, tmp_path, capsys):
    assert main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.json*"))


def test_a_folder_without_scenes_and_an_out_that_is_a_file(command, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([*command, "--data", str(empty)]) == 2
    assert "pope_random.json, pope_popular.json" in capsys.readouterr().err
    (tmp_path / "taken").touch()
    assert main([*command, "--out", str(tmp_path / "taken")]) == 2
    assert "expected a folder, got a file" in capsys.readouterr().err
