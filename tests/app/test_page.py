"""The page component in a real browser, without Gradio and without a model.

A fake host answers as the session does; what the page asks it and sends it is recorded.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from app import export

pytestmark = pytest.mark.browser

#: A frame like Gradio's: its variables where the page stands in it, and styles that get in the way.
_FRAME = """
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Page</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { margin: 0; padding: 12px; background: #ffffff; }
body.dark { background: #111318; color: #f3f4f6; --body-text-color: #f3f4f6;
  --background-fill-primary: #111318; --background-fill-secondary: #1d2027;
  --border-color-primary: #3f4452; }
button, input, select { all: revert; border: 3px solid red; padding: 20px; min-width: 90px; }
%s</style></head><body><main><h1>Page</h1><div class="looking"></div></main></body></html>
"""
_HOST = """
window.asked = []; window.sent = []; window.files = []; window.failing = false;
window.held = null; // or the answers that wait until release()
window.hold = () => { window.held = []; };
window.release = () => { for (const go of window.held) go(); window.held = null; };
const answer = async (value) => {
  if (window.held) await new Promise((resolve) => window.held.push(resolve));
  return structuredClone(value);
};
window.host = {
  live: true,
  looks: async (query) => {
    window.asked.push(query);
    if (window.failing === "undefined") return undefined; // what Gradio makes of an exception
    if (window.failing === "sentence") return {error: "The conversation is closed."};
    if (window.failing) throw new Error("no");
    const found = await answer(window.known.looks[query.exchange]);
    if (window.thinned) return found; // of an old answer only the mean is kept
    found.layer = query.layer == null ? null : [3, 7, 11][query.layer];
    found.head = query.head;
    if (query.layer != null || query.head != null)
      for (const word of found.words)
        word.layers = word.layers.map((src) => src && `${src}#${query.layer},${query.head}`);
    return found;
  },
  pictures: async (ids) => {
    window.files.push(...ids);
    if (window.failing === "sentence") return {error: "The conversation is closed."};
    return answer(ids.map((id) => window.known.pictures[id]));
  },
  download: async (format) => ({name: `kept.${format}`, text: `as ${format}`}),
  send: (event, data) => window.sent.push([event, data]),
};
window.view = looking(document.querySelector(".looking"), window.host);
"""


def png(colour: tuple[int, int, int, int], size: tuple[int, int] = (4, 4)) -> str:
    file = io.BytesIO()
    Image.new("RGBA", size, colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


PICTURES = {
    "p-0": {"id": "p-0", "name": "kitchen.png", "width": 400, "height": 300},
    "p-1": {"id": "p-1", "name": "<img src=x onerror=boom()>.png", "width": 200, "height": 400},
    "e0": {"id": "e0", "name": "example", "width": 64, "height": 64},
}
for _n, _picture in enumerate(PICTURES.values()):
    _picture["src"] = png((40 * _n, 90, 120, 255), (_picture["width"], _picture["height"]))

GROUNDING = {"dog": 0.41, "house": 0.6, "cat": 0.05, "ghost": 0.1, "is": 0.01}


def words(text: str, role: str, pictures: int = 1) -> list[dict[str, Any]]:
    """A look for every word; the peak goes down the picture from word to word."""
    found = []
    for n, match in enumerate(re.finditer(r"\w+", text)):
        word = match.group()
        layers: list[str | None] = [png((n % 256, n // 256, m, 200)) for m in range(pictures)]
        y = 0.1 + 0.2 * (n % 5)
        peak = {"picture": pictures - 1, "x": 0.2, "y": y}
        found.append(
            {"role": role, "start": match.start(), "end": match.end(), "text": word}
            | {"names": len(word) > 2, "grounding": GROUNDING.get(word.lower(), 0.5)}
            | {"on_image": 0.83, "layers": layers}
            | {"peak": peak | {"box": [0.1, y - 0.1, 0.3, y + 0.1]}}
        )
    return found


def looks(exchange: dict[str, Any], pictures: tuple[str, ...] = ("p-0",)) -> dict[str, Any]:
    n = len(pictures)
    found = words(exchange["question"], "user", n) + words(exchange["answer"], "assistant", n)
    return {
        "exchange": exchange["id"],
        "pictures": list(pictures),
        "note": None,
        "words": found,
    } | {"threshold": 0.2}


def exchange(number: int, question: str, answer: str = "", **more: Any) -> dict[str, Any]:
    stats = {"image_ms": 12.3, "images_seen": 1, "images_known": 0, "first_ms": 41.2, "tokens": 9}
    stats |= {"tokens_per_second": 210.4, "image_bytes": 393216, "finish": "stop"}
    base = {"id": number, "question": question, "answer": answer, "pictures": [], "notes": []}
    base |= {"state": "done", "ahead": 0, "error": None, "model": "tiny", "stats": stats}
    return base | more


def state(*exchanges: dict[str, Any], **more: Any) -> dict[str, Any]:
    model = {"name": "tiny", "layers": [3, 7, 11], "heads": 2}
    base = {"key": "k", "busy": False, "model": model, "exchanges": list(exchanges)}
    return base | {"examples": [{"id": "e0", "question": "Is there a dog?"}]} | more


@dataclass
class Shown:
    """The component in a page, and what has happened there."""

    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def show(self, told: dict[str, Any], **known: dict[str, Any]) -> None:
        """known: looks by "x" + the exchange's number; by default those of every word."""
        made = {str(e["id"]): looks(e) for e in told["exchanges"]}
        made |= {name[1:]: value for name, value in known.items()}
        self.page.evaluate("looks => { known.looks = {...known.looks, ...looks}; }", made)
        self.page.evaluate("state => view.update(state)", told)

    def turn(self, number: int) -> Locator:
        return self.page.locator(f".turns > .exchange[data-id='{number}']")

    def word(self, text: str, number: int = 1, part: str = ".answered") -> Locator:
        return self.turn(number).locator(part).locator(".word").get_by_text(text, exact=True)

    def heat(self, picture: str = "p-0") -> Locator:
        return self.page.locator(f"figure[data-id='{picture}'] > img.heat")

    @property
    def caption(self) -> Locator:
        return self.page.locator(".stage .caption")

    def log(self, name: str) -> Any:
        return self.page.evaluate(f"window.{name}")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Shown]]:
    """Opens a page that can reach nothing; no error and no request may come of it."""
    opened: list[tuple[Any, Shown]] = []

    def make(html: str | None = None, address: str | None = None, **options: Any) -> Shown:
        chosen = {"viewport": {"width": 1200, "height": 850}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**chosen)
        context.set_default_timeout(10_000)
        shown = Shown(context.new_page())

        def route(asked: Any) -> None:
            if asked.request.url == address:
                asked.continue_()
            else:
                shown.requests.append(asked.request.url)
                asked.abort()

        context.route("**/*", route)
        errors = shown.errors
        shown.page.on("pageerror", lambda error: errors.append(str(error)))
        shown.page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        if address:
            shown.page.goto(address)
        else:
            shown.page.set_content(html or _FRAME % export.style())
        opened.append((context, shown))
        return shown

    yield make
    for context, shown in opened:
        context.close()
        assert shown.requests == []
        assert shown.errors == []


@pytest.fixture
def open_live(open_page: Callable[..., Shown]) -> Callable[..., Shown]:
    """The component with the fake host."""

    def make(**options: Any) -> Shown:
        shown = open_page(**options)
        known = json.dumps({"pictures": PICTURES, "looks": {}})
        shown.page.evaluate(f"() => {{ window.known = {known};\n{export.script()}\n{_HOST} }}")
        return shown

    return make


@pytest.fixture
def shown(open_live: Callable[..., Shown]) -> Shown:
    return open_live()


FIRST = exchange(1, "Where is the dog?", "The dog is near a house, not a ghost.", pictures=["p-0"])


def clear(shown: Shown) -> None:
    """The pointer away from every word."""
    shown.page.mouse.move(2, 2)


# --- an answer grows -----------------------------------------------------------------------------


def test_an_answer_from_waiting_to_words(shown):
    waiting = FIRST | {"state": "waiting", "ahead": 2, "answer": "", "stats": None}
    shown.show(state(waiting, busy=True))
    turn = shown.turn(1)
    expect(turn).to_contain_text("2 questions before yours")
    shown.show(state(waiting | {"state": "reading", "ahead": 0}, busy=True))
    expect(turn).to_contain_text("Looking at the picture")
    shown.show(state(waiting | {"state": "answering", "answer": "The do"}, busy=True))
    expect(turn.locator(".answered")).to_have_text("The do")
    expect(turn).to_have_attribute("data-state", "answering")
    assert shown.log("asked") == []
    node = turn.element_handle()
    shown.show(state(FIRST))
    expect(shown.word("dog")).to_be_visible()
    expect(turn.locator(".answered")).to_have_text(FIRST["answer"])
    expect(turn.locator(".asked")).to_have_text(FIRST["question"])
    expect(turn.locator(".progress")).to_be_hidden()
    assert node.evaluate("node => node.isConnected"), "the exchange was built anew"
    assert shown.log("asked") == [{"exchange": 1, "layer": None, "head": None}]
    expect(turn.locator(".thumbs img")).to_have_attribute("alt", "kitchen.png")


def test_the_same_state_again_touches_nothing(shown):
    shown.show(state(FIRST, exchange(2, "And the house?", "Yes.")))
    expect(shown.word("Yes", 2)).to_be_visible()
    expect(shown.page.locator("figure img.plain")).to_be_visible()
    shown.page.evaluate(
        """() => {
          window.changes = [];
          const note = (all) => changes.push(...all.map((one) => one.target.className));
          const everything = {subtree: true, childList: true, characterData: true};
          new MutationObserver(note).observe(document.querySelector(".looking"), everything);
        }"""
    )
    shown.show(state(FIRST, exchange(2, "And the house?", "Yes.")))
    shown.page.wait_for_timeout(50)
    assert shown.log("changes") == []
    assert len(shown.log("asked")) == 2
    assert sorted(shown.log("files")) == ["p-0"]


def test_exchanges_that_are_gone_or_changed(shown):
    shown.show(state(FIRST, exchange(2, "And a cat?", "No cat.")))
    shown.word("cat", 2).click()
    expect(shown.caption).to_contain_text("cat (answered)")
    edited = FIRST | {"question": "Where is the ghost?", "answer": "No ghost."}
    shown.show(state(edited))
    expect(shown.turn(2)).to_have_count(0)
    expect(shown.word("ghost", 1, ".asked")).to_be_visible()
    expect(shown.heat()).to_be_hidden()
    assert len(shown.log("asked")) == 3, "the edited exchange has words of its own"


def test_what_an_answer_took(shown):
    known = FIRST["stats"] | {"images_seen": 0, "images_known": 1, "image_ms": 0}
    cut = FIRST["stats"] | {"finish": "length", "first_ms": 1234.5, "image_bytes": 31_000_000}
    shown.show(
        state(
            FIRST,
            exchange(2, "And?", "Yes", stats=known),
            exchange(3, "And?", "Yes", stats=cut, model="other"),
            exchange(4, "And?", "Y", state="stopped"),
        )
    )
    stats = shown.page.locator(".stats")
    expect(stats.nth(0)).to_have_text(
        "first word after 41 ms · image seen in 12 ms · 210 tokens/s · 9 tokens · "
        "image memory 0.4 MB · tiny"
    )
    expect(stats.nth(1)).to_contain_text("image already seen: 0 ms")
    expect(stats.nth(2)).to_contain_text("first word after 1.2 s")
    expect(stats.nth(2)).to_contain_text("image memory 31.0 MB · other")
    expect(shown.turn(3).locator(".mark")).to_contain_text("cut off")
    expect(shown.turn(4).locator(".mark")).to_have_text("stopped")
    expect(shown.turn(1).locator(".mark")).to_be_hidden()


def test_a_failed_exchange_and_notes(shown):
    told = "photo.jpg: expected a picture, got a text; send a PNG or JPEG"
    failed = exchange(
        1, "What?", state="failed", error=told, notes=["big.jpg: reduced"], stats=None
    )
    shown.show(state(failed))
    expect(shown.page.get_by_role("alert")).to_have_text(told)
    expect(shown.turn(1).locator(".note").first).to_have_text("big.jpg: reduced")
    assert shown.log("asked") == []


# --- words and where they looked -----------------------------------------------------------------


def test_hover_shows_click_keeps_escape_lets_go(shown):
    shown.show(state(FIRST))
    dog, house = shown.word("dog"), shown.word("house")
    dog.hover()
    expect(shown.heat()).to_be_visible()
    expect(shown.heat()).to_have_css("opacity", "0.75")
    over_dog = shown.heat().get_attribute("src")
    expect(shown.caption).to_have_text(
        "dog (answered): grounding 0.41; 83 % of its attention on the picture; "
        "strongest in the upper left"
    )
    clear(shown)
    expect(shown.heat()).to_be_hidden()
    dog.click()
    expect(dog).to_have_attribute("aria-pressed", "true")
    house.hover()
    assert shown.heat().get_attribute("src") != over_dog
    clear(shown)
    expect(shown.heat()).to_have_attribute("src", over_dog)
    shown.show(state(FIRST, busy=True))
    expect(dog).to_have_attribute("aria-pressed", "true")
    house.click()
    expect(dog).to_have_attribute("aria-pressed", "false")
    shown.page.keyboard.press("Escape")
    expect(shown.heat()).to_be_hidden()
    expect(shown.page.locator(".word[aria-pressed='true']")).to_have_count(0)
    house.click()
    house.click()
    expect(house).to_have_attribute("aria-pressed", "false")


def test_the_peak_stands_where_the_word_looked(shown):
    shown.show(state(FIRST))
    shown.word("dog").click()
    picture = shown.page.locator("img.plain").bounding_box()
    map_box, peak = shown.heat().bounding_box(), shown.page.locator(".peak").bounding_box()
    assert picture
    assert peak
    for side in ("x", "y", "width", "height"):
        assert map_box[side] == pytest.approx(picture[side], abs=0.5)
    assert picture["width"] / picture["height"] == pytest.approx(4 / 3, abs=0.01)
    assert peak["x"] - picture["x"] == pytest.approx(0.1 * picture["width"], abs=1)
    assert peak["y"] - picture["y"] == pytest.approx(0.2 * picture["height"], abs=1)
    assert peak["width"] == pytest.approx(0.2 * picture["width"], abs=1)


def test_a_word_with_the_keyboard(shown):
    shown.show(state(FIRST, exchange(2, "And?", "Yes, a house")))
    expect(shown.word("house", 2)).to_be_visible()
    texts = shown.page.locator(".asked, .answered")
    for n in range(4):
        expect(texts.nth(n).locator(".word[tabindex='0']")).to_have_count(1)
    shown.page.locator(".log").focus()
    shown.page.keyboard.press("Tab")
    expect(shown.word("Where", 1, ".asked")).to_be_focused()
    expect(shown.caption).to_contain_text("Where (asked)")
    for key, word in [("ArrowRight", "is"), ("End", "dog"), ("ArrowRight", "dog"),
                      ("ArrowLeft", "the"), ("Home", "Where"), ("ArrowLeft", "Where")]:  # fmt: skip
        shown.page.keyboard.press(key)
        expect(shown.word(word, 1, ".asked")).to_be_focused()
    shown.page.keyboard.press("End")
    shown.page.keyboard.press("Enter")
    expect(shown.word("dog", 1, ".asked")).to_have_attribute("aria-pressed", "true")
    shown.page.keyboard.press("Home")
    expect(shown.caption).to_contain_text("Where (asked)")
    shown.page.keyboard.press("Tab")
    expect(shown.word("The")).to_be_focused()
    expect(shown.caption).to_contain_text("The (answered)")
    shown.page.keyboard.press("Escape")
    expect(shown.heat()).to_be_hidden()
    expect(shown.word("The")).to_be_focused()


def test_up_and_down_go_to_the_word_above_or_below(shown):
    long = " ".join(f"word{n}" for n in range(40))
    shown.show(state(exchange(1, "What?", long)))
    shown.word("word2").focus()
    shown.page.keyboard.press("ArrowDown")
    first = shown.word("word2").bounding_box()
    below = shown.page.locator(".word:focus").bounding_box()
    assert first is not None
    assert below is not None
    assert below["y"] > first["y"]
    assert abs(below["x"] - first["x"]) < 50
    shown.page.keyboard.press("ArrowUp")
    expect(shown.word("word2")).to_be_focused()
    shown.page.keyboard.press("ArrowUp")
    expect(shown.word("word2")).to_be_focused()


def test_words_that_are_not_grounded(shown):
    shown.show(state(FIRST))
    ghost = shown.word("ghost")
    expect(ghost).to_have_class(re.compile(r"\bungrounded\b"))
    expect(shown.word("dog")).not_to_have_class(re.compile("ungrounded"))
    # "is" scores lower still, but names nothing.
    expect(shown.word("is")).not_to_have_class(re.compile("ungrounded"))
    expect(ghost).to_have_accessible_description(re.compile("not grounded"))
    expect(ghost).to_have_css("text-decoration-style", "wavy")
    ghost.hover()
    expect(shown.caption).to_contain_text("grounding 0.10, not grounded")
    threshold = shown.page.locator("input.threshold")
    expect(threshold).to_have_value("0.2")
    threshold.fill("0.5")
    expect(shown.word("dog")).to_have_class(re.compile(r"\bungrounded\b"))
    expect(shown.word("house")).not_to_have_class(re.compile("ungrounded"))
    threshold.fill("0")
    expect(shown.page.locator(".ungrounded")).to_have_count(0)
    shown.show(state(FIRST, exchange(2, "And?", "A ghost")))
    expect(shown.word("ghost", 2)).to_be_visible()
    expect(shown.page.locator(".ungrounded")).to_have_count(0)


def test_the_legend_tells_what_was_measured(shown):
    about = "Measured: 8 of 10 <b>absent</b> things are underlined."
    shown.show(state(FIRST), x1=looks(FIRST) | {"about": about})
    shown.page.locator(".legend summary").click()
    expect(shown.page.locator(".legend .about")).to_have_text(about)
    expect(shown.page.locator(".legend")).to_contain_text("does not show why it answered so")


def test_opacity(shown):
    shown.show(state(FIRST))
    shown.word("dog").click()
    shown.page.locator("input.opacity").fill("0.3")
    expect(shown.heat()).to_have_css("opacity", "0.3")


def test_another_layer_or_head_is_asked_for_once(shown):
    shown.show(state(FIRST))
    shown.word("dog").click()
    layer = shown.page.locator("select.layer")
    expect(layer.locator("option")).to_have_text(
        ["mean of all layers", "layer 3", "layer 7", "layer 11"]
    )
    layer.select_option("layer 7")
    expect(shown.heat()).to_have_attribute("src", re.compile("#1,null$"))
    expect(shown.caption).to_contain_text("dog (answered), layer 7:")
    shown.page.locator("select.head").select_option("head 2")
    expect(shown.heat()).to_have_attribute("src", re.compile("#1,1$"))
    layer.select_option("mean of all layers")
    expect(shown.heat()).to_have_attribute("src", re.compile("#null,1$"))
    shown.page.locator("select.head").select_option("mean of all heads")
    expect(shown.heat()).not_to_have_attribute("src", re.compile("#"))
    layer.select_option("layer 7")
    expect(shown.heat()).to_have_attribute("src", re.compile("#1,null$"))
    asked = [(query["layer"], query["head"]) for query in shown.log("asked")]
    assert asked == [(None, None), (1, None), (1, 1), (None, 1)]
    # Words and underlines stay those of the mean.
    expect(shown.word("dog")).to_have_attribute("aria-pressed", "true")


def test_the_mean_is_not_called_a_layer(shown):
    shown.show(state(FIRST))
    shown.page.evaluate("window.thinned = true")
    shown.word("dog").click()
    shown.page.locator("select.layer").select_option("layer 7")
    expect(shown.caption).to_contain_text("dog (answered), mean of all layers:")


def test_an_answer_can_be_checked(shown):
    shown.show(state(FIRST))
    shown.word("dog").click()
    shown.page.locator("button.check").click()
    assert shown.log("sent") == [["check", {"exchange": 1}]]


def test_a_late_answer_belongs_to_what_is_chosen_now(shown):
    shown.show(state(FIRST))
    shown.word("dog").click()
    shown.page.evaluate("hold()")
    shown.page.locator("select.layer").select_option("layer 3")
    expect(shown.caption).to_contain_text("Reading where it looked")
    expect(shown.heat()).to_be_hidden()
    shown.page.locator("select.layer").select_option("mean of all layers")
    expect(shown.heat()).to_be_visible()
    shown.page.evaluate("release()")
    shown.page.wait_for_timeout(50)
    expect(shown.heat()).not_to_have_attribute("src", re.compile("#"))


def test_a_late_answer_about_an_edited_question_is_dropped(shown):
    shown.page.evaluate("hold()")
    shown.show(state(FIRST))
    shown.page.wait_for_function("held.length > 0")
    edited = FIRST | {"question": "And a cat?", "answer": "No cat"}
    shown.show(state(edited))
    shown.page.evaluate("release()")
    expect(shown.word("cat")).to_be_visible()
    expect(shown.turn(1).locator(".answered")).to_have_text("No cat")
    expect(shown.turn(1).locator(".word")).to_have_count(5)


@pytest.mark.parametrize("how", ["thrown", "undefined", "sentence"])
def test_a_failed_pull_can_be_tried_again(shown, how):
    shown.page.evaluate("how => { window.failing = how; }", how)
    shown.show(state(FIRST))
    again = shown.turn(1).get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    told = "conversation is closed" if how == "sentence" else "could not be read where"
    expect(shown.turn(1).locator(".pull")).to_contain_text(told)
    expect(shown.turn(1).locator(".answered")).to_have_text(FIRST["answer"])
    shown.page.evaluate("window.failing = false")
    again.click()
    expect(shown.word("dog")).to_be_visible()
    expect(again).to_be_hidden()
    expect(shown.page.locator("figure img.plain")).to_be_visible()


def test_no_maps_for_a_reason(shown):
    why = "a model with fusion 'concat' can show only images of the first message"
    shown.show(state(FIRST), x1=looks(FIRST) | {"words": [], "note": why})
    expect(shown.turn(1).locator(".note").first).to_have_text(why)
    expect(shown.turn(1).locator(".answered")).to_have_text(FIRST["answer"])


def test_several_pictures_and_the_strongest(shown):
    both = exchange(2, "The same dog?", "Yes, the dog", pictures=["p-1"])
    second = looks(both, ("p-0", "p-1"))
    second["words"][-1]["layers"][0] = None
    shown.show(state(FIRST, both), x2=second)
    shown.word("dog", 2).click()
    expect(shown.page.locator("figure .name")).to_have_text(
        ["1. kitchen.png", "2. <img src=x onerror=boom()>.png"]
    )
    expect(shown.heat("p-0")).to_be_hidden()
    expect(shown.heat("p-1")).to_be_visible()
    expect(shown.page.locator("figure.strongest")).to_have_attribute("data-id", "p-1")
    expect(shown.page.locator("figure.strongest .badge")).to_be_visible()
    expect(shown.caption).to_contain_text("on the pictures; strongest")
    expect(shown.caption).to_contain_text("of picture 2")
    shown.word("dog", 1).hover()
    expect(shown.page.locator("figure")).to_have_count(1)
    clear(shown)
    expect(shown.page.locator("figure")).to_have_count(2)


# --- what the page sends -------------------------------------------------------------------------


def test_edit(shown):
    shown.show(state(FIRST))
    turn = shown.turn(1)
    turn.locator(".edit").click()
    box = turn.get_by_label("Edit the question")
    expect(box).to_be_focused()
    expect(box).to_have_value(FIRST["question"])
    box.fill("  ")
    expect(turn.get_by_role("button", name="Ask again")).to_be_disabled()
    box.fill("Is there a 🦊?\nReally?")
    shown.show(state(FIRST))
    expect(box).to_have_value("Is there a 🦊?\nReally?")
    box.press("Control+Enter")
    assert shown.log("sent") == [["edit", {"exchange": 1, "text": "Is there a 🦊?\nReally?"}]]
    expect(box).to_have_count(0)
    turn.locator(".edit").click()
    box.press("Escape")
    expect(box).to_have_count(0)
    expect(turn.locator(".edit")).to_be_focused()
    assert len(shown.log("sent")) == 1


def test_retry_and_example(shown):
    shown.show(state())
    example = shown.page.locator(".example")
    expect(example).to_have_text("Is there a dog?")
    expect(example.locator("img")).to_be_visible()
    example.click()
    shown.show(state(FIRST))
    expect(example).to_be_hidden()
    shown.turn(1).locator(".retry").click()
    assert shown.log("sent") == [["example_select", {"id": "e0"}], ["retry", {"exchange": 1}]]


def test_nothing_is_sent_while_busy(shown):
    shown.show(state(busy=True))
    expect(shown.page.locator(".example")).to_be_disabled()
    shown.show(state(FIRST, busy=True))
    for name in ("edit", "retry", "copy"):
        expect(shown.turn(1).locator(f".{name}")).to_be_disabled()
    shown.show(state(FIRST))
    for name in ("edit", "retry", "copy"):
        expect(shown.turn(1).locator(f".{name}")).to_be_enabled()


def test_copy_with_and_without_a_clipboard(shown):
    shown.show(state(FIRST))
    shown.page.evaluate(
        """() => { window.copied = []; document.addEventListener("copy", () =>
        copied.push(document.activeElement.value)); }"""
    )
    copy = shown.turn(1).locator(".copy")
    assert shown.page.evaluate("navigator.clipboard === undefined"), "about:blank has none"
    copy.click()
    expect(copy).to_have_text("Copied")
    assert shown.log("copied") == [FIRST["answer"]]
    shown.page.evaluate(
        """() => Object.defineProperty(navigator, "clipboard", {value:
        {writeText: async (text) => { copied.push("new " + text); }}})"""
    )
    copy.click()
    shown.page.wait_for_function("copied.length === 2")
    assert shown.log("copied")[1] == f"new {FIRST['answer']}"


def test_downloads(shown):
    shown.show(state())
    expect(shown.page.locator(".download-json")).to_be_hidden()
    shown.show(state(FIRST))
    for format in ("json", "html"):
        with shown.page.expect_download() as download:
            shown.page.locator(f".download-{format}").click()
        assert download.value.suggested_filename == f"kept.{format}"
        assert download.value.path().read_text() == f"as {format}"
    shown.page.evaluate("() => { host.download = async () => undefined; }")
    shown.page.locator(".download-json").click()
    expect(shown.page.locator(".saved")).to_contain_text("could not be made")


# --- any text ------------------------------------------------------------------------------------

HOSTILE = {
    "markup": "<img src=x onerror=boom()> <b>bold</b> </script><script>boom()</script> &amp; ${1}",
    "markdown": "# Head\n* **bold** [a](javascript:boom()) `code` ![x](https://example.org/x.png)",
    "right to left": "הכלב ליד הבית, لا قطة (dog) \u202eevil\u202c",
    "emoji": "🦊🐕‍🦺 dog 👩🏽‍🚀 house \U0001d521\U0001d52c\U0001d524 cat",
    "spaces": "  dog\n\n\tdog  \u2028 dog\x00 ",
    "long": "dog " * 2500,
    "one long word": "d" * 10_000,
    "no spaces": "狗在房子旁边。" * 200,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_any_text_stays_text(shown, name):
    text = HOSTILE[name]
    shown.page.evaluate("() => { window.boom = () => { window.harmed = true; }; }")
    more = {"pictures": ["p-1"], "notes": [text], "model": text}
    growing = exchange(1, text, text, state="answering", **more)
    shown.show(state(growing, busy=True))
    shown.show(state(growing | {"state": "done"}))
    expect(shown.turn(1).locator(".answered .word").first).to_be_visible()
    for part in (".asked", ".answered"):
        assert shown.turn(1).locator(part).evaluate("node => node.textContent") == text
    found = words(text, "assistant")
    assert shown.turn(1).locator(".answered .word").count() == len(found)
    last = shown.turn(1).locator(".answered .word").last
    assert last.evaluate("node => node.textContent") == found[-1]["text"]
    last.hover()
    expect(shown.caption).to_contain_text("(answered)")
    assert not shown.page.evaluate("window.harmed ?? false")
    assert shown.page.locator(".looking").locator("script, b, a").count() == 0
    assert fits(shown)


def test_a_right_to_left_text_moves_the_other_way(shown):
    shown.show(state(exchange(1, "מה זה", "הכלב ליד הבית")))
    shown.turn(1).locator(".answered .word").first.focus()
    shown.page.keyboard.press("ArrowLeft")
    expect(shown.turn(1).locator(".answered .word").nth(1)).to_be_focused()


def test_words_that_fit_no_text_are_left_out(shown):
    odd = looks(FIRST)
    odd["words"] += [{**odd["words"][0], "start": 5, "end": 500}, {**odd["words"][0], "end": 0}]
    shown.show(state(FIRST), x1=odd)
    expect(shown.word("dog")).to_be_visible()
    expect(shown.turn(1).locator(".asked")).to_have_text(FIRST["question"])


# --- place and people ----------------------------------------------------------------------------


def scroll(shown: Shown) -> tuple[float, float]:
    """How far the conversation is scrolled, and how far it could be."""
    top, room = shown.page.locator(".log").evaluate(
        "log => [log.scrollTop, log.scrollHeight - log.clientHeight]"
    )
    return top, room


def fits(shown: Shown) -> bool:
    """Nothing has to be scrolled sideways."""
    return shown.page.evaluate(
        """() => [document.documentElement, document.querySelector(".log")]
        .every((node) => node.scrollWidth <= node.clientWidth)"""
    )


def test_scrolls_along_only_for_a_reader_at_the_end(shown):
    long = "a dog and a house, " * 30
    told = [exchange(n, "And?", long) for n in (1, 2)]
    growing = exchange(3, "And?", long, state="answering", stats=None)
    shown.show(state(*told, growing, busy=True))
    expect(shown.word("dog", 2).first).to_be_visible()
    shown.show(state(*told, growing | {"answer": 2 * long}, busy=True))
    top, room = scroll(shown)
    assert room > 300
    assert top == pytest.approx(room, abs=2)
    shown.page.locator(".log").evaluate("log => { log.scrollTop = 40; }")
    shown.show(state(*told, growing | {"answer": 4 * long, "state": "done"}))
    expect(shown.word("dog", 3).first).to_be_attached()
    assert scroll(shown)[0] == 40


def test_focus_stays(shown):
    growing = exchange(2, "And?", "Th", state="answering")
    shown.show(state(FIRST, growing, busy=True))
    shown.word("house").focus()
    shown.page.keyboard.press("ArrowLeft")
    for answer in ("The", "The dog"):
        shown.show(state(FIRST, growing | {"answer": answer}, busy=True))
    shown.show(state(FIRST, growing | {"answer": "The dog", "state": "done"}))
    expect(shown.word("dog", 2)).to_be_visible()
    expect(shown.word("a").first).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_live, scheme):
    shown = open_live()
    shown.page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")

    def check(what: str) -> None:
        found = Axe().run(shown.page)
        assert found.response["violations"] == [], f"{what}: {found.generate_report()}"

    shown.show(state())
    expect(shown.page.locator(".example img")).to_be_visible()
    check("empty")
    running = exchange(4, "And?", "The d", state="answering", stats=None)
    shown.show(
        state(
            FIRST,
            exchange(2, "And?", "A ghost", state="stopped"),
            exchange(3, "?", state="failed", error="no picture", notes=["a note"], stats=None),
            running,
            busy=True,
        )
    )
    check("busy")
    shown.show(state(FIRST, exchange(2, "And a ghost?", "A ghost", pictures=["p-1"])))
    shown.word("ghost", 2).click()
    shown.word("dog", 1).hover()
    shown.page.locator(".legend summary").click()
    check("a word is pinned, another pointed at")
    shown.turn(1).locator(".edit").click()
    check("a question is edited")


@pytest.mark.parametrize("pictures", [("p-0",), ("p-0", "p-1")])
def test_a_narrow_screen(open_live, pictures):
    shown = open_live(viewport={"width": 375, "height": 700})
    one = FIRST | {"pictures": list(pictures), "answer": f"The dog {'d' * 300} house. " * 6}
    shown.show(state(one), x1=looks(one, pictures))
    dog = shown.word("dog").first
    dog.click()
    expect(shown.heat(pictures[0])).to_be_visible()
    assert fits(shown)
    box, picture = (
        shown.page.locator(".log").bounding_box(),
        shown.page.locator(".view").bounding_box(),
    )
    assert picture["y"] + picture["height"] <= box["y"], "the picture stands above"
    # A word must not move away from the finger that points at it.
    place = dog.bounding_box()
    clear(shown)
    shown.page.keyboard.press("Escape")
    assert dog.bounding_box() == place
    many = [{"id": "e0", "question": "Is there a dog?"} for n in range(6)]
    shown.show(state(examples=many))
    expect(shown.page.locator(".example")).to_have_count(6)
    assert fits(shown)
    assert scroll(shown) == (0, 0), "examples do not scroll in themselves"


def test_large_text_breaks_nothing(open_live):
    shown = open_live(viewport={"width": 640, "height": 800})
    shown.page.evaluate("document.documentElement.style.fontSize = '200%'")
    shown.show(state(FIRST))
    expect(shown.word("dog")).to_be_visible()
    assert fits(shown)
    shown.show(state())
    assert fits(shown)


# --- the exported page ---------------------------------------------------------------------------


def exported(**more: Any) -> str:
    both = exchange(2, "</script><img src=x onerror=boom()>", "A ghost 🦊 dog")
    told = state(FIRST, both, **more) | {"key": "the-secret-of-the-tab"}
    shown = [picture for name, picture in PICTURES.items() if name != "e0"]
    kept = {1: looks(FIRST), 2: looks(both, ("p-0", "p-1"))}
    return export.page(told, kept, shown, "A <b>dog</b>?", {"Model": "</dl><script>"})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_exported_page_opens_from_disk(open_page, tmp_path, scheme):
    file = tmp_path / "kept.html"
    file.write_text(exported(), encoding="utf-8")
    shown = open_page(address=file.as_uri(), color_scheme=scheme)
    assert shown.page.title() == "A <b>dog</b>?"
    shown.word("dog", 2).click()
    clear(shown)
    expect(shown.heat("p-1")).to_be_visible()
    expect(shown.caption).to_contain_text("dog (answered): grounding 0.41")
    shown.page.locator("input.opacity").fill("0.5")
    expect(shown.heat("p-1")).to_have_css("opacity", "0.5")
    shown.page.locator("input.threshold").fill("0.45")
    expect(shown.word("dog", 2)).to_have_class(re.compile(r"\bungrounded\b"))
    for name in ("edit", "retry", "copy", "download-json", "layer", "head", "example"):
        assert shown.page.locator(f".{name}").count() == 0
    dark = (
        shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
        != "rgb(255, 255, 255)"
    )
    assert dark == (scheme == "dark")
    # Axe is a script of its own, which the page's policy refuses: a copy without the policy.
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    open_policy = open_page(html=re.sub(policy, "", exported()), color_scheme=scheme)
    open_policy.word("ghost", 2).click()
    found = Axe().run(open_policy.page)
    assert found.response["violations"] == [], found.generate_report()


def test_the_exported_page_may_ask_nobody(open_page, tmp_path):
    file = tmp_path / "kept.html"
    file.write_text(exported(), encoding="utf-8")
    shown = open_page(address=file.as_uri())
    expect(shown.word("dog", 2)).to_be_visible()
    refused = shown.page.evaluate(
        """async () => {
          const told = [];
          const note = (refused) => told.push(refused.effectiveDirective);
          document.addEventListener("securitypolicyviolation", note);
          await fetch("https://example.org/").catch(() => {});
          document.body.append(Object.assign(new Image(), {src: "https://example.org/x.png"}));
          const script = document.createElement("script");
          script.textContent = "window.harmed = true";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<p onclick='window.harmed = true'>x</p>");
          document.body.lastChild.click();
          await new Promise((resolve) => setTimeout(resolve, 100));
          return [told, window.harmed ?? false];
        }"""
    )
    told, harmed = refused
    assert {"connect-src", "img-src", "script-src-elem", "script-src-attr"} <= set(told)
    assert harmed is False
    shown.errors.clear()  # the browser reports each refusal


def test_the_exported_page_on_a_narrow_screen(open_page, tmp_path):
    file = tmp_path / "kept.html"
    file.write_text(exported(), encoding="utf-8")
    shown = open_page(address=file.as_uri(), viewport={"width": 375, "height": 700})
    expect(shown.word("dog", 2)).to_be_visible()
    assert fits(shown)
