"""The compiled update is the plain one, traced once or twice."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.training import optim
from agevlm_mlx.training.compiled import make_update, wants_compile
from agevlm_mlx.training.stages import TrainSpec

SHAPES = {"layers.0.a.weight": (6, 4), "embed.weight": (5, 4), "norm.weight": (4,)}
SCALES = {"layers.0.a.weight": 1.0, "embed.weight": 0.5, "norm.weight": 2.0}


class Counted(optim.AdamW):
    """Counts how often its update is traced or run."""

    runs = 0

    def update(self, *args, **kwargs):
        self.runs += 1
        return super().update(*args, **kwargs)


def run(optimizer, compile: bool, steps: int = 6) -> dict[str, mx.array]:
    rng = np.random.default_rng(0)
    draw = lambda: {k: mx.array(rng.normal(size=s).astype(np.float32)) for k, s in SHAPES.items()}  # noqa: E731
    params, update = draw(), make_update(optimizer, SCALES, 1.0, compile)
    for step in range(steps):
        grads = draw()
        params = update(params, grads, optim.global_norm(grads), 0.01 * (step + 1))
        mx.eval(params, optimizer.state)
    return params


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Muon])
def test_compiled_and_plain_updates_are_the_same(kind):
    plain, compiled = kind((0.9, 0.98), 0.1), kind((0.9, 0.98), 0.1)
    expected, given = run(plain, False), run(compiled, True)
    for name, value in expected.items():
        np.testing.assert_allclose(np.array(given[name]), np.array(value), atol=1e-6)
    assert plain.state.keys() == compiled.state.keys()
    for name, value in plain.state.items():
        np.testing.assert_allclose(np.array(compiled.state[name]), np.array(value), atol=1e-6)


def test_it_is_traced_before_and_after_there_are_moments_and_not_again():
    counted = Counted()
    run(counted, True)
    assert counted.runs == 2


def test_auto_is_on_a_gpu_only():
    spec = TrainSpec(out=Path("-"))
    assert wants_compile(spec) is (mx.default_device() == mx.Device(mx.gpu))
    assert wants_compile(replace(spec, compile="on"))
    assert not wants_compile(replace(spec, compile="off"))
