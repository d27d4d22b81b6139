"""Paired differences whose intervals are known."""

import numpy as np
import pytest

from agevlm_mlx.evaluation.compare import Difference
from agevlm_mlx.experiments import statistics
from agevlm_mlx.experiments.results import headline


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_spread_is_that_of_a_sample():
    assert statistics.spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert statistics.spread([0.5]) == (0.5, None)


def test_what_both_share_cancels():
    # Draws of the scenes move both sides alike; the second is always 0.1 behind.
    drawn = rng().normal(0.5, 0.2, (3, 500))
    found = statistics.paired([0.7] * 3, [0.6] * 3, drawn, drawn - 0.1)
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1, 0.1))


def test_so_does_the_part_of_each_seed():
    # Seeds differ by much, arms by little: drawn apart, the seeds would hide the difference.
    drawn = np.array([[0.1], [0.5], [0.9]]).repeat(500, 1)
    found = statistics.paired([0.1, 0.5, 0.9], [0.05, 0.45, 0.85], drawn, drawn - 0.05)
    assert found.interval == pytest.approx((0.05, 0.05))


def test_seeds_that_disagree_widen_the_interval():
    # Two seeds, differences 0 and 1, no spread over scenes: a quarter of the draws has each of
    # 0 and 1, half of them 1/2.
    first, second = np.array([[0.0], [1.0]]).repeat(4000, 1), np.zeros((2, 4000))
    found = statistics.paired([0.0, 1.0], [0.0, 0.0], first, second)
    assert found.value == 0.5
    assert found.interval == (0.0, 1.0)
    one = statistics.paired([1.0], [0.0], first[1:], second[1:])
    assert one.interval == (1.0, 1.0)


def test_scenes_give_the_normal_interval():
    # Independent noise of 0.1 on each side: sqrt(2) 0.1 1.96 around the difference, with one seed;
    # the mean of four seeds that share no noise is half as wide, or a little more with seeds drawn.
    noise = rng(1).normal(0, 0.1, (2, 4, 20000))
    one = statistics.paired([0.3], [0.1], 0.3 + noise[0, :1], 0.1 + noise[1, :1])
    assert one.interval == pytest.approx((0.2 - 0.277, 0.2 + 0.277), abs=0.01)
    four = statistics.paired([0.3] * 4, [0.1] * 4, 0.3 + noise[0], 0.1 + noise[1])
    # A seed's noise counts as often as it is drawn: variance (1 + 3 / 4) / 4 of one seed's.
    wide = 0.277 * np.sqrt(1.75 / 4)
    assert four.interval == pytest.approx((0.2 - wide, 0.2 + wide), abs=0.01)


def test_draws_without_the_number_are_left_out():
    drawn = np.full((1, 100), 0.5)
    drawn[0, :90] = np.nan
    found = statistics.paired([0.5], [0.2], drawn, np.full((1, 100), 0.2))
    assert found.interval == pytest.approx((0.3, 0.3))
    assert statistics.paired([0.5], [0.2], drawn * np.nan, drawn).interval is None


def test_the_same_seeds_are_drawn_for_both_sides_and_every_time():
    first, second = rng(2).normal(size=(2, 3, 200))
    once, again = (statistics.paired([0] * 3, [0] * 3, first, second, 5) for _ in range(2))
    assert once.interval == again.interval
    assert once.interval != statistics.paired([0] * 3, [0] * 3, first, second, 6).interval
    turned = statistics.paired([0] * 3, [0] * 3, second, first, 5).interval
    assert turned == pytest.approx((-once.interval[1], -once.interval[0]))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        statistics.paired([0, 0], [0], np.zeros((2, 5)), np.zeros((1, 5)))
    with pytest.raises(ValueError, match="draws"):
        statistics.paired([0], [0], np.zeros((1, 5)), np.zeros((1, 6)))


@pytest.mark.parametrize(
    ("interval", "more", "less"),
    [((0.01, 0.2), True, False), ((-0.2, -0.01), False, True), ((-0.1, 0.1), False, False),
     ((0.0, 0.1), False, False), (None, False, False)],
)  # fmt: skip
def test_sure_is_what_leaves_out_zero(interval, more, less):
    one = Difference(0.0, 0.0, interval)
    assert statistics.sure(one) is more
    assert statistics.sure(one, -1) is less
    assert not statistics.sure(one, 0)


def test_captions_are_compared_at_the_highest_recall_that_both_reach():
    name = "text.chair_i_at_recall"
    one, other = (Difference(0.0, v, (-0.1, 0.1)) for v in (0.1, 0.2))
    unknown = Difference(0.0, 0.3, None)
    found = {f"{name}.50": one, f"{name}.70": other, f"{name}.80": unknown, "text.recall": one}
    assert headline(found, name) == (other, " at .70")
    assert headline(found, "text.recall") == (one, "")
    assert headline(found, "text.chair_i_confirmed_at_recall") is None
