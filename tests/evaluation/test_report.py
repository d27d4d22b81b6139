"""report.json and report.html: the same numbers, and nothing fetched from elsewhere."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.benchmarks.scenes import BENCHMARK
from agevlm_mlx.evaluation import files, report, report_page, scoring
from agevlm_mlx.evaluation.answers import Row
from agevlm_mlx.evaluation.benchmark import flatten
from agevlm_mlx.evaluation.charts import Line, line_chart, smooth
from agevlm_mlx.evaluation.gallery import Asked, Card

SPLITS = ("random", "popular", "adversarial")


def rows(right: list[bool], caption: str, truer: float) -> list[Row]:
    """The answers of one arm; two questions, one caption and one noun to look for an image."""
    found: list[Row] = []

    def add(key: str, image: str, task: str, about: dict[str, Any], **rest: Any) -> None:
        row = {"key": key, "unit": image, "image": image, "prompt": "?", "label": "", "options": []}
        found.append(row | {"about": {"task": task, **about}} | rest)

    for n, correct in enumerate(right):
        label = n % 2 == 0
        margin = 1.0 if correct == label else -1.0
        for split in SPLITS:
            add(
                f"{split}:{n}", f"{n // 2}.png", "pope", {"split": split},
                kind="choice", label="yes" if label else "no", options=["yes", "no"],
                answer="Yes", scores=[margin, 0.0],
                shuffled_answer="Yes", shuffled_scores=[1.0, 0.0],
                blind_answer="No", blind_scores=[-1.0, 0.0],
            )  # fmt: skip
    for n in range(len(right) // 2):
        image, objects = f"{n}.png", {"objects": ["dog"], "nouns": ["dog", "cat"]}
        half = {"hit_half_heads": False, "energy_half_heads": 0.7}
        look = {
            "hit": n > 0,
            "near": True,
            "energy": 0.5,
            "uniform": 0.0931,
            "centre": 0.1,
            "centre_hit": False,
            "on_image": 0.9,
            **half,
        }
        add(f"look{n}", image, "grounding", {}, kind="look", phrase="dog", look=look)
        add(f"caption{n}", image, "caption", objects, kind="text", answer=caption)
        add(f"match{n}", image, "matching", {}, kind="likelihood",
            options=["true", "other", "hard"], scores=[truer, 0.0, 0.5])  # fmt: skip
    return found


ROWS = {
    "concat": rows([True, False] * 20, "A dog and a cat.", -1.0),
    "guided": rows([True] * 40, "A dog.", 1.0),
}


def evaluation(found: list[Row]) -> dict[str, Any]:
    """As ``agevlm evaluate`` writes it."""
    scored = scoring.score(BENCHMARK, found, scoring.units(found), 100, 0)
    return {
        "seconds": 12.0,
        "model": {"path": "m", "fingerprint": "0123abcd", "parameters": 1000, "fusion": "cross"},
        "counts": {"images": 20},
        "settings": {"seed": 0, "boots": 100},
        **scoring.report(scored),
    }


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    return report.assemble(
        BENCHMARK,
        {arm: evaluation(found) for arm, found in ROWS.items()},
        ROWS,
        {"concat": 100.5, "guided": 120.0},
        machine={"device": "CPU"},
        versions={"mlx": "1"},
        steps=[{"name": "scenes", "seconds": 3.0, "reused": True}],
        commands=["agevlm train --recipe <scenes>"],
    )


def test_report_json_has_what_was_promised(comparison):
    for arm in ("concat", "guided"):
        one = comparison["arms"][arm]
        for split in SPLITS:
            assert set(report.POPE_KEYS) <= set(one["pope"][split])
        for key in (
            "matching_auroc",
            "pointing_game",
            "energy_in_mask",
            "chair_i",
            "train_seconds",
        ):
            assert isinstance(one[key], float)
    assert comparison["arms"]["concat"]["train_seconds"] == 100.5
    assert json.loads(json.dumps(files.plain(comparison)))["schema"] == report.SCHEMA


def test_controls_and_both_ways_of_asking_stand_beside_their_number(comparison):
    guided = comparison["arms"]["guided"]["pope"]["adversarial"]
    assert guided["accuracy"] == 1.0
    assert guided["text_accuracy"] == 0.5  # in words it says yes to everything
    assert guided["shuffled_accuracy"] == guided["blind_accuracy"] == 0.5
    assert guided["constant_accuracy"] == 0.5
    assert guided["yes_ratio"] == 0.5
    intervals = comparison["arms"]["concat"]["intervals"]
    known = {"pope.random.accuracy", "pope.random.text_accuracy", "chair_i", "pointing_game"}
    assert known <= set(intervals)
    for name, (low, high) in intervals.items():
        assert low - 1e-9 <= flatten(comparison["arms"]["concat"])[name] <= high + 1e-9


def test_names_of_controls_are_those_of_the_report():
    names = {
        "logits.pope.random.accuracy": 1,
        "text.pope.random.accuracy": 2,
        "shuffled.logits.pope.random.accuracy": 3,
        "blind.logits.pope.random.accuracy": 4,
        "blind.logits.matching_auroc": 5,
        "blind.text.pope.random.accuracy": 6,
        "text.chair_i": 7,
        "constant.yes.pope.random.accuracy": 8,
    }
    assert report._plain(names) == {
        "pope.random.accuracy": 1,
        "pope.random.text_accuracy": 2,
        "pope.random.shuffled_accuracy": 3,
        "pope.random.blind_accuracy": 4,
        "chair_i": 7,
    }


def test_differences_are_guided_minus_concat_on_the_same_items(comparison):
    gap = comparison["difference"]
    # guided answers all 40 right, concat every second one
    assert gap["pope.adversarial.accuracy"][0] == pytest.approx(0.5)
    assert gap["pope.adversarial.text_accuracy"] == [0, 0, 0]
    # guided never names the absent cat, concat in one of two mentions; both find the dog
    assert gap["chair_i"] == [pytest.approx(-0.5)] * 3
    assert gap["recall"] == [0, 0, 0]
    assert gap["caption_f1"] == [pytest.approx(1 - 2 / 3)] * 3
    assert gap["pointing_game"] == [0, 0, 0]
    # guided always prefers the true caption, concat never
    assert gap["matching_auroc"] == gap["matching_auroc_hard"] == [pytest.approx(1.0)] * 3


def test_a_model_that_says_nothing_has_no_hallucination_rate_to_compare():
    found = dict.fromkeys(report.ARMS, rows([True] * 12, "", 1.0))
    evaluations = {arm: evaluation(one) for arm, one in found.items()}
    gap = report.assemble(BENCHMARK, evaluations, found, dict.fromkeys(report.ARMS, 1.0))
    assert "chair_i" not in gap["difference"]
    assert gap["difference"]["recall"] == [0, 0, 0]


CURVES = {
    arm: [
        {"step": s, "stage": "align" if s < 10 else "guide", "lm": 3.0 / s, "attention": 2.0 / s}
        for s in range(1, 21)
    ]
    + [{"step": 20, "stage": "guide", "val_lm": 0.3, "val_pointing": None}]
    for arm in ("concat", "guided")
}
TILE = Image.new("RGB", (24, 24), (10, 120, 200))


def card(caption: str = "A dog.") -> Card:
    both = {"concat": 0.1, "guided": 0.6}
    return Card(
        picture=TILE,
        overlays={arm: TILE for arm in both},
        noun="dog",
        energy=both,
        hit={"concat": False, "guided": True},
        uniform=0.1,
        questions=(Asked("Is there a dog?", True, {"concat": False, "guided": True}),),
        captions={"concat": caption, "guided": "A dog."},
        caption="A dog.",
    )


class Page(HTMLParser):
    """Collects addresses and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "path", "circle", "polyline", "br"):
            self.open.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_the_numbers_of_the_json_and_needs_no_network(comparison):
    html = report_page.render(comparison, CURVES, [card()])
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not re.search(r"@import|url\(|<script|<link|http-equiv", html)
    assert "<!--" not in html.replace("<!doctype", "")
    for arm in ("concat", "guided"):
        flat = flatten(comparison["arms"][arm])
        for _, measures in report_page._TABLE:
            for key, *_ in measures:
                assert f">{flat[key]:.3f}<" in html
    assert "+0.500" in html


def test_text_of_the_data_cannot_become_markup(comparison):
    html = report_page.render(comparison, CURVES, [card("<b>A</b> & a <script>")])
    assert "<script" not in html
    assert "&lt;b&gt;A&lt;/b&gt; &amp; a &lt;script&gt;" in html
    assert "--recipe &lt;scenes&gt;" in html


def test_summary_puts_both_arms_side_by_side(comparison):
    lines = report.summary(comparison).splitlines()
    assert lines[0].split() == ["concat", "guided"]
    adversarial = next(line for line in lines if line.startswith("pope.adversarial.accuracy"))
    assert adversarial.split()[1:4] == ["0.500", "1.000", "+0.500"]


def test_a_chart_marks_stages_and_survives_missing_values():
    line = Line("guided", "guided", [(1, 2.0), (5, float("nan")), (10, 1.0)])
    svg = line_chart("Loss", [line, Line("none", "concat", [])], marks=[(5, "guide")])
    assert "guide</text>" in svg
    assert "nan" not in svg
    assert svg.count("<polyline") == 1
    assert "not recorded" in line_chart("Attention", [Line("x", "x", [])])
    assert "<circle" in line_chart("One", [Line("x", "x", [(3, 0.5)])])
    assert "<polyline" in line_chart("Flat", [Line("x", "x", [(1, 0.5), (2, 0.5)])])


def test_a_logarithmic_chart_has_round_ticks_around_its_values():
    line = Line("x", "x", [(1, 7.5), (2, 0.3), (3, 0.0)])
    svg = line_chart("Loss", [line], log=True, span=(0, 10))
    ticks = re.findall(r'text-anchor="end">([\d.]+)</text>', svg)
    assert ticks == ["0.2", "0.5", "1", "2", "5", "10"]
    (points,) = re.findall(r'points="([^"]+)"', svg)
    assert len(points.split()) == 2  # no logarithm of zero
    high, low = (float(point.split(",")[1]) for point in points.split())
    assert high < low
    assert "<polyline" in line_chart("Flat", [Line("x", "x", [(1, 1.0), (2, 1.0)])], log=True)


def test_smoothing_keeps_the_mean_of_a_line_and_its_ends():
    line = [(float(x), 2.0 * x) for x in range(9)]
    assert np.allclose(smooth(line, 3)[1:-1], line[1:-1])
    assert smooth(line, 1) == line
    noisy = [(float(x), float(x % 2)) for x in range(50)]
    assert max(abs(y - 0.5) for _, y in smooth(noisy, 10)[10:-10]) < 0.06
