"""`agevlm train` as a user runs it: a tiny recipe on real scenes, from start to a usable model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx import weights
from agevlm_mlx.errors import UserError
from agevlm_mlx.train import main
from agevlm_mlx.training import checkpoint, labels
from agevlm_mlx.training.build import prepare
from agevlm_mlx.training.log import read_metrics
from agevlm_mlx.training.rules import named_parameters
from agevlm_mlx.training.stages import read_recipe

from .conftest import TINY, label

CLOCKS = {"seconds", "waited"}
SHORT = ["stages.0.steps=2", "stages.1.steps=2", "train.val_every=2"]


def rows(run: Path) -> list[dict[str, Any]]:
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in found]


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command says before it exits with 2."""
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    where = {"train": "train", "val": "val", "store": "store", "val_store": "val-store"}
    data = [f"data.{key}={tiny_folder / name}" for key, name in where.items()]
    assert main(["--recipe", str(TINY), *data, "--out", str(run)]) == 0
    return run


def test_a_run_leaves_a_model_that_loads_and_is_the_trained_one(finished: Path):
    loaded = weights.load(finished)
    last = checkpoint.load(finished)
    assert last is not None
    assert last.step == 20
    stored = named_parameters(loaded.model)
    assert stored.keys() == last.model.keys()
    assert all(mx.array_equal(stored[k], last.model[k]).item() for k in stored)
    assert loaded.preprocessor.image_size == 32
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("A dog.")) == "A dog."
    assert "attention weight" in (finished / "README.md").read_text()


def test_a_run_keeps_its_recipe_and_every_step(finished: Path):
    recipe = read_recipe(str(finished / "config.toml"))
    assert recipe.train.out == finished
    assert [s.name for s in recipe.stages] == ["align", "guide"]
    steps = [row for row in rows(finished) if "lm" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert all(row["attention"] > 0 for row in steps[6:])
    assert steps[-1]["lm"] < steps[0]["lm"] - 1
    checks = [row for row in rows(finished) if "val_lm" in row]
    assert [row["step"] for row in checks] == [8, 16, 20]
    assert all(row["val_pointing"] is not None for row in checks)


def test_training_again_refuses_the_folder_and_overwrite_replaces_it(
    tiny: list[str], tmp_path: Path, capsys
):
    run = tmp_path / "run"
    (run / "notes").mkdir(parents=True)
    assert "is not empty" in fails(capsys, *tiny, "--out", str(run))
    assert "holds no run" in fails(capsys, *tiny, "--out", str(run), "--overwrite")
    assert [p.name for p in run.iterdir()] == ["notes"]
    shutil.rmtree(run / "notes")
    assert main([*tiny, *SHORT, "--out", str(run)]) == 0
    (run / "notes").mkdir()
    assert main([*tiny, *SHORT, "train.seed=1", "--out", str(run), "--overwrite"]) == 0
    assert (run / "notes").is_dir()
    assert [row["step"] for row in rows(run) if "lm" in row] == [1, 2, 3, 4]
    assert read_recipe(str(run / "config.toml")).train.seed == 1


def test_resuming_a_finished_run_changes_nothing(finished: Path, capsys):
    before = (finished / "metrics.jsonl").read_text(), weights.fingerprint(finished)
    assert main(["--resume", str(finished)]) == 0
    assert "going on from step 20 of 20" in capsys.readouterr().out
    assert ((finished / "metrics.jsonl").read_text(), weights.fingerprint(finished)) == before


def test_resume_wants_a_run_and_its_own_recipe(finished: Path, tmp_path: Path, capsys):
    assert "found no config.toml" in fails(capsys, "--resume", str(tmp_path))
    assert "the recipe is not" in fails(capsys, "--resume", str(finished), "stages.1.lr=1.0")
    assert "leave out --recipe" in fails(capsys, "--resume", str(finished), "--recipe", "scenes")


def test_a_dry_run_shows_what_would_be_trained_and_writes_nothing(
    tiny: list[str], tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([*tiny, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"vision_tower +[\d,]+ +frozen +lr x 0\.5", out)
    assert re.search(r"cross-attention +[\d,]+ +lr x 1 +lr x 1", out)
    assert re.search(r"guide +14 +4 +[\d.]+", out)
    assert re.search(r"<\|user\|>Describe the image\.<\|assistant\|>\[", out)
    assert re.search(r"<\|user\|>Is there an? .*<\|assistant\|>\^?\[(Yes|No)<\|end\|>\]", out)
    assert "^" in out.split("guide, record")[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stages.0.stepz=3", "stages[0].stepz: unknown key; did you mean 'steps'?"),
        ("data.train=nowhere", "data.train: nowhere does not exist"),
        ("stages.1.trainable=[['vision.*', 1]]", "stage 'guide' trainable: no rule matches"),
        ("model.text_config.vocab_size=100", "vocab_size: expected at least"),
        ("model.text_config.model_type=lama", "expected an mlx-lm architecture"),
        ("model.encoder=nowhere", "nowhere: no such folder"),
        ("data.store=nowhere", "-m agevlm_mlx.teach --data="),
        ("model.vision_config.image_size=48", "expected a store on a 6x6 token grid"),
        ("stages.1.losses.features=0.5", "holds no features"),
        ("stages.1.losses.attention.heads=5", "expected losses.attention.heads <= 4, got 5"),
        ("data.images=13", "data.images: expected at most 12, the images of "),
        ("data.images=0", "data: expected images >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(
    tiny: list[str], tmp_path: Path, capsys, monkeypatch, argument: str, message: str
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *tiny, argument, "--out", "run")
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_would_fill_the_memory_is_a_bad_record(tiny: list[str], tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert main([*tiny, *SHORT, "data.max_tokens=8", "--out", str(run)]) == 2
    assert "at most 8 tokens (data.max_tokens), got" in capsys.readouterr().err


def test_a_later_stage_without_texts_is_found_before_the_first(
    tiny: list[str], tmp_path: Path, capsys
):
    bare = [a for a in tiny if not a.startswith("data.val")]
    argument = "stages.1.texts=[{kinds=['poem']}]"
    assert "no texts of kind poem" in fails(capsys, *bare, argument, "--out", str(tmp_path / "run"))


def test_guidance_without_anything_to_guide_by_is_an_error(tiny: list[str], tmp_path: Path, capsys):
    bare = [a for a in tiny if not a.startswith("data.store")]
    error = fails(capsys, *bare, "--out", str(tmp_path / "run"))
    assert "stage 'guide'" in error
    assert "no phrase has a mask; label the data with `agevlm teach`" in error


def test_scenes_and_labels_are_made_when_missing(tiny: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    def teacher(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        flags = dict(word.split("=") for word in command if "=" in word)
        label(Path(flags["--data"]), Path(flags["--out"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(labels.subprocess, "run", teacher)
    arguments = ["data.scenes={n=6, val=4}", "data.val=val", "data.teach=true"]
    arguments += ["data.store=store", *SHORT]
    assert main([*tiny[:2], *arguments, "--out", "run"]) == 0
    assert len(list((tmp_path / "train/images").iterdir())) == 6
    assert len(list((tmp_path / "val/images").iterdir())) == 4
    (command,) = commands
    assert command[1:3] == ["-m", "agevlm_mlx.teach"]
    assert {"--data=train", "--out=store", "--image-size=32", "--grid=4x4"} <= set(command)
    assert main([*tiny[:2], *arguments, "--out", "again"]) == 0  # both are used again
    assert len(commands) == 1


def test_training_scenes_may_be_of_any_split_style_and_texts(
    tiny: list[str], tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spec = "{n=3, val=2, seed=5, split='balanced', style='varied', texts='rich'}"
    arguments = [f"data.scenes={spec}", "data.val=val", "stages.1.losses.attention.weight=0"]
    job = prepare(read_recipe(tiny[1], arguments))
    made = [json.loads(Path(folder, "scenes.json").read_text()) for folder in ("train", "val")]
    wanted = {"split": "balanced", "style": "varied", "texts": "rich"}
    assert all(wanted.items() <= about.items() for about in made)
    assert [(about["n"], about["seed"]) for about in made] == [(3, 5), (2, 6)]
    assert "dialogue" in job.records.kinds
    with pytest.raises(UserError, match="holds other scenes"):
        prepare(read_recipe(tiny[1], [*arguments, "data.scenes.style=plain"]))


def test_a_run_on_a_part_of_the_data_sees_nothing_of_the_rest(tiny: list[str], tiny_folder: Path):
    part, whole = (
        prepare(read_recipe(str(TINY), [*tiny[2:], *more])) for more in (["data.images=5"], [])
    )
    assert list(part.records.images) == list(whole.records.images)[:5]
    assert {record.image for record in part.records} == set(part.records.images)
    batches = part.batches(part.recipe.stages[1])
    shown = {name.split("-")[0] for step in range(8) for name in batches.batch(step).record_ids}
    assert shown == {f"{n:06d}" for n in range(5)}
    for a, b in zip(part.validation(), whole.validation(), strict=True):
        assert np.array_equal(a.pixels, b.pixels)
    assert part.recipe.fingerprint() != whole.recipe.fingerprint()
    assert part.data != whole.data


def test_a_part_of_the_data_needs_its_own_labels_only(
    tiny: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch
):
    label(tiny_folder / "train", tmp_path / "half", most=5)
    overrides = [*tiny[2:], f"data.store={tmp_path / 'half'}"]
    assert prepare(read_recipe(str(TINY), [*overrides, "data.images=5"])).store is not None
    with pytest.raises(UserError, match="does not hold labels for all images"):
        prepare(read_recipe(str(TINY), [*overrides, "data.images=6"]))


def test_labels_that_stop_half_way_are_completed_first(
    tiny: list[str], tiny_folder: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    label(tiny_folder / "train", Path("half"), most=5)
    error = fails(capsys, *tiny, "data.store=half", "--out", "run")
    assert "half does not hold labels for all images" in error

    def teacher(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        label(tiny_folder / "train", Path("half"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(labels.subprocess, "run", teacher)
    assert main([*tiny, *SHORT, "data.store=half", "data.teach=true", "--out", "run"]) == 0


def test_a_teacher_that_fails_ends_the_command(
    tiny: list[str], tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(labels.subprocess, "run", lambda command, **_: failed)
    error = fails(capsys, *tiny, "data.teach=true", "data.store=new", "--out", "run")
    assert "the teacher ended with exit status 3" in error


def test_the_best_weights_can_be_the_result(tiny: list[str], tmp_path: Path, monkeypatch):
    values = iter([2.0, 3.0])
    monkeypatch.setattr(
        "agevlm_mlx.training.trainer.validate",
        lambda *_: {"val_lm": next(values), "val_pointing": None},
    )
    run = tmp_path / "run"
    assert main([*tiny, *SHORT, "train.export=best", "--out", str(run)]) == 0
    best = checkpoint.load_step(run, 2)
    stored = named_parameters(weights.load(run).model)
    assert all(mx.array_equal(stored[k], best.model[k]).item() for k in stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_distilled_and_their_head_is_left_behind(
    tiny: list[str], tiny_folder: Path, tmp_path: Path, dtype: str
):
    run = tmp_path / "run"
    arguments = [
        f"train.dtype={dtype}",
        f"data.store={tiny_folder / 'store-features'}",
        "stages.1.losses.features=0.5",
        "stages.0.trainable=[['vision_tower.*|sam_adaptor.*', 0], ['.*', 1]]",
        "stages.1.trainable=[['vision_tower.*|sam_adaptor.*', 1], ['.*', 0]]",
    ]
    assert main([*tiny, *SHORT, *arguments, "--out", str(run)]) == 0
    assert all(row["features"] > 0 for row in rows(run) if row.get("step", 0) > 2 and "lm" in row)
    last = checkpoint.load(run)
    assert last is not None
    assert last.model["sam_adaptor.fc1.weight"].dtype == mx.float32
    assert "sam_adaptor" not in weights.load(run).model
    assert main(["--resume", str(run)]) == 0


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_are_trained_resumed_and_fused(
    finished: Path, tiny: list[str], tmp_path: Path, dora: bool
):
    recipe = tmp_path / "lora.toml"
    text = TINY.read_text()
    start, end = text.index("[model.text_config]"), text.index("[data]")
    lora = f"lora = {{ rank = 2, dora = {str(dora).lower()} }}"
    recipe.write_text(f'{text[:start]}[model]\ninit = "{finished}"\n{lora}\n{text[end:]}')
    only = [
        f"stages.{n}.trainable=[['language_model.*[.](lora_a|lora_b|m)', 1], ['.*', 0]]"
        for n in (0, 1)
    ]
    run = tmp_path / "run"
    arguments = ["--recipe", str(recipe), *tiny[2:], *SHORT, *only, "train.grad_checkpoint=true"]
    assert main([*arguments, "--out", str(run)]) == 0
    old, new = (named_parameters(weights.load(f).model) for f in (finished, run))
    assert old.keys() == new.keys()  # fused
    changed = {name for name in old if not mx.array_equal(old[name], new[name]).item()}
    assert changed
    assert all(name.endswith("proj.weight") and "cross_attn" not in name for name in changed)
    assert {f.name for f in (run / "adapters").iterdir()} >= {"adapters.safetensors"}
    before = (run / "model.safetensors").read_bytes()
    assert main(["--resume", str(run)]) == 0
    assert (run / "model.safetensors").read_bytes() == before


def test_a_model_can_be_trained_further(finished: Path, tiny: list[str], tmp_path: Path):
    # `init` brings its own configuration, so a recipe for it has none.
    recipe = tmp_path / "further.toml"
    text = TINY.read_text()
    start, end = text.index("[model.text_config]"), text.index("[data]")
    recipe.write_text(f'{text[:start]}[model]\ninit = "{finished}"\n{text[end:]}')
    run = tmp_path / "run"
    assert main(["--recipe", str(recipe), *tiny[2:], *SHORT, "--out", str(run)]) == 0
    steps = [row["lm"] for row in rows(run) if "lm" in row]
    assert steps[0] < rows(finished)[0]["lm"] - 1
    old, new = weights.load(finished), weights.load(run)
    assert new.tokenizer.get_vocab() == old.tokenizer.get_vocab()


def test_validation_asks_the_texts_of_all_stages_on_the_same_images(tiny: list[str]):
    overrides = [a for a in tiny[2:] if "store" not in a]
    overrides += [
        "stages.0.texts=[{kinds=['caption'], n=1}, {kinds=['presence'], n=5}]",
        "stages.1.texts=[{kinds=['presence'], n=2}, {kinds=['match'], n=2}]",
        "stages.1.losses.attention.weight=0",
        "train.val_images=5",
    ]
    job = prepare(read_recipe(str(TINY), overrides))
    first, second = list(job.validation()), list(job.validation())
    assert [group.ids.shape[1] for group in first[0].groups] == [1, 5, 2]
    assert [len(batch.pixels) for batch in first] == [4, 4]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert all(np.array_equal(x.ids, y.ids) for x, y in zip(a.groups, b.groups, strict=True))


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "agevlm_mlx.train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Return as soon as the metrics of `step` are written."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and f'{{"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.chaos
def test_kill_9_and_resume_equals_undisturbed(finished: Path, tiny: list[str], tmp_path: Path):
    run = tmp_path / "run"
    arguments = [*tiny, "--out", str(run)]
    for step in (3, 10, 17):  # before the first checkpoint, between two, after the best one
        process = start(*arguments)
        wait_for_step(process, run, step)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        arguments = ["--resume", str(run)]
    process = start(*arguments)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert re.search(r"going on from step 1[4-7] of 20", out)
    assert rows(run) == rows(finished)
    whole, resumed = weights.load(finished), weights.load(run)
    expected, got = named_parameters(whole.model), named_parameters(resumed.model)
    assert all(mx.array_equal(expected[k], got[k]).item() for k in expected)


@pytest.mark.chaos
def test_ctrl_c_saves_and_says_how_to_go_on(tiny: list[str], tmp_path: Path):
    run = tmp_path / "run"
    process = start(*tiny, "--out", str(run))
    wait_for_step(process, run, 4)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert f"go on with: agevlm train --resume {run}" in out
    assert not (run / "config.json").exists()
    saved = checkpoint.load(run)
    assert saved is not None
    assert 4 <= saved.step < 20


def test_a_folder_is_trained_in_by_one_process(
    finished: Path, tiny: list[str], tmp_path: Path, capsys
):
    with checkpoint.alone(finished):
        assert "another process trains" in fails(capsys, "--resume", str(finished))
        assert (finished / "model.safetensors").exists()
        error = fails(capsys, *tiny, "--out", str(finished), "--overwrite")
        assert "another process trains" in error
    assert not (finished / checkpoint.LOCK).exists()
    assert weights.load(finished)


def test_a_run_goes_on_with_its_own_data_only(
    tiny: list[str], tmp_path: Path, tiny_folder: Path, capsys
):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_folder / "train", data)
    own = [a for a in tiny if not a.startswith(("data.train", "data.store"))]
    own.append("stages.1.losses.attention.weight=0")  # nothing to guide by
    assert main([*own, f"data.train={data}", *SHORT, "--out", str(run)]) == 0
    records = json.loads((data / "llava.json").read_text())
    (data / "llava.json").write_text(json.dumps(records[:-1]))
    assert "the data is not what this run was started with" in fails(capsys, "--resume", str(run))


@pytest.mark.e2e
def test_a_run_outlives_whoever_reads_its_lines(tiny: list[str], tmp_path: Path):
    run = tmp_path / "run"
    process = start(*tiny, "--out", str(run))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert process.wait(timeout=300) == 0
    assert rows(run)[-1]["step"] == 20
    assert weights.load(run).model.config.model_type == "agevlm"


@pytest.mark.chaos
def test_a_closed_terminal_saves(tiny: list[str], tmp_path: Path):
    run = tmp_path / "run"
    process = start(*tiny, "--out", str(run))
    wait_for_step(process, run, 4)
    os.kill(process.pid, signal.SIGHUP)
    process.communicate(timeout=300)
    assert process.returncode == 0
    saved = checkpoint.load(run)
    assert saved is not None
    assert 4 <= saved.step < 20
