"""The loop: exact resume, exact trainable sets, what happens when a step goes wrong."""

import errno
import io
import itertools
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.data.records import Problem
from agevlm_mlx.errors import UserError
from agevlm_mlx.training import checkpoint, objective
from agevlm_mlx.training.log import Metrics, read_metrics
from agevlm_mlx.training.losses import attention_loss, lm_loss
from agevlm_mlx.training.ranks import Ranks
from agevlm_mlx.training.rules import named_parameters, trainable_names
from agevlm_mlx.training.stages import AttentionLoss, Losses
from agevlm_mlx.training.trainer import Trainer

from .conftest import ROWS, VOCABULARY, noise_batch

#: Columns of metrics.jsonl that tell the time, not what was learned.
CLOCKS = {"seconds", "waited"}
SHORT = ("stages.0.steps=1", "stages.1.steps=1")


def rows(run: Path) -> list[dict[str, Any]]:
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in found]


def train(job: Any, run: Path) -> Trainer:
    run.mkdir(exist_ok=True)
    trainer = Trainer(job, run, stream=io.StringIO())
    saved = checkpoint.load(run)
    if saved:
        trainer.restore(saved)
    trainer.train()
    return trainer


def same(a: Any, b: Any) -> bool:
    return same_arrays(named_parameters(a.model), named_parameters(b.model))


def same_arrays(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)


# Before the first checkpoint, between two, at the end of a stage that has no checkpoint.
@pytest.mark.parametrize(
    ("fusion", "kills", "changes"),
    [
        ("cross", (2, 11), ()),
        ("concat", (5,), ()),
        ("cross", (5, 7), ("train.ema=0.9", "train.optimizer=muon", "train.micro_batch=1")),
        ("cross", (5, 10), ("train.dtype=bfloat16", "train.ema=0.9")),
    ],
)
def test_interrupted_at_any_step_equals_undisturbed(
    tmp_path: Path, noise_job, fusion: str, kills: tuple[int, ...], changes: tuple[str, ...]
):
    whole = train(noise_job(*changes, fusion=fusion), tmp_path / "whole")
    assert whole.step == 12

    class Killed(Exception):
        pass

    for last in kills:
        run = tmp_path / f"killed-{last}"
        job = noise_job(*changes, fusion=fusion)
        batches = job.batches

        def dying(stage: Any, batches=batches, last=last) -> Any:
            source = batches(stage)
            part = source.part

            def until(step: int, *which: int) -> Any:
                if step == last:
                    raise Killed
                return part(step, *which)

            source.part = until
            return source

        job.batches = dying
        with pytest.raises(Killed):
            train(job, run)
        resumed = train(noise_job(*changes, fusion=fusion), run)
        assert same(resumed, whole), f"killed at {last}"
        assert same_arrays(resumed.masters, whole.masters)
        if whole.average:
            assert whole.average.state
            assert same_arrays(resumed.average.state, whole.average.state)
        assert rows(run) == rows(tmp_path / "whole")


def test_only_what_a_stage_trains_moves(tmp_path: Path, noise_job):
    job = noise_job()
    before = {k: np.array(v) for k, v in named_parameters(job.model).items()}
    states, with_moments = [], []

    class Watching(Trainer):
        def _train_stage(self, *args: Any) -> None:
            super()._train_stage(*args)
            states.append({k: np.array(v) for k, v in named_parameters(self.model).items()})
            with_moments.append({k.rpartition("/")[0] for k in self.optimizer.state})

    Watching(job, tmp_path, stream=io.StringIO()).train()
    for stage, state, moments in zip(job.recipe.stages, states, with_moments, strict=True):
        moved = {k for k, v in state.items() if not np.array_equal(v, before[k])}
        assert moved == moments == set(trainable_names(job.model, stage))
        before = state


@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_a_batch_in_parts_makes_the_same_steps(tmp_path: Path, noise_job, fusion: str):
    changes = ("stages.0.batch_size=5", "stages.1.batch_size=5", "stages.1.lr=1e-3")
    whole = train(noise_job(*changes, fusion=fusion), tmp_path / "whole")
    parts = train(noise_job(*changes, "train.micro_batch=2", fusion=fusion), tmp_path / "parts")
    a, b = named_parameters(whole.model), named_parameters(parts.model)
    gap = max(mx.abs(a[name] - b[name]).max().item() for name in a)
    assert 0 < gap < 1e-4  # Adam divides by the gradient, so rounding is seen
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert one.keys() == other.keys()
        assert [other[k] for k in ("loss", "norm") if k in other] == pytest.approx(
            [one[k] for k in ("loss", "norm") if k in one], rel=1e-3
        )


def test_parts_of_a_batch_cover_it_once(noise_job, tmp_path: Path):
    for images, size, most in itertools.product((2, 5, 16), (1, 2), (None, 1, 3)):
        job = noise_job(f"stages.0.batch_size={images}")
        spec = replace(job.recipe.train, micro_batch=most)
        job.recipe = replace(job.recipe, train=spec)
        trainer = Trainer(job, tmp_path)
        covered: list[int] = []
        for rank in range(size):
            trainer.ranks = Ranks()
            trainer.ranks.rank, trainer.ranks.size = rank, size
            parts, count = trainer._parts(job.recipe.stages[0])
            assert parts
            for part in parts:
                slots = range(images * part // count, images * (part + 1) // count)
                assert 0 < len(slots) <= (most or images)
                covered += slots
        assert covered == list(range(images))


def test_more_processes_than_images_is_an_error(noise_job, tmp_path: Path):
    trainer = Trainer(noise_job("stages.0.batch_size=4"), tmp_path)
    trainer.ranks.size = 3
    with pytest.raises(UserError, match="stage 'guide': expected a batch_size of at least 3"):
        trainer.train()
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_nothing_to_go_on_from(noise_job, tmp_path: Path):
    job = noise_job()
    poison(job, {6})
    batches = job.batches

    def spoiling(stage: Any) -> Any:
        job.model.language_model.model.norm.weight *= mx.array(
            np.nan if stage.name == "guide" else 1
        )
        return batches(stage)

    job.batches = spoiling
    with pytest.raises(UserError, match="expected a finite loss"):
        train(job, tmp_path)
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert saved.step == 4
    assert all(mx.isfinite(v).all().item() for v in saved.model.values())


def test_small_updates_add_up_in_the_masters(noise_job, tmp_path: Path):
    # A step of 1e-5 is below what bfloat16 can add to a weight of 1.
    changes = ("train.dtype=bfloat16", "train.clip=1e-3", "stages.0.lr=1e-5", "stages.0.warmup=0")
    trainer = train(noise_job(*changes, "stages.1.steps=1"), tmp_path)
    name = "language_model.model.norm.weight"
    assert trainer.model.language_model.model.norm.weight.dtype == mx.bfloat16
    assert trainer.masters[name].dtype == mx.float32
    moved = mx.abs(trainer.masters[name] - 1).max().item()
    assert moved > 2e-5


def test_validation_and_the_finished_model_are_of_the_running_mean(
    noise_job, tmp_path: Path, monkeypatch
):
    seen = []

    def watching(model: Any, *args: Any) -> Any:
        seen.append({k: np.array(v) for k, v in named_parameters(model).items()})
        return objective.validate(model, *args)

    monkeypatch.setattr("agevlm_mlx.training.trainer.validate", watching)
    trainer = train(noise_job("train.ema=0.9"), tmp_path)
    last = {k: np.array(v) for k, v in named_parameters(trainer.model).items()}
    mean = trainer.average.averaged(named_parameters(trainer.model))
    assert any(not np.array_equal(seen[-1][k], last[k]) for k in last)
    assert all(np.array_equal(seen[-1][k], np.array(mean[k])) for k in last)
    trainer.finish()
    assert all(
        np.array_equal(np.array(v), seen[-1][k]) for k, v in named_parameters(trainer.model).items()
    )


def test_the_run_ends_when_validation_no_longer_improves(noise_job, tmp_path: Path, monkeypatch):
    values = iter([5.0, 4.0, 6.0, 6.0, 6.0])  # after steps 3, 6, 9, ...
    monkeypatch.setattr(
        "agevlm_mlx.training.trainer.validate",
        lambda *_: {"val_lm": next(values), "val_pointing": None},
    )
    changes = ("train.patience=2", "stages.1.steps=30", "train.export=best")
    trainer = train(noise_job(*changes), tmp_path)
    assert trainer.finished
    assert (trainer.step, trainer.best) == (12, {"step": 6, "val_lm": 4.0})
    again = train(noise_job(*changes), tmp_path)  # a finished run stays finished
    assert again.step == 12


def test_observers_hear_of_every_row_and_look_at_their_time(noise_job, tmp_path: Path):
    class Watch:
        def __init__(self):
            self.rows, self.looks, self.closed = [], [], 0

        def row(self, row: Any) -> None:
            self.rows.append(row)

        def look(self, step: int, model: Any) -> None:
            self.looks.append(step)

        def close(self) -> None:
            self.closed += 1

    watch = Watch()
    job = noise_job("train.pictures_every=5")
    Trainer(job, tmp_path, observers=[watch], stream=io.StringIO()).train()
    assert watch.looks == [0, 5, 10, 12]
    assert watch.closed == 1
    assert [row["step"] for row in watch.rows] == [
        row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")
    ]


def test_bad_images_met_on_the_way_are_listed(noise_job, tmp_path: Path):
    job = noise_job()
    batches = job.batches

    def broken(stage: Any) -> Any:
        source = batches(stage)
        found = [[Problem("a.png", "damaged or truncated image", "r1")]]
        source.take_problems = lambda: found.pop() if found else []
        return source

    job.batches = broken
    train(job, tmp_path)
    listed = (tmp_path / "bad_records.jsonl").read_text().splitlines()
    # Met in both stages, listed once.
    assert [json.loads(line) for line in listed] == [
        {"where": "a.png", "problem": "damaged or truncated image", "record": "r1"}
    ]


def test_metrics_have_the_parts_of_each_stage_and_the_loss_is_their_sum(tmp_path: Path, noise_job):
    train(noise_job(), tmp_path)
    steps = [row for row in rows(tmp_path) if "val_lm" not in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all("attention" not in row for row in steps[:5])
    for row in steps[5:]:
        assert row["loss"] == pytest.approx(row["lm"] + 0.3 * row["attention"], rel=1e-4)
    checks = [row for row in rows(tmp_path) if "val_lm" in row]
    assert [row["step"] for row in checks] == [3, 6, 9, 12]
    assert all(0 <= row["val_pointing"] <= 1 for row in checks)


def test_guidance_moves_attention_into_the_mask(noise_job, tmp_path: Path):
    job = noise_job(
        "stages.0.steps=15",
        "stages.1.steps=1",
        "stages.0.lr=0.05",
        "stages.0.losses.lm=0",
        "stages.0.losses.attention.weight=1",
        "train.val_every=100",
    )
    batches = job.batches

    def same(stage: Any) -> Any:
        source = batches(stage)
        part = source.part
        source.part = lambda step, *which: part(0, *which)
        return source

    job.batches = same
    train(job, tmp_path)
    curve = [row["attention"] for row in rows(tmp_path)[:15]]
    assert curve[-1] < 0.5 * curve[0]


def test_the_best_validation_is_kept(tmp_path: Path, noise_job, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(
        "agevlm_mlx.training.trainer.validate",
        lambda *_: {"val_lm": next(values), "val_pointing": None},
    )
    trainer = train(noise_job("train.keep=1"), tmp_path)
    assert trainer.best == {"step": 6, "val_lm": 1.0}
    assert (tmp_path / "best").read_text() == "steps/6\n"
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["12", "6"]
    assert train(noise_job("train.keep=1"), tmp_path).best == trainer.best


def test_batch_loss_does_not_depend_on_grouping(noise_job):
    model = noise_job().model
    batch = noise_batch(3, 2, 2)
    losses = Losses(attention=noise_job().recipe.stages[1].losses.attention)
    total, parts = objective.batch_loss(model, batch, losses)

    z_img = model.project(model.encode(mx.array(batch.pixels)))
    z_img = mx.repeat(z_img, 2, axis=0)  # the slow way: one image for every text
    logits, maps = [], []
    for group in batch.groups:
        ids = mx.array(group.ids).flatten(0, 1)
        at = mx.array(group.rows), mx.array(group.cols)
        one = model.attend(ids, model.look(z_img), *at, heads=2)
        logits.append(one[0].reshape(2, 2, *one[0].shape[1:]))
        maps.append(one[1])
    labels = np.stack([g.labels for g in batch.groups])
    mask = np.stack([g.loss_mask for g in batch.groups])
    lm = lm_loss(mx.stack(logits), labels, mask)
    attention = attention_loss(
        mx.concatenate(maps),
        mx.array(np.concatenate([g.target for g in batch.groups])),
        mx.array(np.concatenate([g.weight for g in batch.groups])),
    )
    np.testing.assert_allclose(parts.tolist(), [lm.item(), attention.item(), 0, 0], rtol=2e-5)
    assert total.item() == pytest.approx(lm.item() + 0.3 * attention.item(), rel=1e-5)


def test_features_are_distilled_where_the_teacher_has_them(noise_job):
    job = noise_job()
    job.model.sam_adaptor = objective.FeatureAdaptor(24, 8, job.model.vision_grid, (2, 2))
    batch = noise_batch(0, 2, 1, channels=8)
    assert batch.sam_features is not None
    batch.sam_features = batch.sam_features[:, :4]
    losses = Losses(features=1.0, lm=0.0)
    total, _ = objective.batch_loss(job.model, batch, losses)
    batch.sam_features[1] = 0  # padding
    alone, _ = objective.batch_loss(job.model, batch, losses)
    assert np.isfinite(total.item())
    assert total.item() != alone.item()
    batch.pixels[1] = 5  # what is padding there cannot matter
    assert objective.batch_loss(job.model, batch, losses)[0].item() == pytest.approx(alone.item())


def test_the_feature_head_averages_the_cells_of_a_coarser_teacher():
    head = objective.FeatureAdaptor(3, 5, (4, 4), (2, 2))
    z_vis = mx.random.normal((1, 16, 3))
    top_right = z_vis.reshape(4, 4, 3)[:2, 2:].reshape(4, 3).mean(0)
    same = objective.FeatureAdaptor(3, 5, (1, 1), (1, 1))
    same.update(head.parameters())
    assert mx.allclose(head(z_vis)[0, 1], same(top_right[None, None])[0, 0], atol=1e-6)
    with pytest.raises(UserError, match="divides"):
        objective.FeatureAdaptor(3, 5, (4, 4), (3, 3))


def test_validation_is_over_tokens_and_points_with_the_most_attended_cell(noise_job, monkeypatch):
    model, batch = noise_job().model, noise_batch(1, 2, 1)
    group = batch.groups[0]
    hits = np.zeros((ROWS, 16), np.float32)
    hits[np.arange(ROWS), group.target.argmax(-1)] = 1
    hits[1] = np.roll(hits[1], 1)  # a miss
    logits = mx.zeros((len(group.supervised[0]), VOCABULARY))

    def known(
        *_: Any, guided: bool, heads: Any, layers: Any, begun: int
    ) -> tuple[mx.array, mx.array]:
        assert begun == 0
        assert guided
        assert (heads, layers) == (2, (1,))
        return logits, mx.array(hits)[:, None, None]

    monkeypatch.setattr(objective, "read_texts", known)
    attention = AttentionLoss(heads=2, layers=(1,))
    result = objective.validate(model, iter([batch, batch]), attention)
    assert result["val_pointing"] == pytest.approx(2 / 3)  # the row of weight 0 does not count
    assert result["val_lm"] == pytest.approx(np.log(VOCABULARY), rel=1e-5)


def poison(job: Any, at: set[int]) -> None:
    batches = job.batches

    def bad(stage: Any) -> Any:
        source = batches(stage)
        part = source.part

        def maybe(step: int, *which: int) -> Any:
            result = part(step, *which)
            if step in at:
                result.pixels[0, 0, 0, 0] = np.nan
            return result

        source.part = maybe
        return source

    job.batches = bad


def test_a_loss_that_is_not_finite_names_step_stage_and_records(tmp_path: Path, noise_job):
    job = noise_job()
    poison(job, {6})
    with pytest.raises(UserError) as error:
        train(job, tmp_path)
    message = str(error.value)
    assert "step 7, stage 'guide': expected a finite loss, got nan" in message
    assert "record-6-0, record-6-1" in message
    assert "\n" not in message
    assert re.search(r"largest: \S+ [\d.e-]+", message) or "largest: none" in message
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert saved.step == 6
    assert all(mx.isfinite(v).all().item() for v in saved.model.values())
    assert [row["step"] for row in rows(tmp_path) if "lm" in row] == list(range(1, 7))


def test_on_nan_skip_leaves_the_batch_out(tmp_path: Path, noise_job):
    job = noise_job("train.on_nan=skip", "stages.1.steps=3")
    poison(job, {6})
    trainer = train(job, tmp_path)
    assert trainer.step == 8
    assert [row["step"] for row in rows(tmp_path) if "skipped" in row] == [7]
    assert all(mx.isfinite(v).all().item() for v in named_parameters(trainer.model).values())
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics"))


def test_nothing_but_bad_batches_ends_the_run_even_with_skip(tmp_path: Path, noise_job):
    job = noise_job("train.on_nan=skip")
    poison(job, set(range(12)))
    with pytest.raises(UserError, match="step 10"):
        train(job, tmp_path)


def test_a_signal_just_after_a_step_saves_too(tmp_path: Path, noise_job):
    class Late(Trainer):
        def _after_step(self, *args: Any) -> None:
            super()._after_step(*args)
            if self.step == 7:  # no checkpoint is due here
                os.kill(os.getpid(), signal.SIGINT)

    trainer = Late(noise_job(), tmp_path, stream=io.StringIO())
    assert trainer.train() is False
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert saved.step == trainer.step == 7


def test_a_full_disk_says_how_to_go_on(tmp_path: Path, noise_job, monkeypatch):
    def full(self: Any, **row: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Metrics, "write", full)
    with pytest.raises(UserError, match=r"no space left .* agevlm train --resume"):
        train(noise_job(), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, noise_job, number: int):
    job = noise_job()
    batches = job.batches

    def signalling(stage: Any) -> Any:
        source = batches(stage)
        part = source.part

        def send(step: int, *which: int) -> Any:
            if step == 6:
                os.kill(os.getpid(), number)
            return part(step, *which)

        source.part = send
        return source

    job.batches = signalling
    before = signal.getsignal(number)
    trainer = Trainer(job, tmp_path, stream=io.StringIO())
    assert trainer.train() is False
    assert signal.getsignal(number) is before
    assert 6 <= trainer.step < 12
    saved = checkpoint.load(tmp_path)
    assert saved is not None
    assert saved.step == trainer.step


def test_a_run_resumes_only_under_its_own_recipe(tmp_path: Path, noise_job):
    train(noise_job(*SHORT), tmp_path)
    with pytest.raises(UserError, match="the recipe is not the one"):
        train(noise_job(*SHORT, "stages.0.lr=0.5"), tmp_path)
    train(noise_job(*SHORT, "train.log_every=1"), tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path, noise_job):
    train(noise_job(*SHORT), tmp_path)
    with pytest.raises(UserError, match="another model's"):
        train(noise_job(*SHORT, fusion="concat"), tmp_path)
