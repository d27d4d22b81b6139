"""Numbers with their intervals, and how answers become what a benchmark scores."""

import numpy as np
import pytest

from agevlm_mlx.evaluation import metrics, scoring
from agevlm_mlx.evaluation.benchmark import Benchmark, Given, Item, Scores, flatten


def item(key: str, unit: str, **rest) -> Item:
    return Item(key=key, unit=unit, image=None, prompt="?", **rest)


GIVEN = [Given(item(str(n), unit)) for n, unit in enumerate("aabbbcdef")]
UNITS = sorted("abcdef")


def test_a_mean_is_over_items_and_its_interval_over_units():
    scores = Scores(UNITS, boots=400, seed=3)
    right = [1, 1, 0, 0, 1, 1, 0, 1, 0]
    scores.mean("accuracy", GIVEN, right)
    assert scores["accuracy"] == pytest.approx(5 / 9)
    draws = metrics.image_draws(6, 400, 3)
    by_hand = draws @ np.array([2, 1, 1, 0, 1, 0]) / (draws @ np.array([2, 3, 1, 1, 1, 1]))
    assert np.allclose(scores.drawn("accuracy"), by_hand)
    assert scores.interval("accuracy") == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))


def test_a_ratio_of_sums_and_a_number_made_from_others():
    scores = Scores(UNITS, boots=50)
    scores.ratio("half", GIVEN, [1, 0, 1, 0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 2, 1, 1, 1, 1])
    scores.mean("one", GIVEN, np.ones(9))
    scores.derive("sum", lambda a, b: 100 * (a + b), "half", "one")
    assert scores["half"] == 0.5
    assert scores["sum"] == 150.0
    half = scores.drawn("half")
    assert half is not None
    assert np.allclose(scores.drawn("sum"), 100 * (half + 1))
    scores.ratio("empty", [], [], [])
    assert scores["empty"] == 0.0
    assert scores.interval("empty") is None


def test_few_units_have_no_interval():
    """Drawing one unit again and again gives the same each time: no certainty."""
    scores = Scores(UNITS, boots=50)
    scores.mean("four", GIVEN[:7], [1, 0, 1, 0, 1, 0, 1])
    scores.mean("all", GIVEN, np.ones(9))
    scores.derive("both", np.add, "four", "all")
    scores.auroc("ranked", GIVEN, [1] * 9, GIVEN[5:], [0] * 4)
    assert scores["four"] == pytest.approx(4 / 7)
    assert scores.interval("four") is scores.interval("both") is scores.interval("ranked") is None
    assert scores.drawn("four") is None
    assert scores.interval("all") == (1.0, 1.0)


def test_what_is_put_without_draws_has_no_interval_and_makes_none():
    scores = Scores(UNITS, boots=10)
    scores.put("alone", 0.25)
    scores.mean("one", GIVEN, np.ones(9))
    scores.derive("both", lambda a, b: a + b, "alone", "one")
    assert scores["both"] == 1.25
    assert scores.interval("alone") is scores.interval("both") is None


def test_auroc_with_units_drawn():
    scores = Scores(UNITS, boots=100)
    given = [GIVEN[n] for n in (0, 2, 5, 6, 7)]
    scores.auroc("auroc", given, [3, 2, 1, 5, 5], given, [0, 2, 2, 4, 4])
    assert scores["auroc"] == pytest.approx((3 + 2 + 1 + 5 + 5) / 25)
    assert len(scores.drawn("auroc")) == 100
    scores.auroc("none", given, [1] * 5, [], [])
    assert "none" not in scores


def test_lengths_that_differ_are_an_error():
    with pytest.raises(ValueError, match="accuracy: 9 answers, 5 and 9 numbers"):
        Scores(UNITS).mean("accuracy", GIVEN, [1] * 5)


def test_dotted_names_are_a_tree_and_back():
    scores = Scores(["a"], boots=2)
    for name, value in (("all", 0.5), ("pope.random.f1", 0.25), ("pope.popular.f1", 1.0)):
        scores.put(name, value)
    tree = {"all": 0.5, "pope": {"random": {"f1": 0.25}, "popular": {"f1": 1.0}}}
    assert scores.nested() == tree
    assert flatten(tree) == {"all": 0.5, "pope.random.f1": 0.25, "pope.popular.f1": 1.0}


# --- from rows --------------------------------------------------------------------------------


def row(key: str, kind: str = "choice", **rest) -> dict:
    about = {"unit": key, "image": "a.png", "prompt": "?", "label": "yes", "options": ["yes", "no"]}
    return {"key": key, "kind": kind, **about, "about": {}, **rest}


ACCURACY = Benchmark(
    name="accuracy",
    about="",
    needs="",
    read=lambda source: [],
    parse=lambda item, said: said.lower(),
    score=lambda given, scores: scores.mean("accuracy", given, [g.answer == "yes" for g in given]),
)


def test_answers_by_words_and_by_options_and_their_controls():
    rows = [
        row("a", answer="Yes", scores=[-1.0, -2.0], blind_answer="No", blind_scores=[-3.0, -0.5]),
        row("b", answer="NO", scores=[-0.1, -2.0], shuffled_scores=[-2.0, -1.0], image=None),
        row("c", "text", answer="yes", options=[]),
    ]
    found = {
        (way, control): [g.answer for g in scoring.given(ACCURACY, rows, way, control)]
        for way in ("text", "logits")
        for control in ("", "blind", "shuffled")
    }
    assert found == {
        ("text", ""): ["yes", "no", "yes"],
        ("text", "blind"): ["no"],
        ("text", "shuffled"): [],
        ("logits", ""): ["yes", "yes"],
        ("logits", "blind"): ["no"],
        ("logits", "shuffled"): [],  # b has no image that could be exchanged
    }
    [first, second] = scoring.given(ACCURACY, rows, "logits")
    assert (first.scores, first.blind) == ((-1.0, -2.0), (-3.0, -0.5))
    assert second.blind == second.scores  # nothing was taken away


def test_constants_answer_what_they_can():
    rows = [row("a"), row("b", options=["a", "b"], label="b"), row("c", "text", options=[])]
    constants = scoring.constants(rows)
    assert {k: [g.answer for g in v] for k, v in constants.items()} == {
        "yes": ["yes", ""],
        "no": ["no", ""],
        "a": ["", "a"],
        "b": ["", "b"],
    }


def test_majority_knows_the_labels_of_the_same_words():
    labels = [("Is it?", "no"), ("Is it?", "no"), ("Is it?", "yes"), ("Was it?", "yes")]
    rows = [row(str(n), prompt=p, label=label) for n, (p, label) in enumerate(labels)]
    # A question that is asked once would give its own label away: the split's commonest instead.
    assert [g.answer for g in scoring.majority(rows)] == ["no", "no", "no", "no"]
    split = [r | {"about": {"split": "x" if n > 1 else "y"}} for n, r in enumerate(rows)]
    assert [g.answer for g in scoring.majority(split)] == ["no", "no", "yes", "yes"]
    one_unit = [r | {"unit": "u"} for r in rows[:2]] + rows[3:]
    assert [g.answer for g in scoring.majority(one_unit)] == ["no"] * 3
    letters = [*rows[:3], row("l", prompt="Which?", label="A", options=["A", "B"])]
    assert scoring.majority(letters)[3].answer == "A"  # never an answer that is no option


def test_an_item_comes_back_from_its_row():
    first = row("a", answer="yes", phrase="dog", about={"split": "x"})
    again = scoring.as_item(first)
    assert (again.key, again.label, again.options) == ("a", "yes", ("yes", "no"))
    assert (again.phrase, again.about) == ("dog", {"split": "x"})


def test_names_from_data_that_collide_are_kept_apart():
    scores = Scores(["a"], boots=2)
    for name in ("image", "image.aAcc", "image.aAcc.easy"):
        scores.put(name, 1.0)
    assert flatten(scores.nested()) == {"image": 1.0, "image_.aAcc": 1.0, "image_.aAcc_.easy": 1.0}
