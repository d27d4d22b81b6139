"""AdamW against its formula in float64, both optimisers against MLX's, schedules, clipping."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest

from agevlm_mlx.data.batches import GroupSpec
from agevlm_mlx.training import optim
from agevlm_mlx.training.stages import Stage, TrainSpec


def stage(**changes) -> Stage:
    values = {
        "name": "s",
        "steps": 10,
        "batch_size": 1,
        "lr": 0.1,
        "texts": (GroupSpec(kinds=("caption",), n=1),),
        "trainable": ((".*", 1.0),),
    }
    return Stage(**(values | changes))


def test_adamw_follows_its_formula_with_scales_and_decay_on_matrices_only():
    rng = np.random.default_rng(0)
    start = {"matrix": rng.normal(size=(3, 2)), "bias": rng.normal(size=4)}
    grads = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(3)]
    scales, lr, b1, b2, decay = {"matrix": 1.0, "bias": 0.25}, 0.01, 0.9, 0.98, 0.1

    expected = {}
    for name, value in start.items():
        m = v = np.zeros_like(value)
        for t, g in enumerate((g[name] for g in grads), start=1):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
            wanted_decay = decay * value if name == "matrix" else 0
            value = value - lr * scales[name] * (step + wanted_decay)
        expected[name] = value

    adamw = optim.AdamW((b1, b2), decay)
    params = {k: mx.array(v) for k, v in start.items()}
    for g in grads:
        params = adamw.update(params, {k: mx.array(v) for k, v in g.items()}, lr, scales)
    for name, value in expected.items():
        np.testing.assert_allclose(np.array(params[name]), value, rtol=1e-5)


def test_a_thawed_parameter_starts_its_own_count_and_a_frozen_one_is_forgotten():
    adamw, ones = optim.AdamW(), {"scale": 1.0}
    one = {"scale": mx.array([1.0])}
    for _ in range(5):
        adamw.update(one, {"scale": mx.array([0.5])}, 0.1, ones)
    both = {**one, "late": mx.array([1.0])}
    grads = {k: mx.array([0.5]) for k in both}
    moved = adamw.update(both, grads, 0.1, {"scale": 1.0, "late": 1.0})
    # A first Adam step has length lr whatever the gradient's size.
    assert moved["late"].item() == pytest.approx(0.9, rel=1e-5)
    adamw.keep_only(["late"])
    assert {k.rpartition("/")[0] for k in adamw.state} == {"late"}


def test_half_precision_parameters_keep_their_type_and_fp32_moments():
    adamw = optim.AdamW()
    params = {"w": mx.ones((2, 2), mx.bfloat16)}
    new = adamw.update(params, {"w": mx.ones((2, 2), mx.bfloat16)}, 0.1, {"w": 1.0})
    assert new["w"].dtype == mx.bfloat16
    assert adamw.state["w/m"].dtype == adamw.state["w/v"].dtype == mx.float32


def mlx_steps(optimizer, start, grads):
    params = {k: mx.array(v) for k, v in start.items()}
    for g in grads:
        params = optimizer.apply_gradients({k: mx.array(v) for k, v in g.items()}, params)
    return params


def our_steps(optimizer, start, grads, lr):
    params, ones = {k: mx.array(v) for k, v in start.items()}, dict.fromkeys(start, 1.0)
    for g in grads:
        params = optimizer.update(params, {k: mx.array(v) for k, v in g.items()}, lr, ones)
    return params


def random_steps(shapes, steps=4):
    rng = np.random.default_rng(1)
    draw = lambda: {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}  # noqa: E731
    return draw(), [draw() for _ in range(steps)]


def test_adamw_is_mlx_s_with_its_bias_correction():
    start, grads = random_steps({"a.weight": (6, 4), "b.weight": (2, 3, 3, 4)})
    theirs = mlx.optimizers.AdamW(0.01, [0.9, 0.98], weight_decay=0.1, bias_correction=True)
    ours = our_steps(optim.AdamW((0.9, 0.98), 0.1), start, grads, 0.01)
    for name, value in mlx_steps(theirs, start, grads).items():
        np.testing.assert_allclose(np.array(ours[name]), np.array(value), atol=1e-6)


def test_muon_is_mlx_s_on_matrices_of_layers_and_adamw_elsewhere():
    matrices = {
        "layers.0.tall.weight": (12, 5),
        "layers.0.wide.weight": (5, 12),
        "stem.conv.weight": (4, 3, 3, 6),
    }
    others = {
        "model.embed_tokens.weight": (9, 4),
        "lm_head.weight": (9, 4),
        "layers.0.norm.weight": (4,),
        "layers.0.q_proj.lora_a": (4, 2),
        "layers.0.cross_attn.null_key": (2, 4),
        "layers.0.experts.up_proj.weight": (2, 5, 4),
    }
    start, grads = random_steps(matrices | others)
    muon = optim.Muon((0.9, 0.98))
    ours = our_steps(muon, start, grads, 0.02)
    for kind, names in (
        (mlx.optimizers.Muon(0.02, momentum=0.95, weight_decay=0.0), matrices),
        (mlx.optimizers.AdamW(0.02, [0.9, 0.98], weight_decay=0, bias_correction=True), others),
    ):
        some = [{k: g[k] for k in names} for g in grads]
        for name, value in mlx_steps(kind, {k: start[k] for k in names}, some).items():
            np.testing.assert_allclose(np.array(ours[name]), np.array(value), atol=1e-6)
    wanted = {f"{name}/m" for name in matrices}
    assert set(muon.state) == wanted | {f"{name}/{key}" for name in others for key in "mvt"}
    muon.keep_only(["layers.0.tall.weight", "lm_head.weight"])
    assert set(muon.state) == {
        "layers.0.tall.weight/m", *(f"lm_head.weight/{key}" for key in "mvt")
    }  # fmt: skip


def test_muon_turns_an_uneven_gradient_into_a_nearly_orthogonal_step_and_decays_apart_from_it():
    gradient = mx.random.normal((40, 10)) * mx.array([0.1] * 5 + [10.0] * 5)
    zeros = {"a.weight": mx.zeros((40, 10))}
    step = optim.Muon().update(zeros, {"a.weight": gradient}, 1.0, {"a.weight": 0.5})["a.weight"]
    sizes = np.linalg.svd(np.array(step), compute_uv=False)
    assert 0.5 * 2 * 0.5 < sizes.min() < sizes.max() < 0.5 * 2 * 1.3  # scale, sqrt(40 / 10)
    ones = {"a.weight": mx.ones((40, 10))}
    plain = optim.Muon().update(ones, {"a.weight": gradient}, 0.1, {"a.weight": 1.0})
    decayed = optim.Muon(weight_decay=0.5).update(
        ones, {"a.weight": gradient}, 0.1, {"a.weight": 1.0}
    )
    difference = np.array(plain["a.weight"] - decayed["a.weight"])
    # Of 0.1 x sqrt(40 / 10) x 0.5 x 1.
    np.testing.assert_allclose(difference, 0.1, rtol=1e-5)


def test_a_recipe_names_its_optimizer():
    spec = TrainSpec(out=Path("-"), betas=(0.8, 0.9), weight_decay=0.3)
    made = optim.make_optimizer(spec)
    assert type(made) is optim.AdamW
    assert (made.betas, made.weight_decay) == ((0.8, 0.9), 0.3)
    assert type(optim.make_optimizer(replace(spec, optimizer="muon"))) is optim.Muon


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Muon])
def test_an_update_is_the_same_with_a_learning_rate_that_is_an_array(kind):
    start, grads = random_steps({"a.weight": (6, 4), "b": (3,)}, 2)
    plain, traced = (our_steps(kind(), start, grads, lr) for lr in (0.01, mx.array(0.01)))
    for name, value in plain.items():
        np.testing.assert_allclose(np.array(traced[name]), np.array(value), atol=1e-7)


def test_schedule_warms_up_and_ends_where_the_next_stage_goes_on():
    cosine = stage(warmup=4, lr_end=0.02)
    rates = [optim.learning_rate(cosine, step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == 0.1
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0.02
    assert optim.learning_rate(cosine, 10) == pytest.approx(0.02)
    constant = stage(schedule="constant", warmup=2)
    assert [optim.learning_rate(constant, s) for s in (0, 1, 5, 9)] == [0.05, 0.1, 0.1, 0.1]


def test_wsd_stays_and_then_goes_to_its_end_where_the_next_stage_goes_on():
    wsd = stage(schedule="wsd", steps=20, warmup=4, decay=0.25, lr_end=0.02)
    rates = [optim.learning_rate(wsd, step) for step in range(20)]
    assert rates[3:16] == [0.1] * 13
    assert rates[16:] == pytest.approx([0.02 + 0.08 * (1 - (i / 5) ** 0.5) for i in range(1, 5)])
    assert optim.learning_rate(wsd, 20) == 0.02
    # A decay that would begin within the warm-up begins after it.
    short = stage(schedule="wsd", steps=6, warmup=4, decay=1.0)
    assert [optim.learning_rate(short, s) for s in (3, 4, 6)] == [0.1, 0.1, 0.0]


def test_clip_limits_the_global_norm_and_keeps_the_direction():
    grads = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    norm = optim.global_norm(grads)
    assert norm.item() == pytest.approx(5)
    clipped = optim.clip(grads, norm, 1.0)
    assert optim.global_norm(clipped).item() == pytest.approx(1, rel=1e-5)
    assert clipped["a"][0].item() / clipped["b"].item() == pytest.approx(0.75)
    untouched = optim.clip(grads, norm, 10.0)
    assert untouched["b"].item() == pytest.approx(4)


def test_global_norm_shows_a_gradient_that_is_not_finite():
    assert not np.isfinite(optim.global_norm({"a": mx.ones(2), "b": mx.array([np.nan])}).item())
