"""report.json and report.html: the same numbers, and nothing fetched from elsewhere."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.evaluation import files, report, report_page
from agevlm_mlx.evaluation.benchmark import flatten
from agevlm_mlx.evaluation.charts import Line, line_chart, smooth
from agevlm_mlx.evaluation.gallery import Asked, Card

POPE = {
    "accuracy": 0.5,
    "f1": 0.6,
    "yes_ratio": 0.7,
    "shuffled_accuracy": 0.5,
    "blind_accuracy": 0.5,
}


def evaluation(adversarial: float) -> dict[str, Any]:
    metrics = {
        "pope": {
            "random": POPE,
            "popular": POPE,
            "adversarial": {**POPE, "accuracy": adversarial},
        },
        "matching_auroc": 0.9,
        "matching_auroc_hard": 0.7,
        "pointing_game": 0.8125,
        "energy_in_mask": 0.6,
        "uniform_energy": 0.0931,
        "chair_i": 0.25,
        "chair_s": 0.4,
        "recall": 0.5,
        "caption_f1": 0.55,
        "repeated_mentions": 0.1,
        "mentions_per_caption": 2.0,
    }
    return {
        "metrics": metrics,
        "intervals": {"pope.adversarial.accuracy": [adversarial - 0.05, adversarial + 0.05]},
        "seconds": 12.0,
        "model": {"path": "m", "fingerprint": "0123abcd", "parameters": 1000, "fusion": "cross"},
        "counts": {"images": 40},
        "settings": {"seed": 0},
    }


def answers(right: list[bool], mentions: list[str], truer: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n, correct in enumerate(right):
        label = n % 2 == 0
        image = f"{n // 2}.png"
        pope = {"question_id": n, "question": f"q{n}", "label": label, "image": image}
        margin = 1.0 if correct == label else -1.0
        rows.append({"task": "pope", "split": "adversarial", "margin": margin, **pope})
    for n in range(len(right) // 2):
        image = f"{n}.png"
        rows.append(
            {"task": "grounding", "image": image, "question": "q", "hit": n > 0, "energy": 0.5}
        )
        rows.append({"task": "caption", "image": image, "mentions": mentions, "objects": ["dog"]})
        rows.append(
            {
                "task": "matching",
                "image": image,
                "captions": ["a", "b", ""],
                "log_likelihood": [truer, 0.0, 0.0],
            }
        )
    return rows


@pytest.fixture
def comparison() -> dict[str, Any]:
    return report.assemble(
        {"concat": evaluation(0.55), "guided": evaluation(0.8)},
        {
            "concat": answers([True, False] * 20, ["dog", "cat"], -1.0),
            "guided": answers([True] * 40, ["dog"], 1.0),
        },
        {"concat": 100.5, "guided": 120.0},
        machine={"device": "CPU"},
        versions={"mlx": "1"},
        steps=[{"name": "scenes", "seconds": 3.0, "reused": True}],
        commands=["agevlm train --recipe <scenes>"],
    )


def test_report_json_has_what_was_promised(comparison):
    for arm in ("concat", "guided"):
        one = comparison["arms"][arm]
        for split in ("random", "popular", "adversarial"):
            assert set(report.POPE_KEYS) <= set(one["pope"][split])
        for key in (
            "matching_auroc",
            "pointing_game",
            "energy_in_mask",
            "chair_i",
            "train_seconds",
        ):
            assert isinstance(one[key], float)
    assert comparison["arms"]["guided"]["pope"]["adversarial"]["accuracy"] == 0.8
    assert comparison["arms"]["concat"]["train_seconds"] == 100.5
    assert json.loads(json.dumps(files.plain(comparison)))["schema"] == report.SCHEMA


def test_differences_are_guided_minus_concat_on_the_same_items(comparison):
    gap = comparison["difference"]
    # guided answers all 40 right, concat every second one
    assert gap["pope.adversarial.accuracy"][0] == pytest.approx(0.5)
    # guided never names the absent cat, concat in one of two mentions; both find the dog
    assert gap["chair_i"] == [pytest.approx(-0.5)] * 3
    assert gap["recall"] == [0, 0, 0]
    assert gap["caption_f1"] == [pytest.approx(1 - 2 / 3)] * 3
    assert gap["pointing_game"] == [0, 0, 0]
    # guided always prefers the true caption, concat never; nobody has a hard one
    assert gap["matching_auroc"] == [pytest.approx(1.0)] * 3
    assert "matching_auroc_hard" not in gap


def test_a_question_only_one_arm_answered_is_left_out_of_the_difference():
    both = answers([True] * 4, ["dog"], 1.0)
    gap = report.differences(both + answers([False] * 40, [], 0.0)[4:], both)
    assert gap["pope.adversarial.accuracy"][0] == 0


def test_a_model_that_says_nothing_has_no_hallucination_rate_to_compare():
    both = answers([True] * 4, [], 1.0)
    gap = report.differences(both, both)
    assert "chair_i" not in gap
    assert gap["recall"] == [0, 0, 0]


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
    assert adversarial.split()[1:4] == ["0.550", "0.800", "+0.500"]


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
