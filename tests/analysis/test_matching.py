"""Matching against mismatching pairs: the numbers by hand, and subjects whose answers are known."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agevlm_mlx.analysis import matching, separation
from agevlm_mlx.analysis.examples import Example
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import metrics
from agevlm_mlx.evaluation.respondent import Looked, Request

NAN = float("nan")
OWN = np.array([3.0, 1.0])
OTHER = np.array([[0.0, 2.0], [1.0, NAN]])


def one_draw(images: int) -> np.ndarray:
    return np.ones((1, images))


# --- the numbers -----------------------------------------------------------------------------


def test_every_number_of_a_small_table():
    found = separation.separation(OWN, OTHER, one_draw(2))
    values = {k: v["value"] for k, v in found.items() if isinstance(v, Mapping)}
    assert values == {
        "auroc": pytest.approx(4.5 / 6),  # 3 beats 0, 2 and 1; 1 beats 0 and is as high as 1
        "win_rate": pytest.approx(2.5 / 3),
        "d_prime": pytest.approx(1 / np.sqrt((1 + 2 / 3) / 2)),  # means 2 and 1
        "overlap": pytest.approx(1 / 3),  # they share the bin of the 1s only
        "recall_at_1": pytest.approx(0.75),  # a tie of two is half a hit
        "sanity": 0.0,  # 0 and 1 against 2
    }
    assert found["recall_at_1"]["no_skill"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert (found["images"], found["pairs"]) == (2, 3)
    # The only draw is the sample itself.
    for name, value in values.items():
        assert found[name]["interval"] == pytest.approx([value, value])


def test_images_without_another_caption_are_left_out():
    other = np.array([[0.0, 2.0], [NAN, NAN]])
    found = separation.separation(np.array([1.0, 99.0]), other, one_draw(2))
    assert found["auroc"]["value"] == 0.5
    assert (found["images"], found["pairs"]) == (1, 2)


def drawn_by_hand(draw: np.ndarray) -> dict[str, float]:
    """The numbers of a draw, each image as often as it was drawn."""
    at = np.repeat(np.arange(len(draw)), draw.astype(int))
    own, other = OWN3[at], OTHER3[at]
    flat = other[np.isfinite(other)]
    spread = np.sqrt((own.var() + flat.var()) / 2)
    wins = (own[:, None] > other) + 0.5 * (own[:, None] == other)
    return {
        "auroc": auroc_by_hand(draw),
        "win_rate": float(wins[np.isfinite(other)].mean()),
        "d_prime": float((own.mean() - flat.mean()) / spread) if spread > 1e-9 else NAN,
    }


def auroc_by_hand(draw: np.ndarray) -> float:
    """Over all pairs; an image meets others as often as both were drawn, itself once a draw."""
    wins = pairs = 0.0
    for i, own in enumerate(OWN3):
        for j, row in enumerate(OTHER3):
            weight = draw[i] if i == j else draw[i] * draw[j]
            met = row[np.isfinite(row)]
            wins += weight * ((own > met) + 0.5 * (own == met)).sum()
            pairs += weight * len(met)
    return wins / pairs


OWN3 = np.array([3.0, 1.0, 2.5, 0.5])
OTHER3 = np.array([[0.0, 2.0, 1.0], [1.0, NAN, 0.25], [2.75, 1.5, NAN], [0.5, 0.75, 0.0]])


def test_intervals_are_those_of_images_drawn_with_all_their_pairs():
    draws = metrics.image_draws(4, 200, seed=3)
    expected = [drawn_by_hand(draw) for draw in draws]
    found = separation.separation(OWN3, OTHER3, draws)
    for name in ("auroc", "win_rate", "d_prime"):
        values = np.array([one[name] for one in expected])
        assert found[name]["interval"] == pytest.approx(metrics.interval(values)), name


def test_the_interval_of_the_overlap_holds_the_overlap():
    rng = np.random.default_rng(0)
    draws = metrics.image_draws(30, 300)
    for shift in (0.0, 1.0, 5.0):
        found = separation.overlap(rng.normal(shift, 1, 30), rng.normal(0, 1, (30, 5)), draws)
        low, high = found["interval"]
        assert 0 <= low <= found["value"] <= high <= 1
    same = rng.normal(0, 1, 30)
    found = separation.overlap(same, np.roll(same, 1), draws)
    assert found["value"] == found["interval"][1] == 1


def test_the_overlap_counts_the_highest_scores():
    draws = metrics.image_draws(20, 50)
    found = separation.overlap(np.ones(20), np.zeros((20, 3)), draws)
    assert found["value"] == 0
    one_below = np.array([*[1.0] * 19, 0.0])
    assert separation.overlap(one_below, np.zeros((20, 3)), draws)["value"] == pytest.approx(0.05)


def test_scores_that_are_all_the_same_separate_nothing():
    found = separation.separation(np.ones(3), np.ones((3, 2)), metrics.image_draws(3, 50))
    assert found["auroc"]["value"] == found["win_rate"]["value"] == 0.5
    assert found["overlap"]["value"] == 1
    assert np.isnan(found["d_prime"]["value"])
    assert found["d_prime"]["interval"] is None
    assert found["recall_at_1"]["value"] == pytest.approx(1 / 3)


def test_a_distribution_counts_each_kind_in_the_same_bins():
    kinds = {"matching": np.array([0.0, 24.0]), "mismatching": OTHER, "hard": np.full(2, NAN)}
    found = separation.distribution(kinds)
    assert found["edges"] == list(range(25))
    assert found["shares"]["matching"] == [0.5, *[0.0] * 22, 0.5]
    assert found["shares"]["mismatching"][:3] == pytest.approx([1 / 3] * 3)
    assert found["quantiles"]["matching"] == pytest.approx([1.2, 6.0, 12.0, 18.0, 22.8])
    assert "hard" not in found["shares"]


@pytest.mark.parametrize(("count", "others"), [(2, 1), (5, 3), (5, 31), (40, 31)])
def test_partners_are_derangements_without_repetition(count, others):
    table = matching.partners(count, others, seed=1)
    assert table.shape == (count, min(others, count - 1))
    for column in table.T:
        assert sorted(column) == list(range(count))
        assert not (column == np.arange(count)).any()
    assert all(len(set(row)) == len(row) for row in table.tolist())
    assert count < 5 or (table != matching.partners(count, others, seed=2)).any()


# --- subjects --------------------------------------------------------------------------------


class Scripted:
    """knows: image -> the caption it takes to be true. seeing: does the image matter? It says
    what is true with log-probability -1 a token, all else with -2."""

    about: Mapping[str, Any] = {}

    def __init__(self, knows: Mapping[Path, str], seeing: bool = True, bad: Sequence[Path] = ()):
        self.knows, self.seeing, self.bad = knows, seeing, bad
        self.shown: list[Path] = []
        self.largest = 0

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        self.shown = [image for image in images if image not in self.bad]
        self.largest = max(self.largest, len(images))
        return {image: f"{image}: broken" for image in images if image in self.bad}

    def generate(self, requests: Sequence[Request], max_tokens: int) -> Iterator[tuple[int, str]]:
        raise NotImplementedError

    def _true(self, request: Request, text: str) -> bool:
        assert request.image is None or request.image in self.shown
        return self.seeing and request.image is not None and text == self.knows[request.image]

    def options(
        self, requests: Sequence[Request], options: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        assert all(tuple(two) == ("yes", "no") for two in options)
        said = [request.prompt.removeprefix("Fits? ") for request in requests]
        return [
            (-0.1, -2.1) if self._true(request, text) else (-2.1, -0.1)
            for request, text in zip(requests, said, strict=True)
        ]

    def log_likelihood(
        self, requests: Sequence[Request], answers: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        # Some captions are likely in themselves.
        return [
            tuple((-1.0 if self._true(request, a) else -2.0) - len(a) / 1000 for a in row)
            for request, row in zip(requests, answers, strict=True)
        ]

    def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
        raise NotImplementedError

    def states(
        self, image: Path | None, texts: Sequence[str], prompt: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """At the embedding all alike; after the layer, what is said and what is seen, under a
        direction that everything shares."""
        names = list(self.knows.values())
        text = np.zeros((len(texts), 2, len(names) + 2), np.float32)
        text[:, :, -1] = 50
        text[:, 0, 0] = 1
        for n, said in enumerate(texts):
            text[n, 1, names.index(said) if said in names else -2] = 1
        if image is None:
            return text, None
        seen = np.zeros(text.shape[1:], np.float32)
        seen[:, -1] = 80
        seen[1, names.index(self.knows[image]) if self.seeing else 0] = 2
        return text, seen


def example(n: int, hard: bool = True) -> Example:
    caption = f"Caption {'x' * n}."
    return Example(Path(f"{n}.png"), caption, f"False {'x' * n}." if hard else None, {}, ())


EXAMPLES = [example(n, hard=n != 2) for n in range(6)]
KNOWS = {one.image: one.caption for one in EXAMPLES}
SETTINGS = matching.Settings(others=3, question="Fits? {caption}", boots=100, batch_size=4)


def test_a_subject_that_knows_scores_everything():
    subject = Scripted(KNOWS)
    found = matching.measure(subject, EXAMPLES, SETTINGS)
    assert subject.largest == 4
    assert (found["images"], found["others"], found["hard"]) == (6, 3, 5)
    for name in ("log_p", "pmi", "yes", "yes_pmi"):
        for kind in ("random", "hard"):
            separated = found["scores"][name][kind]
            assert separated["auroc"] == {"value": 1.0, "interval": [1.0, 1.0]}, (name, kind)
            assert separated["recall_at_1"]["value"] == 1
    assert found["scores"]["pmi"]["random"]["recall_at_1"]["no_skill"] == 0.25
    assert found["scores"]["log_p"]["hard"]["images"] == 5
    row = found["rows"][1]
    assert row["pmi"] == pytest.approx([1.0, 0.0, 0.0, 0.0, 0.0])
    assert row["yes"] == pytest.approx([2.0, -2.0, -2.0, -2.0, -2.0])
    assert row["captions"][0] == "Caption x."
    assert row["captions"][4] == "False x."
    assert found["rows"][2]["captions"][4] is None
    p = 1 / (1 + np.exp(-2))
    assert found["p_yes"]["matching"]["value"] == pytest.approx(p)
    assert found["p_yes"]["hard"]["value"] == pytest.approx(1 - p)


def test_cosines_are_measured_at_each_layer_and_centring_shows_what_is_hidden():
    embedding, after = matching.measure(Scripted(KNOWS), EXAMPLES, SETTINGS)["layers"]
    assert embedding["raw"]["random"]["auroc"]["value"] == 0.5
    assert after["centred"]["random"]["auroc"]["value"] == 1
    assert after["centred"]["hard"]["auroc"]["value"] == 1
    raw, centred = (after[way]["distribution"]["quantiles"] for way in ("raw", "centred"))
    # Raw, a pair of any kind is nearly the same direction.
    assert min(raw["mismatching"]) > 0.99
    assert min(centred["matching"]) > 0.5 > 0 > max(centred["mismatching"])


def test_a_subject_that_ignores_the_image_has_no_skill():
    found = matching.measure(Scripted(KNOWS, seeing=False), EXAMPLES, SETTINGS)
    for name in ("pmi", "yes_pmi"):
        for kind in ("random", "hard"):
            assert found["scores"][name][kind]["auroc"]["value"] == 0.5
    blind, seen = (found["scores"][name]["random"]["auroc"] for name in ("log_p_blind", "log_p"))
    assert blind == seen
    # The words alone give something away where the false captions are shorter.
    assert found["scores"]["log_p_blind"]["hard"]["win_rate"]["value"] == 0.0


def test_a_subject_that_is_wrong_at_random_has_chance_in_its_interval():
    rng = np.random.default_rng(0)
    examples = [example(n) for n in range(40)]
    knows = {
        e.image: examples[i].caption for e, i in zip(examples, rng.permutation(40), strict=True)
    }
    found = matching.measure(
        Scripted(knows), examples, matching.Settings(question="Fits? {caption}")
    )
    for name in ("pmi", "yes"):
        low, high = found["scores"][name]["random"]["auroc"]["interval"]
        assert low <= 0.5 <= high
    for name, score in found["scores"].items():
        low, high = score["random"]["sanity"]["interval"]
        assert low <= 0.5 <= high, name


def test_broken_images_are_named_and_left_out():
    subject = Scripted(KNOWS, bad=[Path("1.png")])
    found = matching.measure(subject, EXAMPLES, SETTINGS)
    assert found["images"] == 5
    assert found["problems"] == ["1.png: broken"]
    assert "1.png" not in [row["image"] for row in found["rows"]]
    assert found["scores"]["pmi"]["random"]["auroc"]["value"] == 1
    with pytest.raises(
        UserError, match=r"at least 2 images that can be read, got 1: 1\.png: broken"
    ):
        matching.measure(Scripted(KNOWS, bad=[e.image for e in EXAMPLES[1:]]), EXAMPLES, SETTINGS)


def test_another_picture_with_the_same_caption_is_no_mismatch():
    twin = Example(Path("twin.png"), EXAMPLES[0].caption.upper(), None, {}, ())
    examples = [EXAMPLES[0], twin, EXAMPLES[1]]
    knows = {e.image: e.caption for e in examples}
    found = matching.measure(Scripted(knows), examples, SETTINGS)
    assert [row["captions"].count(None) for row in found["rows"]] == [1, 2, 0]
    assert found["scores"]["log_p"]["random"]["pairs"] == 4


def test_without_hard_negatives_there_are_only_random_ones():
    found = matching.measure(Scripted(KNOWS), [example(n, hard=False) for n in range(6)], SETTINGS)
    assert found["hard"] == 0
    assert found["scores"]["log_p"]["hard"] is None
    assert found["layers"][0]["raw"]["hard"] is None


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        matching.Settings(others=0)
    with pytest.raises(UserError, match=r"'\{caption\}' in it, got 'Is it'"):
        matching.Settings(question="Is it")


@pytest.mark.parametrize("answer", [None, UserError("its layers cannot be listened to")])
def test_a_subject_that_does_not_show_its_states_is_measured_all_the_same(answer, monkeypatch):
    def states(self: Any, image: Any, texts: Sequence[str], prompt: str) -> Any:
        if answer is not None:
            raise answer
        return np.zeros((len(texts), 2, 3), np.float32), None

    monkeypatch.setattr(Scripted, "states", states)
    found = matching.measure(Scripted(KNOWS), EXAMPLES, SETTINGS)
    assert found["layers"] == []
    assert len(found["problems"]) == 1
    assert found["scores"]["log_p"]["random"]["auroc"]["value"] == 1
