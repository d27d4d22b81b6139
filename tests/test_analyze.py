"""`agevlm analyze`: what it prints, what it writes, and what it says about bad input."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from agevlm_mlx import analyze, cli
from agevlm_mlx.data import scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "test"
    scenes.write_scenes(folder, 5, seed=1, split="test")
    return folder


@pytest.fixture
def command(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    out = str(tmp_path / "out")
    return ["--data", str(data), "--model", str(tiny_checkpoint), "--out", out, "--boots", "50"]


def read(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.e2e
def test_a_page_and_its_numbers_are_written_and_said_in_words(command, tmp_path, capsys):
    assert cli.main(["analyze", *command, "--limit", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"written: {tmp_path / 'out' / 'report.html'}, report.json"
    assert all(line.startswith("checkpoint: ") for line in printed[:-1])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for line in printed[:-1]:
        assert line.removeprefix("checkpoint: ").replace("'", "&#x27;") in page
    result = read(tmp_path)
    assert result["data"]["images"] == 4
    assert (result["data"]["split"], result["data"]["seed"]) == ("test", 1)
    assert len(result["data"]["sha256"]) == 16
    assert "split test" in page
    assert result["command"].startswith("agevlm analyze --data")
    assert result["command"].endswith("--limit 4")
    (model,) = result["models"]
    assert model["about"]["fingerprint"] in page
    assert model["matching"]["images"] == 4
    assert model["matching"]["others"] == 3
    assert len(model["matching"]["layers"]) == 4  # the embedding and three layers
    assert model["attention"]["phrases"] > 0
    assert model["causal"]["objects"] > 0
    assert {"versions", "machine", "settings", "seconds", "finished"} <= result.keys()


@pytest.mark.e2e
def test_one_part_of_two_models_and_the_same_seed_is_the_same_result(
    command, tiny_checkpoint, tmp_path
):
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in tiny_checkpoint.iterdir():
        os.link(file, twin / file.name)
    wanted = [*command, "--only", "matching", "--limit", "3", "--model", str(twin), "--fresh"]
    found = []
    for seed in ("1", "1", "2"):
        assert analyze.main([*wanted, "--seed", seed, "--others", "1"]) == 0
        found.append(read(tmp_path)["models"])
    assert found[0] == found[1] != found[2]
    first, second = found[0]
    assert first["matching"] == second["matching"]
    assert first["attention"] is first["causal"] is None
    assert first["matching"]["others"] == 1


@pytest.mark.e2e
def test_a_broken_picture_is_left_out_and_named(command, data, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(data, folder)
    victim = sorted((folder / "images").iterdir())[0]
    victim.write_bytes(b"no picture")
    assert analyze.main([*command, "--data", str(folder)]) == 0
    (model,) = read(tmp_path)["models"]
    assert model["matching"]["images"] == 4
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for part in ("matching", "attention", "causal"):
        assert any(victim.name in line for line in model[part]["problems"]), part
    assert "left out" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--only", "matching,atention"), "--only: expected some of matching, attention, causal"),
        (("--only", ","), "--only: expected some of"),
        (("--data", "nowhere"), "nowhere: no such folder"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
        (("--limit", "1"), "--limit: expected at least 2"),
        (("--limit", "-3"), "--limit: expected at least 2"),
        (("--others", "0"), "--others: expected 1 or more, got 0"),
        (("--batch-size", "0"), "--batch-size: expected 1 or more"),
        (("--boots", "0"), "--boots: expected 1 or more"),
        (("--boots", "2000000000"), "--boots: expected at most 100000"),
        (("--question", "Is it so?"), "expected '{caption}' in it"),
        (("--out", "/proc/nothing"), "/proc/nothing"),
        (("--seed", "-1"), "--seed: expected 0"),
        (("--model", "x", "--model", "./x/"), "expected different models"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(change, message, command, tmp_path, capsys):
    assert analyze.main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_folder_without_captions_and_one_with_a_single_picture(command, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert analyze.main([*command, "--data", str(tmp_path / "empty")]) == 2
    assert "expected llava.json, one .jsonl file, " in capsys.readouterr().err
    single = tmp_path / "single"
    (single / "images").mkdir(parents=True)
    for kind in ("captions", "instances"):
        (single / f"{kind}.json").write_bytes((data / f"{kind}.json").read_bytes())
    Image.new("RGB", (128, 128)).save(single / "images" / "000000.png")
    assert analyze.main([*command, "--data", str(single)]) == 2
    assert "expected at least 2 images with captions" in capsys.readouterr().err


def test_the_same_model_twice_and_too_many(command, tiny_checkpoint, capsys):
    assert analyze.main([*command, "--model", str(tiny_checkpoint)]) == 2
    assert "--model: expected different models" in capsys.readouterr().err
    many = [word for n in range(7) for word in ("--model", f"m{n}")]
    assert analyze.main([*command, *many]) == 2
    assert "--model: expected at most 6, got 8" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_started(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert analyze.main(command) == 2
    assert "pip install 'agevlm-mlx[analyze]'" in capsys.readouterr().err


def test_ctrl_c_ends_in_peace(command, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze.looking, "looking", interrupted)
    assert analyze.main([*command, "--only", "attention"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not list((tmp_path / "out").iterdir())


def test_help_explains_the_parts_with_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in analyze.PARTS)
    assert "agevlm analyze --data" in said


@pytest.mark.e2e
def test_a_model_that_fails_takes_nothing_of_those_before(
    command, tiny_checkpoint, tmp_path, capsys
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    line = ["analyze", *command, "--model", str(broken), "--limit", "3", "--only", "matching"]
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert "report.html has 1 of 2 models" in error
    assert "model.safetensors" in error
    assert [m["about"]["name"] for m in read(tmp_path)["models"]] == [tiny_checkpoint.name]


def changed(data: Path, tmp_path: Path, file: str, change) -> Path:
    copy = tmp_path / "changed"
    shutil.copytree(data, copy)
    table = json.loads((copy / file).read_text())
    change(table)
    (copy / file).write_text(json.dumps(table))
    return copy


@pytest.mark.e2e
def test_without_objects_only_captions_are_told_apart(command, data, tmp_path, capsys):
    bare = changed(data, tmp_path, "instances.json", lambda t: t["annotations"].clear())
    command[command.index("--data") + 1] = str(bare)
    assert cli.main(["analyze", *command, "--only", "attention,causal"]) == 2
    assert "expected objects with masks" in capsys.readouterr().err
    assert cli.main(["analyze", *command, "--limit", "3"]) == 0
    assert "no objects with masks, so no attention and causal" in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "does not show where it looks" not in page
    assert read(tmp_path)["settings"]["only"] == ["matching"]


@pytest.mark.e2e
def test_another_report_is_not_replaced_unasked(command, tmp_path, capsys):
    line = [*command, "--limit", "3", "--only", "matching"]
    assert analyze.main(line) == 0
    assert analyze.main(line) == 0  # the same again
    before = (tmp_path / "out" / "report.json").read_bytes()
    capsys.readouterr()
    assert analyze.main([*line, "--seed", "4"]) == 2
    assert "--fresh replaces it, another --out keeps both" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert analyze.main([*line, "--seed", "4", "--fresh"]) == 0


def test_captions_that_are_all_the_same_are_told_before_the_work(command, data, tmp_path, capsys):
    def same(table: dict) -> None:
        for one in table["annotations"]:
            one["caption"] = "A dog."

    command[command.index("--data") + 1] = str(changed(data, tmp_path, "captions.json", same))
    assert analyze.main(command) == 2
    assert "expected different captions, got 'A dog.' only" in capsys.readouterr().err


def test_a_book_is_no_caption(command, data, tmp_path, capsys):
    def long(table: dict) -> None:
        for one in table["annotations"][1:]:
            one["caption"] = "A dog. " * 1000

    command[command.index("--data") + 1] = str(changed(data, tmp_path, "captions.json", long))
    assert analyze.main(command) == 2
    assert "expected at least 2 images with captions" in capsys.readouterr().err


@pytest.mark.parametrize("name", [" ", "x" * 3000])
def test_a_category_that_is_no_noun_is_told(name, command, data, tmp_path, capsys):
    def unnamed(table: dict) -> None:
        table["categories"][0]["name"] = name

    command[command.index("--data") + 1] = str(changed(data, tmp_path, "instances.json", unnamed))
    assert analyze.main(command) == 2
    assert "has no name of a noun" in capsys.readouterr().err
