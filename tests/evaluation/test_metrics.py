"""Each score against a table worked out by hand (the arithmetic is in the comments)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm_mlx.evaluation import metrics


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("No.", False),
        ("No, there is a cat", False),
        ("There is not a dog", False),
        ("Yes. No dog", True),  # only what stands before the first full stop counts
        ("", True),
        ("banana", True),
        ("NO", True),  # the official rule is case-sensitive
        ("Not", True),
        ("no\n", True),  # and splits at spaces only
        ("Nothing", True),
    ],
)
def test_official_parse_rule_of_pope(answer: str, yes: bool):
    assert metrics.parse_yes_no(answer) is yes


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([1, 2], [1, 0], 3.5 / 4),  # 1>1 a tie .5, 1>0, 2>1, 2>0
        ([3, 1, 2], [2], 1.5 / 3),
    ],
)
def test_auroc_counts_a_tie_as_half(positive: list[int], negative: list[int], expected: float):
    assert metrics.auroc(positive, negative) == pytest.approx(expected)


def caption_scores(mentions: list[list[str]], truth: list[set[str]]) -> dict[str, float]:
    counts = [metrics.caption_counts(m, t) for m, t in zip(mentions, truth, strict=True)]
    ratios = metrics.caption_ratios(np.array(counts))
    return {name: metrics.divide(top.sum(), bottom.sum()) for name, (top, bottom) in ratios.items()}


def test_captions_against_a_hand_computed_table():
    mentions = [["dog", "cat"], ["car", "dog", "dog"], [], ["bus"]]
    truth = [{"dog", "car"}, {"car"}, {"cat"}, {"bus", "tree"}]
    score = caption_scores(mentions, truth)
    # absent mentions: cat; dog, dog -> 3 of 6; captions with one: 2 of 4
    assert score["chair_i"] == pytest.approx(3 / 6)
    assert score["chair_s"] == pytest.approx(2 / 4)
    # recalled: dog; car; -; bus -> 3 of 6 present objects
    assert score["recall"] == pytest.approx(3 / 6)
    # different nouns: dog, cat; car, dog; -; bus -> 5, of which 3 are right: P 3/5, R 3/6
    assert score["caption_f1"] == pytest.approx(2 * 3 / (5 + 6))
    assert score["repeated_mentions"] == pytest.approx(1 / 6)
    assert score["mentions_per_caption"] == pytest.approx(6 / 4)


def test_silence_is_not_hallucination_but_recalls_nothing():
    score = caption_scores([[], []], [{"dog"}, {"cat"}])
    assert set(score.values()) == {0}


def test_pointing_game_with_and_without_tolerance():
    mask = np.zeros((10, 20), bool)
    mask[2:4, 5:8] = True
    assert metrics.pointing_hit(5.0, 2.0, mask)
    assert metrics.pointing_hit(7.99, 3.99, mask)
    assert not metrics.pointing_hit(8.0, 3.0, mask)  # the next pixel
    assert not metrics.pointing_hit(3.0, 6.0, mask)  # x and y are not exchanged
    assert metrics.pointing_hit(8.5, 3.5, mask, radius=1.5)
    assert not metrics.pointing_hit(9.5, 3.5, mask, radius=2.0)  # distance 2 is not below 2
    assert not metrics.pointing_hit(-0.1, 2.0, mask, radius=50)
    assert not metrics.pointing_hit(5.0, 10.0, mask, radius=50)
    assert not metrics.pointing_hit(1, 1, np.zeros((4, 4), bool), radius=9)


def test_peak_cell_is_the_centre_in_cells_row_major():
    attention = np.zeros((2, 3))
    attention[1, 2] = 1
    assert metrics.peak_cell(attention, (2, 3)) == (2.5, 1.5)
    assert metrics.peak_cell(attention.ravel(), (2, 3)) == (2.5, 1.5)


def test_energy_in_mask_against_hand_computed_values():
    attention, coverage = np.array([0.1, 0.2, 0.3, 0.2]), np.array([0.0, 0.5, 1.0, 0.0])
    # (0.2 * 0.5 + 0.3) / 0.8; a map that sums to less than 1 (null slot) is normalised
    energy = metrics.energy_in_mask(attention, coverage)
    assert energy == pytest.approx(0.5)
    assert metrics.uniform_energy(coverage) == pytest.approx(0.375)
    assert metrics.energy_in_mask(np.ones(4), coverage) == pytest.approx(0.375)
    assert metrics.energy_in_mask(np.zeros(4), coverage) == 0


def test_interval_of_a_mean_has_the_width_of_its_standard_error():
    rng = np.random.default_rng(0)
    values = rng.random(400) < 0.8
    low, high = metrics.mean_interval(list(range(400)), values, metrics.image_draws(400))
    error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert low == pytest.approx(values.mean() - error, abs=0.008)
    assert high == pytest.approx(values.mean() + error, abs=0.008)


def test_questions_about_one_image_do_not_narrow_the_interval():
    values = (np.random.default_rng(1).random(100) < 0.5).astype(float)
    draws = metrics.image_draws(100)
    once = metrics.mean_interval(list(range(100)), values, draws)
    six = metrics.mean_interval(
        [i for i in range(100) for _ in range(6)], np.repeat(values, 6), draws
    )
    assert six == pytest.approx(once)


def test_auroc_draws_agree_with_auroc():
    """Units without a positive and a negative of their own: drawing is repeating."""
    rng = np.random.default_rng(2)
    positive, negative = rng.normal(1, 1, 30).round(1), rng.normal(0, 1, 20).round(1)
    draws = rng.integers(0, 4, (250, 50)).astype(float)
    draws[7, :30], draws[9, 30:] = 0, 0
    drawn = metrics.auroc_draws(positive, negative, range(30), range(30, 50), draws)
    assert drawn.shape == (250,)
    for b in range(250):
        p = np.repeat(positive, draws[b, :30].astype(int))
        n = np.repeat(negative, draws[b, 30:].astype(int))
        expected = metrics.auroc(p, n) if len(p) and len(n) else np.nan
        assert drawn[b] == pytest.approx(expected, nan_ok=True)


def test_a_unit_does_not_meet_its_own_copies():
    """Each own score is just above its unit's other one: always right within, chance between."""
    rng = np.random.default_rng(0)
    other = rng.normal(0, 5, 50)
    draws = metrics.image_draws(50, 2000, 1)
    drawn = metrics.auroc_draws(other + 0.3, other, range(50), range(50), draws)
    value = metrics.auroc(other + 0.3, other)
    assert drawn.mean() == pytest.approx(value, abs=0.002)
    low, high = metrics.interval(drawn)
    assert low < value < high
    once = metrics.auroc_draws(other + 0.3, other, range(50), range(50), np.ones((1, 50)))
    assert once == pytest.approx([value])


def test_a_draw_without_items_is_left_out_of_the_interval():
    assert metrics.interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert np.isnan(metrics.interval(np.array([np.nan]))).all()


@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_derangement_moves_everything(count: int, seed: int):
    order = metrics.derangement(count, seed)
    assert sorted(order) == list(range(count))
    assert (order != np.arange(count)).all()


def test_one_image_cannot_be_shuffled():
    with pytest.raises(ValueError, match="two"):
        metrics.derangement(1, 0)
