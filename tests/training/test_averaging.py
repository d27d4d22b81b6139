"""The running mean of the weights against its definition in float64."""

from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.training.averaging import Average


def drawn(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))} for _ in range(steps)]


def fed(average: Average, values: list[dict[str, np.ndarray]], trained: list[str]) -> Average:
    for value in values:
        average.update({k: mx.array(v) for k, v in value.items()}, trained)
    return average


def definition(values: list[np.ndarray], decay: float) -> np.ndarray:
    shares = decay ** np.arange(len(values))[::-1]
    return sum(s * v for s, v in zip(shares, values, strict=True)) / shares.sum()


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_it_is_the_weighted_mean_of_the_steps_and_nothing_before_them(decay):
    values = drawn(40)
    average = fed(Average(decay), values, ["a", "b"])
    for name in "ab":
        expected = definition([v[name] for v in values], decay)
        np.testing.assert_allclose(np.array(average.state[f"{name}/mean"]), expected, atol=1e-6)


def test_it_begins_as_a_copy_in_fp32_of_what_is_trained():
    average = Average(0.9)
    params = {"a": mx.array([0.1, 2.0], mx.bfloat16), "frozen": mx.array([1.0])}
    assert average.averaged(params)["a"] is params["a"]
    average.update(params, ["a"])
    mean = average.state["a/mean"]
    assert mean.dtype == mx.float32
    assert (mean == params["a"]).all()
    assert average.averaged(params)["a"].dtype == mx.bfloat16
    assert average.averaged(params)["frozen"] is params["frozen"]
    assert average.names() == {"a"}


def test_a_thawed_parameter_joins_and_a_frozen_one_goes_on_to_where_it_was_frozen():
    values = drawn(3)
    average = fed(Average(0.5), values, ["a"])
    later = drawn(6)[3:]
    for value in later:
        value["a"] = values[-1]["a"]
    fed(average, later, ["b"])
    a = definition([v["a"] for v in values + later], 0.5)
    np.testing.assert_allclose(np.array(average.state["a/mean"]), a, atol=1e-6)
    b = definition([v["b"] for v in later], 0.5)
    np.testing.assert_allclose(np.array(average.state["b/mean"]), b, atol=1e-6)


def test_a_restored_average_goes_on_bit_for_bit(tmp_path: Path):
    values = drawn(12)
    whole = fed(Average(0.99), values, ["a", "b"])
    first = fed(Average(0.99), values[:5], ["a", "b"])
    mx.save_safetensors(str(tmp_path / "average.safetensors"), first.state)
    second = Average(0.99)
    second.state = cast(dict[str, mx.array], mx.load(str(tmp_path / "average.safetensors")))
    fed(second, values[5:], ["a", "b"])
    assert set(second.state) == set(whole.state)
    for key, value in whole.state.items():
        assert mx.array_equal(second.state[key], value)
