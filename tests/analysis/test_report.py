"""The page of an analysis: complete, self-contained, and saying what the numbers say."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from agevlm_mlx.analysis import figures, report
from agevlm_mlx.errors import UserError


@pytest.fixture(scope="module")
def page(analysed) -> str:
    return report.render(analysed.result(), analysed.captions)


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Drawing takes most of the time of a page."""
    monkeypatch.setattr(figures, "_svg", lambda *_: "<svg></svg>")


class Outline(HTMLParser):
    """Headings, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed out of turn"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if not {"style", "svg"} & set(self.open):
            self.text.append(data)


def text(page: str) -> str:
    return " ".join(" ".join(Outline(page).text).split())


def test_the_page_needs_nothing_else(page):
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))
    assert "<script" not in page
    assert "@import" not in page


def test_the_page_is_well_formed_and_its_figures_follow_its_colours(page):
    outline = Outline(page)
    assert outline.open == []
    assert "<!--" not in page
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(plots) == 6  # distributions, two by layer, attention, heads, causal test
    for plot in plots:
        ElementTree.fromstring(plot)
        assert "aria-label=" in plot
        assert not re.search(r"#0[1-8]0[1-8]\w\w\b", plot)  # stand-in colours
        assert "var(--" in plot
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_part_has_its_section_with_both_models(page):
    assert Outline(page).headings == [
        "In words",
        "Does it tell a matching caption from another?",
        "Where does it look?",
        "Does the answer hang on the thing?",
        "What this does not show",
        "How it was made",
    ]
    for name in ("concat", "cross"):
        assert text(page).count(name) > 20
    assert "nan" not in text(page).lower().split()
    assert "None" not in text(page)


def test_the_numbers_are_those_of_the_result(page, analysed):
    said = text(page)
    for model in analysed.whole["models"]:
        for score in model["matching"]["scores"].values():
            number = score["random"]["auroc"]
            low, high = number["interval"]
            assert f"{number['value']:.2f} {low:.2f} to {high:.2f}" in said
        energy = model["attention"]["measures"]["energy"]
        assert f"{energy['value']:.2f}" in said
        effect = model["causal"]["present"]["p_yes"]["blur"]["effect"]
        assert f"{effect['value']:.2f}".replace("-0.00", "0.00").replace("-", "−") in said  # noqa: RUF001
    for fact in ("scenes", "1.2.3", "agevlm analyze --data scenes", "models/cross"):
        assert fact in said


def test_baselines_that_a_model_makes_itself_are_its_own(analysed, monkeypatch):
    result = analysed.result()
    for n, model in enumerate(result["models"]):
        for name, baselines in (
            (name, found["baselines"]) for name, found in model["attention"]["measures"].items()
        ):
            if name in ("energy", "hit", "auroc", "iou_half"):
                baselines["shuffled"] = known(0.2 + 0.1 * n)
                baselines["image_only"] = known(0.4 + 0.1 * n)
    drawn = []
    monkeypatch.setattr(figures, "bars", lambda name, panels: drawn.append(panels) or "<svg></svg>")
    monkeypatch.setattr(figures, "_svg", lambda *_: "<svg></svg>")
    report.render(result, analysed.captions)
    for _, bars, _ in drawn[0]:
        values = [(bar.label, round(bar.number[0], 2)) for bar in bars if bar.model is None]
        assert values[:4] == [
            ("another phrase's map", 0.2),
            ("the picture's mean map", 0.4),
            ("another phrase's map", 0.3),
            ("the picture's mean map", 0.5),
        ]
        assert [label for label, _ in values[4:]] == ["even attention", "centre of the picture"]


def test_a_dollar_in_a_name_is_no_formula(analysed):
    result = analysed.result()
    name = r"a$1$b$\frac{c$#010101"
    result["models"][0]["about"]["path"] = f"runs/{name}"
    page = report.render(result, analysed.captions)
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert all(name in plot for plot in plots)


def test_control_characters_do_not_reach_the_page(analysed, no_figures):
    result = analysed.result()
    result["data"]["path"] = "a\x00b\x1bc\u202ed\udcff"
    assert "a\ufffdb\ufffdc\ufffdd?" in report.render(result, analysed.captions)


def test_each_row_says_what_guessing_gets(page, analysed):
    part = analysed.whole["models"][0]["matching"]
    for found in (part["scores"]["log_p"], part["layers"][-1]["raw"]):
        assert f"chance {found['random']['recall_at_1']['no_skill']:.2f}" in text(page)


def known(value: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.1, value + 0.1], "n": 9}


def test_sentences_are_made_from_the_numbers(analysed):
    result = analysed.result()
    model = result["models"][1]
    model["matching"]["scores"]["log_p"]["random"]["win_rate"] = known(0.87)
    model["matching"]["scores"]["log_p"]["hard"]["win_rate"] = known(0.6)
    for kind, value in (("matching", 0.7), ("mismatching", 0.2), ("hard", 0.5)):
        model["matching"]["p_yes"][kind] = known(value)
    model["matching"]["layers"][-1]["centred"]["random"]["auroc"] = known(0.55)
    model["attention"]["measures"]["hit"].update(known(0.8))
    model["attention"]["measures"]["hit"]["baselines"]["uniform"] = known(0.11)
    model["attention"]["measures"]["hit"]["baselines"]["centre"] = known(0.15)
    model["attention"]["measures"]["energy"].update(known(0.42))
    model["attention"]["measures"]["energy"]["baselines"]["uniform"] = known(0.11)
    change = model["causal"]["present"]["p_yes"]["mean colour"]
    change["change_object"], change["change_elsewhere"] = known(-0.5), known(-0.002)
    change["effect"] = known(-0.498)
    said = [line for line in report.sentences(result) if line.startswith("cross: ")]
    assert said == [
        "cross: It finds a picture's own caption more likely than another picture's in 87 of 100 "
        "pairs (77 to 97), and than the same caption with one noun exchanged in 60 (50 to 70); "
        "chance 50.",
        "cross: Asked whether the caption describes the picture, it says yes rather than no with "
        "probability "
        "70 % for its own, 20 % for another picture's and 50 % for one with a noun exchanged.",
        "cross: After its last layer the cosine between text and image states puts a matching "
        "pair above a mismatching one in 55 of 100 comparisons (45 to 65); chance 50.",
        "cross: Its attention peaks on the thing it is asked about in 80 of 100 cases (70 to 90); "
        "a random point in 11, the middle of the picture in 15. 42 % of its attention on the "
        "image lies on the thing, which covers 11 %.",
        "cross: Blanking the thing it is asked about changes its P(yes) by -50 points, blanking "
        "as much elsewhere by 0: the thing itself counts for -50 (-60 to -40).",
    ]


@pytest.mark.parametrize("part", ["matching", "attention", "causal"])
def test_a_part_that_was_not_asked_for_is_not_there(part, analysed, no_figures):
    result = analysed.result()
    for model in result["models"]:
        model[part] = None
    result["settings"]["only"].remove(part)
    headings = Outline(report.render(result, analysed.captions)).headings
    assert len(headings) == 5
    assert report.sentences(result)


def test_one_model_alone(analysed, no_figures):
    result = analysed.result()
    result["models"] = result["models"][:1]
    said = text(report.render(result, analysed.captions))
    assert "cross" not in said


def test_six_models_each_have_a_colour_and_room(analysed):
    result = analysed.result()
    result["models"] = [
        {**result["models"][0], "about": {**result["models"][0]["about"], "path": f"m/{n}"}}
        for n in range(figures.MODELS)
    ]
    page = report.render(result, analysed.captions)
    assert all(f"var(--m{n})" in page and f'class="m{n}"' in page for n in range(figures.MODELS))


def test_a_model_that_shows_no_attention_says_so_beside_one_that_does(analysed, no_figures):
    result = analysed.result()
    silent = result["models"][0]["attention"]
    silent.update(measures={}, sinks=None, layers=[], rows=[], kept=[], phrases=0, images=0)
    said = text(report.render(result, analysed.captions))
    assert "It does not show where it looks." in said
    assert "Where does it look?" in said
    del result["models"][1]
    headings = Outline(report.render(result, analysed.captions)).headings
    assert "Where does it look?" not in headings


def test_a_model_that_does_not_show_its_states(analysed):
    result = analysed.result()
    result["models"][0]["matching"]["layers"] = []
    page = report.render(result, analysed.captions)
    assert "Layer by layer" in page
    assert not [s for s in report.sentences(result) if s.startswith("concat") and "cosine" in s]
    del result["models"][1]
    assert "Layer by layer" not in report.render(result, analysed.captions)


def test_what_could_not_be_measured_leaves_a_dash(analysed):
    result = analysed.result()
    for model in result["models"]:
        for score in model["matching"]["scores"].values():
            score["hard"] = None
        for layer in model["matching"]["layers"]:
            for way in layer.values():
                way["hard"] = None
        model["matching"]["p_yes"]["hard"] = {"value": float("nan"), "interval": None}
        model["attention"]["measures"]["hit"]["best_head"] = None
        model["attention"]["sinks"] = None
        model["causal"]["present"]["p_yes"]["mean colour"]["effect"] = {"value": None}
        model["causal"]["absent"] = {}
    said = text(report.render(result, analysed.captions))
    assert "nan" not in said.split()
    assert "one for a noun exchanged" not in said
    assert "points of P(yes) lost" not in said


def test_names_are_text_and_are_told_apart(analysed, no_figures):
    result = analysed.result()
    result["models"][0]["about"]["path"] = "/a/<script>alert(1)</script>&/model"
    result["models"][1]["about"]["path"] = "/b/model/"
    result["data"]["path"] = "<b>x"
    captions = {path: "<i>caption</i>" for path in analysed.captions}
    page = report.render(result, captions)
    assert "<script" not in page
    assert "<i>caption" not in page
    assert "<b>x" not in page
    assert Outline(page).open == []
    assert {line.split(":")[0] for line in report.sentences(result)} == {
        "&/model".replace("&/", "script>&/"),
        "b/model",
    }


def test_the_same_result_gives_the_same_page(page, analysed):
    assert report.render(analysed.result(), analysed.captions) == page


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'agevlm-mlx\[analyze\]'"):
        figures.require()


@pytest.mark.browser
def test_the_page_in_a_browser_in_light_and_dark_and_on_a_phone(page, tmp_path: Path):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    from tests.app.browsing import launch

    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for scheme, width in (("light", 1120), ("dark", 1120), ("light", 390)):
            tab = browser.new_page(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,  # pyright: ignore[reportArgumentType]
            )
            said: list[str] = []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("request", lambda request, said=said: said.append(request.url))
            tab.goto((tmp_path / "report.html").as_uri())
            for summary in tab.locator("summary").all():
                summary.click()
            assert [line for line in said if not line.startswith(("data:", "file:"))] == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            violations = Axe().run(tab).response["violations"]
            serious = [v for v in violations if v["impact"] in ("serious", "critical")]
            assert not serious, [
                (v["id"], [n["html"][:90] for n in v["nodes"][:3]]) for v in serious
            ]
        browser.close()
