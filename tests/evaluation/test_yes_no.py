"""Yes/no answers against a table worked out by hand."""

import pytest

from agevlm_mlx.evaluation import yes_no
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores

NAMES = ("accuracy", "precision", "recall", "f1")


def scored(said: list[str], labels: list[str], positive: str = "yes") -> Scores:
    given = [
        Given(Item(key=str(n), unit=str(n), image=None, prompt="?", label=label), answer)
        for n, (answer, label) in enumerate(zip(said, labels, strict=True))
    ]
    scores = Scores([one.item.unit for one in given], boots=10)
    yes_no.score("x", given, scores, positive)
    return scores


def test_a_table_by_hand():
    """TP 3, FP 2, TN 3, FN 1; with "no" as the positive answer TP and TN change places."""
    said = ["yes", "yes", "yes", "no", "no", "yes", "no", "no", "yes"]
    labels = ["yes", "yes", "no", "no", "no", "no", "yes", "no", "yes"]
    found = scored(said, labels)
    expected = (6 / 9, 3 / 5, 3 / 4, 6 / 9)
    assert [found[f"x.{name}"] for name in NAMES] == pytest.approx(expected)
    assert found["x.yes_ratio"] == pytest.approx(5 / 9)
    other = scored(said, labels, positive="no")
    expected = (6 / 9, 3 / 4, 3 / 5, 6 / 9)
    assert [other[f"x.{name}"] for name in NAMES] == pytest.approx(expected)
    assert other["x.no_ratio"] == pytest.approx(4 / 9)


def test_always_the_same_answer():
    labels = ["yes", "no"] * 50
    yes, no = scored(["yes"] * 100, labels), scored(["no"] * 100, labels)
    assert [yes[f"x.{name}"] for name in NAMES] == pytest.approx([0.5, 0.5, 1, 2 / 3])
    assert [no[f"x.{name}"] for name in NAMES] == [0.5, 0, 0, 0]
    assert (yes["x.yes_ratio"], no["x.yes_ratio"]) == (1, 0)
