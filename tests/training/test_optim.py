"""AdamW against its formula in float64, schedules, clipping."""

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.data.batches import GroupSpec
from agevlm_mlx.training import optim
from agevlm_mlx.training.stages import Stage


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
