"""What a stage says of its attention loss: weights over time, layers, absent things; and what a
validation counts."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.data.batches import Batch
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.recompute import recomputed
from agevlm_mlx.training import objective
from agevlm_mlx.training.build import prepare
from agevlm_mlx.training.log import read_metrics
from agevlm_mlx.training.losses import EPS, attention_loss
from agevlm_mlx.training.stages import AttentionLoss, Losses, read_recipe
from agevlm_mlx.training.trainer import Trainer

from .conftest import TINY, TOKENS, VOCABULARY, cut, noise_batch

GUIDED = "stages.1.losses.attention."


def steps(job: Any, run: Path) -> list[dict[str, Any]]:
    Trainer(job, run, stream=io.StringIO()).train()
    return [row for row in read_metrics(run / "metrics.jsonl") if "val_lm" not in row]


def with_absent(batch: Batch) -> Batch:
    """The same with two rows of the first group about something absent."""
    first, *others = batch.groups
    absent = np.zeros_like(first.weight)
    absent[-2:] = 1
    first = replace(first, absent=absent, weight=first.weight * (1 - absent))
    return replace(batch, groups=(first, *others))


def gradients(model: AgeVLM, batch: Batch, losses: Losses) -> dict[str, float]:
    """The largest slope of each parameter."""
    found = nn.value_and_grad(model, lambda: objective.batch_loss(model, batch, losses)[0])()[1]
    return {name: float(mx.abs(grad).max()) for name, grad in tree_flatten(found)}  # pyright: ignore


# The weight -----------------------------------------------------------------------------------


def test_the_weight_goes_to_its_end_in_equal_steps(noise_job, tmp_path: Path):
    found = steps(noise_job(GUIDED + "weight=0.7", GUIDED + "weight_end=0.0"), tmp_path)
    assert [row["step"] for row in found if "attention" in row] == list(range(6, 13))
    for done, row in enumerate(found[5:]):
        weight = 0.7 * (1 - done / 7)
        assert row["loss"] == pytest.approx(row["lm"] + weight * row["attention"], rel=1e-4)


def test_a_weight_may_begin_at_nothing(noise_job, tmp_path: Path):
    job = noise_job(GUIDED + "weight=0", GUIDED + "weight_end=0.7")
    assert job.recipe.stages[1].losses.attention.guides
    found = steps(job, tmp_path)
    assert "attention" not in found[5]  # the stage's first step
    assert found[-1]["loss"] == pytest.approx(found[-1]["lm"] + 0.6 * found[-1]["attention"], 1e-4)


def test_without_an_end_the_weight_stays():
    losses = Losses(attention=AttentionLoss(weight=0.3))
    assert losses.at(0.9) is losses
    changing = replace(losses, attention=AttentionLoss(weight=0.3, weight_end=0.1))
    assert [changing.at(done).attention.weight for done in (0, 0.5)] == [0.3, 0.2]


# Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_only_the_chosen_layers_are_supervised(noise_job, fusion: str):
    model, batch = noise_job(fusion=fusion).model, noise_batch(3, 2, 1)
    count = len(model.looking_layers)
    seen = model.look(model.project(model.encode(mx.array(batch.pixels))))
    group = batch.groups[0]

    def maps(layers: Any) -> mx.array:
        found = objective.read_texts(model, seen, group, guided=True, heads=2, layers=layers)[1]
        assert found is not None
        return found

    whole = maps(None)
    assert whole.shape[1] == count
    assert mx.array_equal(maps((0, count - 1)), whole[:, mx.array([0, count - 1])])
    last = maps((count - 1,))
    assert mx.array_equal(last, whole[:, -1:])
    losses = Losses(lm=0, attention=AttentionLoss(weight=1, layers=(count - 1,), heads=2))
    value = objective.batch_loss(model, batch, losses)[0].item()
    alone = attention_loss(last, mx.array(group.target), mx.array(group.weight))
    assert value == pytest.approx(alone.item(), rel=1e-5)
    # The first layer's own attention gets no slope of its own: with the image cut off from what
    # goes on to the last layer there is none at all.
    slopes = gradients(
        model, batch, replace(losses, attention=AttentionLoss(weight=1, layers=(0,)))
    )
    after = [name for name in slopes if f"layers.{len(model.layers) - 1}." in name]
    assert after
    assert not any(slopes[name] for name in after)


def test_maps_of_other_layers_are_not_computed(noise_job, monkeypatch):
    from agevlm_mlx.models import cross_attention

    model, batch, calls = noise_job().model, noise_batch(3, 2, 1), []
    own = cross_attention.guided_attention
    monkeypatch.setattr(
        cross_attention, "guided_attention", lambda *args: calls.append(1) or own(*args)
    )
    for layers, wanted in ((None, 2), ((1,), 1)):
        calls.clear()
        losses = Losses(attention=AttentionLoss(weight=1, layers=layers))
        mx.eval(objective.batch_loss(model, batch, losses))
        assert len(calls) == wanted


@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_recomputed_layers_leave_the_maps_of_the_chosen_ones(noise_job, fusion: str):
    model, batch = noise_job(fusion=fusion).model, noise_batch(3, 2, 1)
    losses = Losses(lm=0, attention=AttentionLoss(weight=1, layers=(1,)))
    plain = gradients(model, batch, losses)
    with recomputed(model):
        again = gradients(model, batch, losses)
    assert again == pytest.approx(plain, rel=1e-3, abs=1e-6)
    assert any(plain.values())


# Absent things --------------------------------------------------------------------------------


def test_words_about_absent_things_learn_to_look_at_the_null_slot(noise_job):
    model, batch = noise_job().model, with_absent(noise_batch(3, 2, 2))
    group = batch.groups[0]
    losses = Losses(lm=0, attention=AttentionLoss(absent=0.5, heads=2))
    total, parts = objective.batch_loss(model, batch, losses)
    seen = model.look(model.project(model.encode(mx.array(batch.pixels))))
    _, maps = objective.read_texts(model, seen, group, guided=True, heads=2)
    null = 1 - np.array(maps)[-2:].mean((1, 2)).sum(-1)
    wanted = -np.log(null + EPS).mean()
    assert parts.tolist() == pytest.approx([parts[0].item(), 0, wanted, 0], rel=1e-5)
    assert total.item() == pytest.approx(0.5 * wanted, rel=1e-5)
    slopes = gradients(model, batch, losses)
    for part in ("q_proj.weight", "null_key"):
        assert slopes[f"language_model.model.layers.1.cross_attn.{part}"] > 0
    assert objective.Totals.of([batch]).absent == 2
    assert objective.Totals.of([batch]).guided == 2 + 2


def test_absent_and_present_rows_are_apart(noise_job):
    """Each has its own mean, and neither sees the other's rows."""
    model, batch = noise_job().model, with_absent(noise_batch(3, 2, 1))
    both = Losses(attention=AttentionLoss(weight=0.3, absent=0.5))
    total, (lm, attention, absent, _) = objective.batch_loss(model, batch, both)
    assert total.item() == pytest.approx((lm + 0.3 * attention + 0.5 * absent).item(), rel=1e-5)
    for one, wanted in (
        (AttentionLoss(weight=0.3), [attention.item(), 0]),
        (AttentionLoss(absent=0.5), [0, absent.item()]),
    ):
        parts = objective.batch_loss(model, batch, Losses(attention=one))[1]
        assert parts[1:3].tolist() == pytest.approx(wanted)
    group = batch.groups[0]
    assert group.absent is not None
    group.target[group.absent > 0] = 7  # is never looked at
    parts = objective.batch_loss(model, batch, both)[1]
    assert parts[1].item() == pytest.approx(attention.item())


def test_parts_of_a_step_add_up_with_absent_rows(noise_job):
    model, whole = noise_job().model, with_absent(noise_batch(5, 4, 2))
    marked = whole.groups[0].absent
    assert marked is not None
    losses = Losses(attention=AttentionLoss(weight=0.3, absent=0.5))
    total, parts = objective.batch_loss(model, whole, losses)
    cuts = []
    for part in range(2):
        piece = cut(whole, part, 2)
        owner = whole.groups[0].rows // 2
        own = (owner >= 2 * part) & (owner < 2 * part + 2)
        first = replace(piece.groups[0], absent=marked * own)
        cuts.append(replace(piece, groups=(first, *piece.groups[1:])))
    totals = objective.Totals.of(cuts)
    assert totals == objective.Totals.of([whole])
    shares = [objective.batch_loss(model, piece, losses, totals) for piece in cuts]
    assert sum(share[0].item() for share in shares) == pytest.approx(total.item(), rel=1e-5)
    np.testing.assert_allclose(sum(np.array(share[1]) for share in shares), parts, rtol=1e-4)


def test_metrics_tell_of_absent_things_where_they_are_guided(noise_job, tmp_path: Path):
    job = noise_job(GUIDED + "absent=0.25")
    batches = job.batches

    def marked(stage: Any) -> Any:
        source = batches(stage)
        part = source.part
        source.part = lambda *which: with_absent(part(*which))
        return source

    job.batches = marked
    found = steps(job, tmp_path)
    assert ["absent" in row for row in found] == [False] * 5 + [True] * 7
    for row in found[5:]:
        loss = row["lm"] + 0.3 * row["attention"] + 0.25 * row["absent"]
        assert row["loss"] == pytest.approx(loss, rel=1e-4)


# Recipes that cannot be meant -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GUIDED + "layers=[0, 1]"], "losses.attention.layers: expected numbers below 1, the"),
        ([GUIDED + "absent=0.1"], 'no phrase in texts of its kinds says "absent": true'),
        (
            [GUIDED + "absent=0.1", "model.fusion_config.null_slot=false"],
            "losses.attention.absent > 0 needs cross-attention with a null slot",
        ),
        (
            [GUIDED + "absent=0.1", "model.fusion_config={fusion='concat'}"],
            "losses.attention.absent > 0 needs cross-attention with a null slot",
        ),
    ],
)
def test_what_the_model_or_data_cannot_do_is_said(tiny: list[str], arguments, message: str):
    with pytest.raises(UserError) as error:
        prepare(read_recipe(str(TINY), [*tiny[2:], *arguments]))
    assert message in str(error.value)


def test_scenes_with_their_own_masks_and_absent_phrases_need_no_teacher(
    tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "data.scenes={n=6, val=3, masks=true, absent=true}",
        "data.val=val",
        GUIDED + "absent=0.1",
        GUIDED + "positions=['word']",
    ]
    job = prepare(read_recipe(str(TINY), arguments))
    first = job.batches(job.recipe.stages[0]).batch(0)
    assert all(group.absent is None for group in first.groups)
    caption, asked = job.batches(job.recipe.stages[1]).batch(0).groups
    assert caption.weight.any()
    assert asked.weight.any()
    assert caption.absent is None
    assert asked.absent is not None
    assert asked.absent.any()
    assert not (asked.absent * asked.weight).any()
    found = steps(job, tmp_path)
    assert all(np.isfinite(row["absent"]) for row in found[6:])


# Concat ---------------------------------------------------------------------------------------


def test_the_baseline_s_own_attention_can_be_guided_too(noise_job, tmp_path: Path):
    """All layers, two heads: their queries and keys learn it, and the loss goes down."""
    changes = (
        "stages.0.steps=15",
        "stages.1.steps=1",
        "stages.0.lr=0.05",
        "stages.0.losses.lm=0",
        "stages.0.losses.attention={weight=1, heads=2}",
        "train.val_every=100",
    )
    job = noise_job(*changes, fusion="concat")
    assert len(job.model.looking_layers) == len(job.model.layers)
    slopes = gradients(job.model, noise_batch(0, 2, 2), job.recipe.stages[0].losses)
    for layer in range(len(job.model.layers)):
        for name in ("q_proj", "k_proj"):
            assert slopes[f"language_model.model.layers.{layer}.self_attn.{name}.weight"] > 0
    batches = job.batches

    def same(stage: Any) -> Any:
        source = batches(stage)
        part = source.part
        source.part = lambda step, *which: part(0, *which)
        return source

    job.batches = same
    curve = [row["attention"] for row in steps(job, tmp_path)[:15]]
    assert curve[-1] < 0.5 * curve[0]


# Validation -----------------------------------------------------------------------------------


def test_an_answer_is_right_when_each_of_its_tokens_is_the_likeliest(noise_job, monkeypatch):
    model, batch = noise_job().model, noise_batch(1, 3, 1)
    group = batch.groups[0]
    group.weight[:] = 0
    group.loss_mask[:] = 0
    mask = group.loss_mask.reshape(6, TOKENS)
    mask[:, 2:4] = 1
    mask[5, :] = 0  # a row that no text fills
    kinds = (("presence",), ("caption",), ("presence_hard",), ("presence_hard",), ("count",), ())
    batch = replace(batch, groups=(replace(group, kinds=kinds),))
    labels = group.labels.reshape(6, TOKENS)[:5, 2:4]
    wrong = np.zeros((5, 2), bool)
    wrong[2, 1] = wrong[4, 0] = wrong[1, :] = True  # a hard one, the count, and a caption
    said = np.where(wrong, (labels + 1) % VOCABULARY, labels)
    logits = 9.0 * np.eye(VOCABULARY, dtype=np.float32)[said.reshape(-1)]
    monkeypatch.setattr(objective, "read_texts", lambda *_, **__: (mx.array(logits), None))
    result = objective.validate(model, iter([batch, batch]), AttentionLoss())
    assert result["val_answers"] == pytest.approx(2 / 4)
    assert result["val_answers_hard"] == pytest.approx(1 / 2)
    assert result["val_pointing"] is None
    captions = replace(group, kinds=(("caption",), ("describe",), ("sentence_caption",)) * 2)
    only = replace(batch, groups=(captions,))
    monkeypatch.setattr(
        objective, "read_texts", lambda *_, **__: (mx.zeros((10, VOCABULARY)), None)
    )
    result = objective.validate(model, iter([only]), AttentionLoss())
    assert (result["val_answers"], result["val_answers_hard"]) == (None, None)


def test_several_processes_add_their_answers_up(noise_job):
    model, batch = noise_job().model, noise_batch(1, 2, 1)
    told: list[Any] = []

    def add_up(values: Any) -> list[float]:
        told.append(list(values))
        return [2.0 * value for value in values]

    kinds = (("presence",), ("presence_hard",), ("caption",), ("match",))
    batch = replace(batch, groups=(replace(batch.groups[0], kinds=kinds),))
    result = objective.validate(model, iter([batch]), AttentionLoss(), add_up)
    (values,) = told
    assert values[-2:] == [3, 1]  # asked, and the hard ones of these
    assert all(isinstance(value, float | int) for value in values)
    assert 0 <= result["val_answers"] <= 1


def test_a_real_validation_counts_the_questions(tiny: list[str]):
    job = prepare(read_recipe(str(TINY), tiny[2:]))
    batches = list(job.validation())
    kinds = [kinds for batch in batches for group in batch.groups for kinds in group.kinds]
    assert all(len(row) == 1 for row in kinds)
    assert {row[0] for row in kinds} == {"caption", "presence"}
    result = objective.validate(job.model, batches, AttentionLoss(), list)
    assert 0 <= result["val_answers"] <= 1
    assert result["val_answers_hard"] is None
