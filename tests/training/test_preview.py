"""What ``--dry-run`` prints: texts against a batch written by hand, numbers against real steps."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx import train
from agevlm_mlx.data.batches import Batch, TextGroup
from agevlm_mlx.training import forecast, preview
from agevlm_mlx.training.build import prepare
from agevlm_mlx.training.forecast import (
    Cost,
    disk,
    first_images,
    fitting_micro_batch,
    measure,
    metal_limit,
    predict,
)
from agevlm_mlx.training.preview import batch_text, cost_lines
from agevlm_mlx.training.stages import read_recipe
from agevlm_mlx.training.trainer import Trainer


def group_of(texts: list[str], packed: bool) -> TextGroup:
    """One image's texts, in which tokens are characters, each in a row or all in one."""
    rows = [texts] if packed else [[text] for text in texts]
    T = max(sum(len(text) - 1 for text in row) for row in rows) + 3
    ids, labels = np.zeros((2, 1, len(rows), T), np.int32)
    mask, segments = np.zeros((1, len(rows), T), np.float32), np.full((1, len(rows), T), -1)
    for r, row in enumerate(rows):
        start = 0
        for number, text in enumerate(row):
            codes, end = [ord(c) for c in text], start + len(text) - 1
            ids[0, r, start:end], labels[0, r, start:end] = codes[:-1], codes[1:]
            mask[0, r, start + text.index("<") : end] = 1
            segments[0, r, start:end] = number
            start = end
    return TextGroup(
        ids=ids,
        labels=labels,
        loss_mask=mask,
        rows=np.array([0, 0, 0 if packed else 1, 0, 0], np.int32),
        cols=np.array([5, 6, 11 if packed else 1, 7, 0], np.int32),
        target=np.ones((5, 4), np.float32),
        weight=np.array([1, 1, 1, 1, 0], np.float32),  # the last is padding
        segments=segments if packed else None,
    )


def text_job(packed: bool) -> Any:
    group = group_of(["?a dog<Yes.", "?no<No."], packed)
    batch = Batch(np.zeros((1, 2, 2, 3)), (group,), None, ["record-7"], 0)
    stage = SimpleNamespace(name="guide", batch_size=8)

    def part(step: int, part: int, parts: int) -> Batch:
        assert (step, part, parts) == (0, 0, 8)  # no image that is not shown is decoded
        return batch

    return SimpleNamespace(
        recipe=SimpleNamespace(stages=[stage]),
        batches=lambda stage: SimpleNamespace(part=part),
        tokenizer=SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens))),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_brackets_and_marks_stand_where_the_loss_and_the_guidance_are(packed: bool):
    assert list(batch_text(text_job(packed), colour=False)) == [
        "guide, record record-7:",
        "  ?a dog<^[Y^][es.]",
        "  ?n^o<[No.]",
    ]


def test_colours_replace_brackets_on_a_terminal():
    _, first, _ = batch_text(text_job(False), colour=True)
    assert first.endswith("g<\x1b[0m\x1b[32m\x1b[4mY\x1b[0m\x1b[32mes.\x1b[0m")


def test_what_metal_gives_as_people_have_reported_it():
    assert [round(metal_limit(n) / 2**20) for n in (16, 32, 64)] == [10923, 21845, 49152]


def test_the_first_images_of_a_batch_bring_their_own_guided_rows(noise_job: Any):
    stage = noise_job().recipe.stages[1]
    batch = noise_job().batches(replace(stage, batch_size=6)).part(0, 0, 1)
    cut = first_images(batch, 3)
    assert cut.pixels.shape[0] == 3
    for whole, group in zip(batch.groups, cut.groups, strict=True):
        np.testing.assert_array_equal(group.ids, whole.ids[:3])
        R = group.ids.shape[1]
        assert group.rows.max() < 3 * R
        kept = {(r, c) for r, c, w in zip(group.rows, group.cols, group.weight, strict=True) if w}
        theirs = zip(whole.rows, whole.cols, whole.weight, strict=True)
        own = {(r, c) for r, c, w in theirs if w and r < 3 * R}
        assert kept <= own
        assert len(group.weight) == len(whole.weight) // 2


def test_the_first_images_of_a_batch_bring_the_marks_of_absent_things() -> None:
    group = replace(
        group_of(["?a dog<Yes.", "?no<No."], packed=False),
        rows=np.array([2, 0, 3, 1], np.int32),
        cols=np.arange(4, dtype=np.int32),
        target=np.ones((4, 4), np.float32),
        weight=np.array([1, 0, 0, 1], np.float32),
        absent=np.array([0, 1, 1, 0], np.float32),
    )
    two = replace(  # rows 2 and 3 are of the second image
        group,
        ids=np.repeat(group.ids, 2, 0),
        labels=np.repeat(group.labels, 2, 0),
        loss_mask=np.repeat(group.loss_mask, 2, 0),
    )
    (cut,) = first_images(Batch(np.zeros((2, 2, 2, 3)), (two,), None, ["0", "1"], 0), 1).groups
    assert cut.absent is not None
    assert list(zip(cut.rows, cut.cols, cut.weight, cut.absent, strict=True)) == [
        (0, 1, 0, 1),
        (1, 3, 1, 0),
    ]


# --- numbers -----------------------------------------------------------------------------------


@pytest.fixture
def job(tiny_folder: Path) -> Any:
    """The tiny recipe with 8 images a step, so wide that there is something to measure."""
    where = {"train": "train", "val": "val", "store": "store", "val_store": "val-store"}
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}

    def build(*overrides: str) -> Any:
        return prepare(
            read_recipe(
                str(Path(__file__).with_name("tiny.toml")),
                [
                    *(f"data.{key}={tiny_folder / name}" for key, name in where.items()),
                    *(f"model.text_config.{key}={value}" for key, value in wide.items()),
                    *(
                        "stages.0.batch_size=8",
                        "stages.1.batch_size=8",
                        "stages.1.steps=6",
                        *overrides,
                    ),
                ],
            ),
            say=lambda text: None,
        )

    return build


def real_peak(job: Any, index: int, run: Path) -> int:
    """The most memory in use in a stage, without what others have there before it."""
    recipe = job.recipe
    stage = recipe.stages[index]
    data = replace(recipe.data, val=None, val_store=None)
    job.recipe, job.val_records = replace(recipe, stages=(stage,), data=data), None
    weights = sum(v.nbytes for _, v in forecast.named_parameters(job.model).items())
    run.mkdir()
    trainer = Trainer(job, run, stream=io.StringIO())
    others = mx.get_active_memory() - weights
    mx.reset_peak_memory()
    assert trainer.train()
    return mx.get_peak_memory() - others


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.micro_batch=3",),
        ("train.ema=0.9", "train.optimizer=muon"),
        ("stages.1.batch_size=1",),  # most of it is the optimiser's
        ("train.grad_checkpoint=true",),
    ],
    ids=lambda given: " ".join(given) or "plain",
)
def test_the_memory_forecast_is_what_a_step_takes(
    job: Any, tmp_path: Path, overrides: tuple[str, ...]
):
    made = job(*overrides)
    cost = measure(made, made.recipe.stages[1])
    said = predict(made, cost, mx.float32, made.recipe.train.micro_batch).total
    assert said == pytest.approx(real_peak(made, 1, tmp_path / "run"), rel=0.15)


def test_a_large_batch_may_be_measured_in_part(job: Any, tmp_path: Path):
    made = job()
    cost = measure(made, made.recipe.stages[1], 4)
    assert cost.images == 4
    said = predict(made, cost, mx.float32, None).total
    assert said == pytest.approx(real_peak(made, 1, tmp_path / "run"), rel=0.15)


def test_the_time_that_measuring_takes_is_bounded(job: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forecast, "PATIENCE", 1e-9)
    made = job()
    assert measure(made, made.recipe.stages[1]).images == 2


def test_measuring_changes_no_parameter(job: Any):
    made = job()
    before = {k: np.array(v) for k, v in forecast.named_parameters(made.model).items()}
    for stage in made.recipe.stages:
        measure(made, stage)
    after = forecast.named_parameters(made.model)
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)


def cost_of(job: Any, index: int = 1, fixed: float = 0.0, each: float = 1 << 20) -> Cost:
    stage = job.recipe.stages[index]
    batch = job.batches(stage).part(0, 0, stage.batch_size)
    return Cost(stage, 2, (fixed, each), (0.25, 0.5), 0.125, batch)


def test_the_arithmetic_of_memory_and_time(job: Any):
    made = job("train.ema=0.9")
    cost = cost_of(made, each=100 << 20)
    sizes = {n: v.size for n, v in forecast.named_parameters(made.model).items()}
    full = predict(made, cost, mx.float32, None)
    names = forecast.parameter_scales(made.model, cost.stage)
    trained = sum(sizes[name] for name in names)
    assert (full.weights, full.masters) == (4 * sum(sizes.values()), 0)
    assert (full.moments, full.passes) == (8 * trained, 800 << 20)
    both = forecast.parameter_scales(made.model, made.recipe.stages[0]).keys() | names.keys()
    assert full.mean == 4 * sum(sizes[name] for name in both)
    half = predict(made, cost, mx.bfloat16, None)
    assert (half.weights, half.masters) == (2 * sum(sizes.values()), 4 * trained)
    assert half.passes == 4 * trained + ((800 << 20) - 4 * trained) / 2
    # Three images at a time: parts of 2, 3 and 3, and the sum of their gradients.
    assert predict(made, cost, mx.float32, 3).passes == (300 << 20) + 4 * trained
    assert cost.step_seconds(None) == 0.25 + 8 * 0.5 + 0.125
    assert cost.step_seconds(3) == 3 * 0.25 + 8 * 0.5 + 0.125


def test_states_of_texts_are_kept_where_the_lower_layers_are_frozen(
    job: Any, monkeypatch: pytest.MonkeyPatch
):
    frozen = '[["language_model\\\\..*\\\\.cross_attn\\\\..*", 1.0], [".*", 0.0]]'
    made = job(f"stages.1.trainable={frozen}")
    cost = cost_of(made)
    positions = sum(group.ids.size for group in cost.batch.groups)  # of one image
    texts = predict(made, cost, mx.float32, None).texts
    assert texts == positions * 8 * cost.stage.steps * 256 * 4
    assert predict(made, cost, mx.bfloat16, 2).texts == texts / 2
    assert predict(made, cost_of(made, 0), mx.float32, None).texts == 0  # trains them
    assert "states of texts" in "\n".join(cost_lines(made, [cost]))
    monkeypatch.setattr(forecast, "MOST_BYTES", 1000)
    small = predict(made, cost, mx.float32, None)
    assert small.texts == 1000
    assert small.total == small.weights + small.moments + small.passes + 1000


def test_muon_remembers_half_of_its_matrices(job: Any):
    adamw, muon = (
        predict(made, cost_of(made), mx.float32, None).moments
        for made in (job(), job("train.optimizer=muon"))
    )
    assert adamw / 2 < muon < adamw * 0.75


def test_what_does_not_fit_gets_a_smaller_micro_batch(job: Any, monkeypatch: pytest.MonkeyPatch):
    made = job("train.dtype=float32")
    cost = cost_of(made, each=2 << 30)
    base = predict(made, cost, mx.float32, 1).total
    assert fitting_micro_batch(made, cost, mx.float32, base + (2.5 * 2**30)) == 2
    assert fitting_micro_batch(made, cost, mx.float32, base - 1) is None
    monkeypatch.setattr(preview, "usable_memory", lambda: int(base) - 1)
    text = "\n".join(cost_lines(made, [cost_of(made, 0), cost]))
    no = "does NOT fit, stage 'guide' needs 16.0 GiB: "
    others = "train.grad_checkpoint=true or train.dtype=bfloat16 or model.lora or "
    assert f"this machine (2.0 GiB): {no}{others}train.optimizer=muon" in text
    assert f"a 16 GB Mac (10.7 GiB for Metal by default): {no}set train.micro_batch=4" in text
    assert "a 32 GB Mac (21.3 GiB for Metal by default): fits (75%)" in text


def test_a_full_disk_is_foreseen(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = job(f"train.out={tmp_path / 'not' / 'there'}", "train.keep=3")
    usage = SimpleNamespace(total=0, used=0, free=5 << 20)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda path: usage)
    room = disk(made)
    assert room.most == 5 * room.checkpoint  # three kept, the best, the one being written
    last = list(cost_lines(made, [cost_of(made)]))[-1]
    assert "5 MiB free" in last
    assert last.endswith("NOT enough: free some or lower train.keep")


@pytest.mark.parametrize("extra", [(), ("train.ema=0.9",), ("train.optimizer=muon",)])
def test_a_checkpoint_is_as_large_as_predicted(job: Any, tmp_path: Path, extra: tuple[str, ...]):
    made = job("stages.0.steps=1", "stages.1.steps=1", *extra)
    run = tmp_path / "run"
    run.mkdir()
    assert Trainer(made, run, stream=io.StringIO()).train()
    size = sum(file.stat().st_size for file in (run / "steps/2").iterdir())
    assert disk(made).checkpoint == pytest.approx(size, rel=0.02)


@pytest.mark.e2e
def test_a_dry_run_tells_all_and_writes_nothing(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train.main([*tiny, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for part in (
        "records of 12 images: 12 caption,",
        "the model sees an image as 4 x 4 tokens",
        "validation: 4 of 6 images",
        "stage  steps  images  s a step  in all",
        "memory, predicted for stage 'guide', 4 images at a time:",
        "a 64 GB Mac (48.0 GiB for Metal by default): fits (0%)",
        "a checkpoint, up to",
        "The first image of each stage;",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []
