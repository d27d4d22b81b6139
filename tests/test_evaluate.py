"""`agevlm evaluate`: what it prints, what it writes, and what it says about bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agevlm_mlx import respondents, weights
from agevlm_mlx.benchmarks import NAMES
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data import chat, scenes
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.evaluate import main
from agevlm_mlx.evaluation.benchmark import flatten
from agevlm_mlx.models.agevlm import AgeVLM
from tests.suite.fakes import Scripted

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


def result(tmp_path: Path, name: str = "scenes-mine") -> dict:
    return json.loads((tmp_path / "results" / f"{name}.json").read_text())


def test_numbers_are_printed_and_written_with_all_that_made_them(command, model, tmp_path, capsys):
    assert main([*command, "--all"]) == 0
    printed = capsys.readouterr().out
    found = result(tmp_path)
    lines = [line.strip() for line in printed.splitlines()]
    for name, value in flatten(found["metrics"]).items():
        inner = name.partition(".")[2]
        shown = [line for line in lines if line.startswith(f"{inner} ") and f"{value:.3f}" in line]
        assert shown, name
        if name in found["intervals"]:
            assert "[" in shown[0]
    assert found["counts"]["images"] == IMAGES
    assert found["model"]["fingerprint"] == weights.fingerprint(model)
    assert found["model"]["parameters"] > 1000
    assert "mlx" in found["versions"]
    assert found["machine"]["device"]
    assert found["command"].startswith("agevlm evaluate --benchmark scenes")
    assert found["settings"]["prompt"] == "{question}"
    assert found["settings"]["decoding"] == "greedy"
    assert found["finished"]
    for control in ("blind", "shuffled"):
        assert found["controls"][control]["text"]["pope"]["random"]["accuracy"] >= 0
    assert set(found["controls"]["constant"]) == {"yes", "no"}
    answers = (tmp_path / "results" / "scenes-mine.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in answers]
    assert kinds.count("text") == kinds.count("likelihood") == IMAGES
    assert found["counts"]["items"] == len(kinds)


def test_the_main_numbers_alone_unless_all_are_asked_for(command, capsys):
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "more with --all)" in printed
    assert "pope.adversarial.accuracy" in printed
    assert "repeated_mentions" not in printed
    title = next(line for line in printed.splitlines() if "by the words" in line)
    assert title.split()[-5:] == ["blind", "shuffled", "always", "yes", "majority"] or (
        title.split()[-5:] == ["blind", "shuffled", "always", "no", "majority"]
    )


def test_the_same_seed_gives_the_same_answers(command, tmp_path):
    found = []
    for seed in ("3", "3", "4"):
        assert main([*command, "--limit", "3", "--seed", seed, "--fresh"]) == 0
        lines = (tmp_path / "results" / "scenes-mine.jsonl").read_text().splitlines()
        found.append(sorted(lines))
    assert found[0] == found[1] != found[2]


def test_what_is_answered_is_not_asked_again(command, tmp_path, capsys, monkeypatch):
    assert main(command) == 0
    first, before = result(tmp_path), (tmp_path / "results" / "scenes-mine.jsonl").read_bytes()
    capsys.readouterr()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        for name in ("generate", "options", "log_likelihood", "look"):
            patch.setattr(respondents.Ours, name, refuse)
        assert main(command) == 0
    items = first["counts"]["items"]
    assert f"scenes: {items} of {items} items were answered before" in capsys.readouterr().out
    assert (tmp_path / "results" / "scenes-mine.jsonl").read_bytes() == before
    assert result(tmp_path)["metrics"] == first["metrics"]
    # Neither a finished result nor its answers make room for one of other settings by themselves.
    assert main([*command, "--limit", "3"]) == 2
    assert "with limit None, now 3; --fresh replaces them" in capsys.readouterr().err
    assert (tmp_path / "results" / "scenes-mine.jsonl").read_bytes() == before
    assert main([*command, "--limit", "3", "--fresh"]) == 0
    assert result(tmp_path)["counts"]["images"] == 3


def test_kept_answers_are_scored_by_the_labels_of_today(command, data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    command[command.index("--data") + 1] = str(copy)
    assert main(command) == 0
    before = result(tmp_path)["metrics"]["text"]["pope"]["random"]
    lines = [json.loads(line) for line in (copy / "pope_random.json").read_text().splitlines()]
    for line in lines:
        line["label"] = "yes"
    (copy / "pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(command) == 0
    now = result(tmp_path)["metrics"]["text"]["pope"]["random"]
    assert before["accuracy"] == 0.5  # the model always says the same
    assert now["accuracy"] == now["yes_ratio"] == before["yes_ratio"] != 0.5
    path = str(tmp_path / "results" / "scenes-mine.json")
    assert main(["--compare", path, path]) == 0  # the file says what the numbers are made of


def test_answers_of_which_nothing_is_known_are_not_dropped(command, tmp_path, capsys):
    assert main(command) == 0
    (tmp_path / "results" / "scenes-mine.json").unlink()
    assert main(command) == 2
    assert "answers without a readable scenes-mine.json" in capsys.readouterr().err


def test_only_what_was_changed_is_asked_again(command, data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    command[command.index("--data") + 1] = str(copy)
    broken = sorted((copy / "images").iterdir())[-1]
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])  # its header is good
    assert main([*command, "--batch-size", "2"]) == 2
    kept = (tmp_path / "results" / "scenes-mine.jsonl").read_text().splitlines()
    assert len(kept) > 20
    broken.unlink()
    capsys.readouterr()
    assert main([*command, "--batch-size", "2", "--skip-bad"]) == 0
    # Captions that were told from the one of the picture that is gone are asked again as well.
    again = result(tmp_path)["asked_again"]
    assert 0 < again < 4
    assert result(tmp_path)["answered_before"] == len(kept) - again
    assert f"scenes: {again} were asked again" in capsys.readouterr().out
    assert result(tmp_path)["counts"]["images"] == IMAGES - 1
    broken.write_bytes(whole)
    assert main([*command, "--batch-size", "2"]) == 0
    assert result(tmp_path)["counts"]["images"] == IMAGES
    assert result(tmp_path)["answered_before"] < result(tmp_path)["counts"]["items"]
    first = sorted((copy / "images").iterdir())[0]
    shutil.copy(broken, first)  # another picture under the same name
    assert main([*command, "--batch-size", "2"]) == 0
    found = result(tmp_path)
    assert found["answered_before"] == found["counts"]["items"] * (IMAGES - 1) // IMAGES


def test_answers_about_pictures_that_are_away_stay(command, data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    command[command.index("--data") + 1] = str(copy)
    assert main(command) == 0
    whole = result(tmp_path)
    away = sorted((copy / "images").iterdir())[0]
    away.rename(tmp_path / "away.png")
    assert main([*command, "--skip-bad"]) == 0
    assert result(tmp_path)["counts"]["images"] == IMAGES - 1
    assert result(tmp_path)["not_asked"]
    path = str(tmp_path / "results" / "scenes-mine.json")
    assert main(["--compare", path, path]) == 0
    (tmp_path / "away.png").rename(away)
    assert main(command) == 0
    now = result(tmp_path)
    assert now["counts"]["images"] == IMAGES
    assert now["answered_before"] >= whole["counts"]["items"] - 4
    assert now["not_asked"] == []


def test_answers_to_other_data_are_not_dropped(command, tmp_path, capsys):
    assert main(command) == 0
    before = (tmp_path / "results" / "scenes-mine.jsonl").read_bytes()
    other = tmp_path / "other"
    scenes.write_scenes(other, IMAGES, seed=2, split="test")
    command[command.index("--data") + 1] = str(other)
    assert main(command) == 2
    assert "are to what is asked now, about pictures that are the same" in capsys.readouterr().err
    assert (tmp_path / "results" / "scenes-mine.jsonl").read_bytes() == before


def test_all_benchmarks_are_read_before_the_first_is_asked(command, tmp_path, capsys):
    command[command.index("--benchmark") + 1] = "scenes,mme"
    assert main(command) == 2
    assert "MME" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


def broken_off(command: list[str], monkeypatch: pytest.MonkeyPatch, after: int = 20) -> None:
    """Ctrl-C after so many answers in words."""
    generate = respondents.Ours.generate

    def interrupted(self, requests, max_tokens):
        for n, pair in enumerate(generate(self, requests, max_tokens)):
            if n == after:
                raise KeyboardInterrupt
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(respondents.Ours, "generate", interrupted)
        assert main(command) == 130


def test_a_run_that_was_broken_off_goes_on(command, tmp_path, capsys, monkeypatch):
    broken_off(command, monkeypatch)
    told = capsys.readouterr().err
    assert re.search(r"scenes: \d+ of \d+ items are answered and kept; the same command", told)
    assert result(tmp_path)["finished"] is None
    kept = (tmp_path / "results" / "scenes-mine.jsonl").read_text().splitlines()
    assert kept
    assert main(command) == 0
    assert f"scenes: {len(kept)} of" in capsys.readouterr().out
    assert result(tmp_path)["answered_before"] == len(kept)
    whole = result(tmp_path)["metrics"]
    assert main([*command, "--fresh"]) == 0
    assert result(tmp_path)["metrics"] == whole


def test_a_run_of_another_kind_does_not_drop_one_that_was_broken_off(
    command, tmp_path, capsys, monkeypatch
):
    broken_off(command, monkeypatch)
    kept = (tmp_path / "results" / "scenes-mine.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*command, "--prompt", "{question} Yes or no?"]) == 2
    error = capsys.readouterr().err
    assert "with prompt '{question}', now '{question} Yes or no?'; --fresh replaces them" in error
    assert (tmp_path / "results" / "scenes-mine.jsonl").read_bytes() == kept
    assert main([*command, "--prompt", "{question} Yes or no?", "--fresh"]) == 0
    assert result(tmp_path)["settings"]["prompt"] == "{question} Yes or no?"


def test_another_model_of_the_same_name_replaces_no_result(command, model, tmp_path, capsys):
    assert main(command) == 0
    before = (tmp_path / "results" / "scenes-mine.json").read_bytes()
    again = tmp_path / "again" / "mine"
    shutil.copytree(model, again)
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps(config, indent=7))  # another fingerprint
    command[command.index("--model") + 1] = str(again)
    assert main(command) == 2
    assert "are by another model, or the same before it changed" in capsys.readouterr().err
    assert (tmp_path / "results" / "scenes-mine.json").read_bytes() == before
    assert main([*command, "--fresh"]) == 0


def test_two_results_are_compared(command, model, tmp_path, capsys):
    assert main(command) == 0
    results = tmp_path / "results"
    for end in (".json", ".jsonl"):
        (results / f"scenes-other{end}").write_bytes((results / f"scenes-mine{end}").read_bytes())
    capsys.readouterr()
    paths = [str(results / "scenes-mine.json"), str(results / "scenes-other.json")]
    assert main(["--compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert "items answered by both" in printed
    line = next(line for line in printed.splitlines() if "text.pope.random.accuracy" in line)
    assert line.endswith("+0.000   [+0.000, +0.000]")
    assert main(["--compare", paths[0], str(results / "scenes-third.json")]) == 2
    assert "scenes-third.json" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_asked_and_writes_nothing(command, tmp_path, capsys):
    assert (
        main([*command, "--dry-run", "--model", "nowhere", "--prompt", "{question} Really?"]) == 0
    )
    printed = capsys.readouterr().out
    assert f"about {IMAGES} images, {IMAGES} units" in printed
    assert "Really?" in printed
    assert not (tmp_path / "results").exists()


def test_bad_pictures_stop_it_or_are_left_out(command, data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    broken = sorted((copy / "images").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:200])
    command[command.index("--data") + 1] = str(copy)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert broken.name in error
    assert "--skip-bad" in error
    assert main([*command, "--skip-bad"]) == 0
    found = result(tmp_path)
    assert found["counts"]["images"] == IMAGES - 1
    assert found["counts"]["bad"] >= 1
    assert any(broken.name in problem for problem in found["problems"])
    assert "left out as unusable" in capsys.readouterr().out


def test_another_model_answers_through_the_same_door(command, tmp_path, monkeypatch):
    """Whoever keeps to `Respondent` can be evaluated."""
    monkeypatch.setattr(respondents, "respondent", lambda model: Scripted(lambda request: "Yes"))
    assert main(command) == 0
    found = result(tmp_path, "scenes-scripted")
    assert found["metrics"]["text"]["pope"]["adversarial"]["yes_ratio"] == 1.0
    assert found["metrics"]["text"]["pope"]["adversarial"]["accuracy"] == 0.5
    always = found["controls"]["constant"]["yes"]["pope"]["adversarial"]
    assert always["f1"] == pytest.approx(2 / 3)


def test_every_benchmark_is_listed_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--benchmark", "pop"), "--benchmark: expected one of scenes"),
        (("--data", "nowhere"), "agevlm scenes --out nowhere"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
        (("--model", "~nosuchuser/x"), "--model: expected a folder or hub id"),
        (("--model", "x" * 300), "--model: expected a folder or hub id"),
        (("--max-tokens", "1000000000000"), "--max-tokens: expected less than 2^31"),
        (("--limit", "0"), "--limit"),
        (("--limit", "-3"), "--limit"),
        (("--prompt", "Yes or no?"), "--prompt: expected '{question}'"),
        (("--batch-size", "1"), "--batch-size"),
        (("--data", ""), "--data: expected the benchmark's folder"),
        (("--data", "~nosuchuser/x"), "--data: expected a folder"),
        (("--data", "x" * 300), "--data: expected a folder"),
        (("--out", "x" * 300), "cannot make this folder"),
        (("--compare", "a", "b", "--seed", "-1"), "--seed: expected 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_no_result(change, message, command, tmp_path, capsys):
    assert main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.json*"))


def test_a_folder_without_scenes_says_what_is_missing_and_where_to_get_it(
    command, tmp_path, capsys
):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([*command, "--data", str(empty)]) == 2
    error = capsys.readouterr().err
    assert "pope_random.json" in error
    assert "agevlm scenes" in error
    (tmp_path / "taken").touch()
    assert main([*command, "--out", str(tmp_path / "taken")]) == 2
    assert "expected a folder, got a file" in capsys.readouterr().err
    assert main(["--data", str(empty)]) == 2
    assert "--benchmark: expected one of" in capsys.readouterr().err
    assert main(["--benchmark", "pope"]) == 2
    assert "--data: expected" in capsys.readouterr().err


def test_a_question_of_absurd_length_is_named(command, data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    command[command.index("--data") + 1] = str(copy)
    lines = (copy / "pope_random.json").read_text().splitlines()
    long = json.loads(lines[2]) | {"text": "Is there a " + "very " * 9000 + "big dog?"}
    (copy / "pope_random.json").write_text("\n".join([*lines[:2], json.dumps(long), *lines[3:]]))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "pope_random.json:3: expected at most 8000 characters to ask, got 45" in error


@pytest.mark.chaos
def test_a_killed_run_loses_no_answer(command, tmp_path):
    """kill -9 in the middle; the same command then ends as one that was never disturbed."""
    line = [sys.executable, "-m", "agevlm_mlx", "evaluate", *command]
    answers = tmp_path / "results" / "scenes-mine.jsonl"
    seen = 0
    for _ in range(3):
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            while run.poll() is None:
                now = answers.read_text().count("\n") if answers.is_file() else 0
                if now > seen + 5:
                    run.send_signal(signal.SIGKILL)
                time.sleep(0.002)
        kept = answers.read_text().count("\n")
        assert kept >= seen
        seen = kept
    assert main(command) == 0
    whole = result(tmp_path)["metrics"]
    assert main([*command, "--fresh"]) == 0
    assert result(tmp_path)["metrics"] == whole
