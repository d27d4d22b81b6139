"""The tab's HTML as a reader of the page, or of its accessibility tree, gets it."""

import base64
import io
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.evaluation.grounding import NOT_GROUNDED
from agevlm_mlx.evaluation.presence import Examined, Match, Presence, Wanted
from app import presence

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 120, 3), np.uint8))
VOID = ("img", "br")


class Page(HTMLParser):
    """Tags with their attributes and texts; an element that is not closed fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found[-1][2].append(data)

    def of(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        wanted = attributes.items()
        return [
            (found, "".join(text))
            for name, found, text in self.found
            if name == tag and all(found.get(key) == value for key, value in wanted)
        ]


@pytest.fixture
def row() -> Callable[..., Presence]:
    """``row(word, p_yes, blind, peak=(row, column), spread=...)`` on a 4 x 4 grid, of which the
    picture, twice as wide as high, fills the two middle rows."""

    def build(
        word: str = "dog",
        p_yes: float = 0.93,
        blind: float = 0.12,
        peak: tuple[int, int] = (1, 0),
        spread: float = 0.0,
    ) -> Presence:
        look = np.full((4, 4), spread / 16, np.float32)
        look[peak] += 1 - spread
        geometry = Preprocessor(image_size=16).geometry(*PICTURE.size)
        return Presence(word, f"Is there a {word}?", p_yes, blind, look, geometry)

    return build


def examined(rows: list[Presence], match: Match | None, left_out: int = 0) -> Examined:
    words = tuple(row.word for row in rows)
    return Examined(Wanted(words, "A dog.", left_out), tuple(rows), match)


MATCH = Match("A dog.", -0.25, -1.08, (-1.5, -0.9, -0.2, -2.0))


def test_a_row_says_its_numbers(row):
    page = Page(presence.table(examined([row(), row("cat", 0.002, 0.9999)], MATCH), PICTURE))
    heads = [text for _, text in page.of("th", scope="col")]
    assert heads == ["Word", "P(yes)", "without the picture", "Grounding", "Where it looked"]
    assert [text for _, text in page.of("th", scope="row")][:2] == ["dog", "cat"]
    numbers = [text for _, text in page.of("span", **{"class": "number"})]
    assert numbers == ["93 %", "1.00", "< 1 %", "1.00"]
    assert [text for _, text in page.of("td", **{"class": "number"})][:2] == ["12 %", "> 99 %"]
    bars = [bar["style"] for bar, _ in page.of("span", **{"class": "bar"})]
    assert bars == ["--p: 0.9300; --blind: 0.1200", "--p: 0.0020; --blind: 0.9999"]
    assert all(bar["aria-hidden"] == "true" for bar, _ in page.of("span", **{"class": "bar"}))
    assert len(page.of("caption")) == 2
    assert all(text for _, text in page.of("caption"))


def test_the_thumbnail_and_its_text_say_where_the_peak_is(row):
    # Second row of the grid, last column: the upper half of the picture, at its right.
    (image,) = Page(presence.table(examined([row(peak=(1, 3))], None), PICTURE)).of("img")
    alt = image[0]["alt"] or ""
    assert "dog" in alt
    assert "upper right" in alt
    x, y = map(int, re.findall(r"(\d+) %", alt))
    assert abs(x - 87.5) <= 1
    assert abs(y - 25) <= 1
    kind, data = image[0]["src"].split(",")
    assert kind == "data:image/jpeg;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (int(image[0]["width"]), int(image[0]["height"])) == (192, 96)
    light = np.asarray(shown.convert("L"), float)
    assert light[10:40, 150:186].mean() > light[:, :96].mean() + 20


def test_below_the_threshold_it_says_so(row):
    spread = next(s for s in np.linspace(0, 1, 1001) if row(spread=s).grounding < NOT_GROUNDED)
    low, high = row(spread=spread), row("cat", spread=spread - 0.005)
    assert low.grounding < NOT_GROUNDED <= high.grounding
    page = Page(presence.table(examined([low, high], None), PICTURE))
    numbers = [text for _, text in page.of("span", **{"class": "number"})]
    assert float(numbers[1]) < NOT_GROUNDED <= float(numbers[3])  # also as it is written
    assert [text for _, text in page.of("span", **{"class": "weak"})] == ["not grounded"]


def test_the_verdict_in_words():
    assert presence.verdict(MATCH) == (
        "This picture makes the sentence 0.83 nats per token likelier than no picture does, and "
        "it fits better than 3 of 4 other pictures."
    )
    assert "0.50 nats per token less likely than" in presence.verdict(
        Match("A dog.", -1.5, -1.0, (-1.0,) * 8)
    )
    same = presence.verdict(Match("A dog.", -1.001, -1.0, (-1.0,) * 8))
    assert "neither likelier nor less likely than no picture" in same
    assert same.endswith("better than 0 of 8 other pictures.")
    assert "no number" in presence.verdict(Match("A dog.", math.nan, -1.0, (-1.0,)))


def test_the_match_has_its_numbers_and_what_they_prove(row):
    page = Page(presence.table(examined([row()], MATCH), PICTURE))
    numbers = [text for _, text in page.of("td", **{"class": "number"})]
    assert numbers[1:] == ["−0.25", "−1.08", "−1.15"]  # noqa: RUF001 the sign of the page
    assert page.of("blockquote") == [({}, "A dog.")]
    told = presence.table(examined([row()], MATCH), PICTURE)
    assert "not that every word is true" in told
    assert "not calibrated" in told


def test_on_the_way_it_says_how_far_it_is(row):
    wanted = Wanted(("dog", "cat", "bus"), "A dog, a cat and a bus.")
    page = Page(presence.table(Examined(wanted), PICTURE))
    assert page.of("p", **{"class": "progress"})[0][1] == "0 of 3 words asked …"
    assert not page.of("table")
    page = Page(presence.table(Examined(wanted, (row(),)), PICTURE))
    assert page.of("p", **{"class": "progress"})[0][1] == "1 of 3 words asked …"
    assert len(page.of("img")) == 1
    assert not page.of("p", **{"class": "verdict"})


@pytest.mark.parametrize(("left_out", "told"), [(1, "1 more word left"), (3, "3 more words left")])
def test_words_left_out_are_counted(row, left_out, told):
    html = presence.table(examined([row()], MATCH, left_out), PICTURE)
    assert told in html
    assert "more word" not in presence.table(examined([row()], MATCH), PICTURE)


def test_every_text_is_escaped(row):
    evil = "<img src=x onerror=alert(1)>' \" &amp;"
    match = Match(evil, -1.0, -2.0, (-3.0,))
    html = presence.table(examined([row(evil)], match), PICTURE)
    page = Page(html)
    assert [found["src"][:10] for found, _ in page.of("img")] == ["data:image"]
    assert "onerror" not in {key for _, found, _ in page.found for key in found}
    assert page.of("th", scope="row")[0][1] == evil
    assert page.of("blockquote")[0][1] == evil
    assert evil in page.of("img")[0][0]["alt"]


def test_a_model_that_overflowed_gives_no_number(row):
    broken = row("dog", math.nan, 0.5)
    broken.look[:] = np.nan
    match = Match("A dog.", math.nan, math.nan, (math.nan,))
    page = Page(presence.table(examined([broken], match), PICTURE))
    assert [text for _, text in page.of("span", **{"class": "number"})] == ["no number"] * 2
    assert not page.of("span", **{"class": "bar"})
    assert not page.of("img")


def test_styles_stay_within_the_tab():
    css = re.sub(r"/\*.*?\*/", "", presence.style(), flags=re.DOTALL)
    selectors = [s for s in re.findall(r"([^{}]+)\{", css) if not s.strip().startswith("@media")]
    assert len(selectors) > 10
    for selector in selectors:
        for part in selector.split(","):
            assert re.match(r"(\.dark )?\.presence\b", part.strip()), part
    used = set(re.findall(r"\.([a-z-]+)", "".join(selectors))) - {"dark"}
    with open(presence.__file__, encoding="utf-8") as file:
        source = file.read()
    assert all(re.search(rf"class='{name}'", source) for name in used), used
