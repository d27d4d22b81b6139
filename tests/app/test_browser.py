"""The app as a person meets it: the real command, the shipped model, a real browser."""

import io
import itertools
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from tests.app.browsing import Chat, is_on, picture, scene

pytestmark = pytest.mark.browser

DESCRIBE = "Describe the image."
_NOTED = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const said = [...document.querySelectorAll("#page li.exchange .answered")].at(-1);
        const text = said ? said.textContent.trim() : "";
        if (text && window.seen.at(-1) !== text) window.seen.push(text);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def said(exchange: Any) -> str:
    return exchange.locator(".answered").inner_text().strip()


# --- asking and looking ------------------------------------------------------------------------


def test_an_answer_and_its_figures(chat):
    exchange = chat.ask(DESCRIBE, picture(scene(0)))
    assert re.fullmatch(r"An? \w+,.* and an? \w+\.", said(exchange)), said(exchange)
    stats = exchange.locator(".stats")
    expect(stats).to_contain_text(re.compile(r"first word after .*\d+ tokens/s.*image memory"))


def test_a_words_light_falls_on_its_object(chat):
    found, missed = [], []
    for index, turned in ((0, False), (1, False), (2, True), (4, False), (5, True), (6, False)):
        painted = scene(index)
        exchange = chat.ask(DESCRIBE, picture(painted, turned=turned))
        before = None
        for noun, mask in zip(painted.nouns, painted.masks, strict=True):
            word = chat.word(exchange, noun)
            if not word.count():
                continue  # the model did not say it
            word.click()
            expect(word).to_have_attribute("aria-pressed", "true")
            expect(chat.page.locator("#page .caption")).to_contain_text(noun)
            (heat,) = [heat for heat in chat.heats() if heat]
            assert heat != before, f"{noun}: the overlay of another word"
            before = heat
            (found if is_on(heat, mask) else missed).append((index, noun))
        chat.page.locator("#new").click()
        expect(chat.exchanges).to_have_count(0)
    assert len(found) + len(missed) >= 14
    assert len(found) >= 0.8 * (len(found) + len(missed)), missed


def test_the_mark_of_the_peak_is_on_the_object_on_the_screen(chat):
    painted = scene(5)
    exchange = chat.ask(DESCRIBE, picture(painted))
    for noun, mask in zip(painted.nouns, painted.masks, strict=True):
        chat.word(exchange, noun).click()
        shown = chat.page.locator("#page .stage img.plain").bounding_box()
        mark = chat.page.locator("#page .stage .peak").bounding_box()
        x = (mark["x"] + mark["width"] / 2 - shown["x"]) / shown["width"]
        y = (mark["y"] + mark["height"] / 2 - shown["y"]) / shown["height"]
        x, y = int(x * mask.shape[1]), int(y * mask.shape[0])
        assert mask[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9].any(), (noun, x, y)


def test_hovering_shows_a_word_and_leaving_shows_the_pinned_one_again(chat):
    exchange = chat.ask("Is there a house?", picture(scene(2)))
    house, there = (chat.word(exchange, text, ".asked") for text in ("house", "there"))
    house.click()
    (pinned,) = chat.heats()
    there.hover()
    expect(chat.page.locator("#page .caption")).to_contain_text("there")
    assert chat.heats() != [pinned]
    chat.page.mouse.move(1, 1)
    expect(chat.page.locator("#page .caption")).to_contain_text("house")
    assert chat.heats() == [pinned]


def test_by_keyboard_alone(chat):
    chat.attach(picture(scene(0)))
    chat.box.focus()
    chat.page.keyboard.type(DESCRIBE)
    chat.page.keyboard.press("Enter")
    exchange = chat.ended(chat.exchanges.first)
    focused = "document.activeElement.matches('#page button.word')"
    chat.page.locator("body").focus()
    for _ in range(80):
        chat.page.keyboard.press("Tab")
        if chat.page.evaluate(focused):
            break
    else:
        pytest.fail("Tab reaches no word")
    first = chat.page.evaluate("document.activeElement.textContent")
    chat.page.keyboard.press("ArrowRight")
    second = chat.page.evaluate("document.activeElement.textContent")
    assert chat.page.evaluate(focused)
    assert second != first
    caption = chat.page.locator("#page .caption")
    expect(caption).to_contain_text(second.strip())
    chat.page.keyboard.press("Enter")
    pinned = exchange.locator('.word[aria-pressed="true"]')
    expect(pinned).to_have_text(second)
    assert any(chat.heats())
    chat.page.keyboard.press("Escape")
    expect(pinned).to_have_count(0)


def test_layers_heads_opacity_and_the_threshold(chat):
    exchange = chat.ask(DESCRIBE, picture(scene(0)))
    word = chat.word(exchange, "dog")
    word.click()
    (mean,) = chat.heats()
    heat = chat.page.locator("#page img.heat").first
    looks = lambda reply: "component_server" in reply.url  # noqa: E731
    for name in ("layer", "head"):
        choice = chat.page.locator(f"#page select.{name}")
        with chat.page.expect_response(looks):
            choice.select_option(index=1)
        expect(heat).not_to_have_attribute("src", mean)
        choice.select_option(index=0)
        expect(heat).to_have_attribute("src", mean)
    expect(heat).to_have_css("transition-duration", "0s")  # reduced motion was asked for
    opacity = "parseFloat(getComputedStyle(document.querySelector('#page img.heat')).opacity)"
    slider = chat.page.locator("#page input.opacity")
    slider.fill(slider.get_attribute("min"))
    faint = chat.page.evaluate(opacity)
    slider.fill(slider.get_attribute("max"))
    assert chat.page.evaluate(opacity) > faint
    ungrounded = exchange.locator(".word.ungrounded")
    threshold = chat.page.locator("#page input.threshold")
    threshold.fill(threshold.get_attribute("min"))
    expect(ungrounded).to_have_count(0)
    threshold.fill(threshold.get_attribute("max"))
    expect(ungrounded.first).to_be_visible()
    assert "A" not in ungrounded.all_inner_texts(), "an article names nothing to see"
    assert "dog" in [text.strip() for text in ungrounded.all_inner_texts()]


def test_a_follow_up_does_not_look_again(chat):
    first = chat.ask("Is there a house?", picture(scene(2)))
    expect(first.locator(".stats")).not_to_contain_text("already seen")
    second = chat.ask("Where is the house?")
    expect(second.locator(".stats")).to_contain_text("image already seen: 0 ms")
    chat.word(second, "house", ".asked").click()
    assert any(chat.heats())


def test_two_pictures_in_one_message(chat):
    exchange = chat.ask("Is there a house?", picture(scene(2)), picture(scene(5)))
    figures = chat.page.locator("#page .stage figure")
    expect(figures).to_have_count(2)
    sources = figures.locator("img.plain").evaluate_all("all => all.map(i => i.src)")
    assert len(set(sources)) == 2
    chat.word(exchange, "house", ".asked").click()
    assert any(chat.heats())


def test_edit_and_regenerate(chat):
    chat.ask("Is there a house?", picture(scene(2)))
    chat.ask("Is there a dog?")
    first = chat.exchanges.first
    first.locator(".edit").click()
    field = first.locator("textarea")
    field.fill(DESCRIBE)
    field.press("Control+Enter")
    expect(chat.exchanges).to_have_count(1)
    expect(first.locator(".asked")).to_contain_text(DESCRIBE)
    chat.ended(first)
    told = said(first)
    assert "house" in told
    number = first.get_attribute("data-id")
    first.locator(".retry").click()
    expect(chat.page.locator(f'#page li.exchange[data-id="{number}"]')).to_have_count(0)
    chat.ended(first)
    expect(chat.exchanges).to_have_count(1)
    assert said(first) == told, "without sampling an answer repeats itself"


def test_an_example_can_be_clicked(chat):
    chat.page.locator("#page .example").first.click()
    exchange = chat.ended(chat.exchanges.first)
    expect(exchange).to_have_attribute("data-state", "done")
    assert said(exchange)
    expect(chat.page.locator("#page .stage img.plain")).to_have_count(1)


def test_twenty_quick_questions(chat):
    chat.ask("Is there a house?", picture(scene(2)))
    nouns = [noun for index in range(10) for noun in scene(index).nouns][:20]
    for noun in nouns:
        chat.send(f"Is there a {noun}?")
    for number, noun in enumerate(nouns, 1):
        exchange = chat.ended(chat.exchanges.nth(number))
        expect(exchange).to_have_attribute("data-state", "done")
        expect(exchange.locator(".asked")).to_have_text(f"Is there a {noun}?")
        assert said(exchange)


# --- tabs --------------------------------------------------------------------------------------


def listen(page: Page) -> list[dict[str, Any]]:
    """What the page sends to functions of the server from now on."""
    sent: list[dict[str, Any]] = []

    def note(request: Any) -> None:
        if "component_server" in request.url:
            sent.append(request.post_data_json)

    page.on("request", note)
    return sent


_CALL = """async body => {
    const reply = await fetch("gradio_api/component_server", {method: "POST",
        headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
    return [reply.status, await reply.text()];
}"""


def test_a_tab_never_sees_the_other_one(app, new_context, complaints):
    context = new_context()
    mine, others = Chat(context.new_page(), app.address), Chat(context.new_page(), app.address)
    sent = listen(mine.page)
    exchange = mine.ask(DESCRIBE, picture(scene(0)))
    mine.word(exchange, "dog").click()
    looked = next(body for body in sent if body["fn_name"] == "looks")
    shown = next(body for body in sent if body["fn_name"] == "pictures")
    # They do tell the tab that asked: otherwise what follows would prove nothing.
    for body, secret in ((looked, '"dog"'), (shown, "data:image/")):
        status, told = mine.page.evaluate(_CALL, body)
        assert status == 200
        assert secret in told
    sent = listen(others.page)
    others.ask("Is there a fish?", picture(scene(18)))
    key, session = sent[0]["data"]["key"], sent[0]["session_hash"]
    assert key != looked["data"]["key"]
    hidden = ["dog", *shown["data"]["ids"]]
    for stranger in (key, "made-up", "", None, {"$ne": 1}):
        for body in (looked, shown):
            tried = {**body, "session_hash": session, "data": {**body["data"], "key": stranger}}
            _, told = others.page.evaluate(_CALL, tried)
            assert not [secret for secret in hidden if secret in told], (stranger, told)
            # Its own pictures and maps it may have.
            assert "data:image/" not in told or (stranger, body) == (key, looked), stranger
    body = others.page.inner_text("body")
    assert DESCRIBE not in body
    assert said(exchange) not in body
    pictures = "() => [...document.querySelectorAll('#page img.plain')].map(i => i.src)"
    assert not set(others.page.evaluate(pictures)) & set(mine.page.evaluate(pictures))
    complaints.errors.clear()  # refused calls may be answered with an error status


def test_a_reload_gives_a_fresh_page_that_works(chat):
    chat.ask("Is there a house?", picture(scene(2)))
    chat.page.reload()
    chat.ready()
    expect(chat.exchanges).to_have_count(0)
    expect(chat.page.locator("#page .stage img.plain")).to_have_count(0)
    exchange = chat.ask("Is there a house?", picture(scene(2)))
    assert said(exchange) == "Yes"


# --- bad input ---------------------------------------------------------------------------------


def gigantic() -> bytes:
    """A PNG of 100 megapixels that is a few kilobytes of file."""
    side = 10_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" + b"\xaa" * (side // 8)) for _ in range(side))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part)
        for part in ((b"IHDR", header), (b"IDAT", rows + packer.flush()), (b"IEND", b""))
    )


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 200


@pytest.mark.parametrize(
    ("name", "data"),
    [("notes.png", b"hello, this is text"), ("empty.png", b""), ("photo.heic", HEIC)],
)
def test_a_bad_file_gets_a_sentence_and_the_chat_goes_on(chat, name, data):
    exchange = chat.ask("Is there a house?", (name, data))
    expect(exchange).to_have_attribute("data-state", "failed")
    told = exchange.locator(".error").inner_text()
    assert name in told
    assert len(told.strip().splitlines()) == 1
    expect(chat.box).to_have_value("Is there a house?")  # kept, to be put right
    chat.page.get_by_label("Remove file").click()
    again = chat.ask("Is there a house?", picture(scene(2)))
    assert said(again) == "Yes"


def test_a_hundred_megapixels_come_down_with_a_note(chat):
    exchange = chat.ask("Is there a house?", ("huge.png", gigantic()))
    expect(exchange).to_have_attribute("data-state", "done")
    expect(exchange.locator(".note", has_text="huge.png")).to_contain_text("10000")
    width = chat.page.locator("#page .stage img.plain").evaluate("i => i.naturalWidth")
    assert 0 < width <= 1024


def test_an_empty_question_gets_a_sentence(chat):
    chat.box.press("Enter")
    expect(chat.page.locator("body")).to_contain_text(re.compile("question is empty|ask something"))
    exchange = chat.ask("Is there a house?", picture(scene(2)))
    assert said(exchange) == "Yes"


# --- the model ---------------------------------------------------------------------------------


def open_accordion(chat: Chat, name: str) -> Any:
    """The opened part of the page with that id."""
    part = chat.page.locator(f"#{name}")
    part.locator("button.label-wrap").click()
    return part


def test_the_model_in_four_bits(chat):
    chat.ask("Is there a house?", picture(scene(2)))
    open_accordion(chat, "settings")
    chat.page.evaluate("""() => {
        window.steps = [];
        new MutationObserver(() => {
            const bar = document.querySelector("#loading progress");
            if (bar) window.steps.push(bar.value);
        }).observe(document.body, {subtree: true, childList: true,
            attributes: true});
    }""")
    chat.page.locator("#bits").get_by_label("4 bits").check()
    chat.page.locator("#load").click()
    expect(chat.page.locator("#facts")).to_contain_text("in 4 bits")
    expect(chat.page.locator("#loading progress")).to_have_count(0)
    steps = chat.page.evaluate("window.steps")
    assert steps, "no progress was shown"
    assert steps == sorted(steps)
    exchange = chat.ask("Is there a house?")
    expect(exchange).to_have_attribute("data-state", "done")
    expect(exchange.locator(".stats")).to_contain_text("in 4 bits")
    assert said(exchange)


def test_a_folder_that_is_no_model_of_ours(chat, tmp_path):
    other = tmp_path / "another-kind"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    open_accordion(chat, "settings")
    box = chat.page.locator("#model input")
    for folder, missing in ((other, "agevlm"), (tmp_path / "nowhere", "nowhere")):
        box.fill(str(folder))
        box.press("Enter")
        chat.page.locator("#load").click()
        expect(chat.page.locator("#loading")).to_contain_text(missing)
    exchange = chat.ask("Is there a house?", picture(scene(2)))
    assert said(exchange) == "Yes"


def test_an_answer_grows_can_be_stopped_and_the_next_question_works(misbehaving, new_context):
    chat = Chat(new_context().new_page(), misbehaving.address)
    chat.page.evaluate(_NOTED)
    whole = said(chat.ask("Slowly now. Describe the image.", picture(scene(0))))
    seen = chat.page.evaluate("window.seen")
    assert len(seen) > 4, "the answer did not come word by word"
    assert seen[-1] == whole
    for less, more in itertools.pairwise(seen):
        assert more.startswith(less), (less, more)
    chat.page.locator("#new").click()
    expect(chat.exchanges).to_have_count(0)
    exchange = chat.send("Slowly now. Describe the image.", picture(scene(0)))
    expect(exchange).to_have_attribute("data-state", "answering")
    expect(exchange.locator(".answered")).to_contain_text(re.compile(r"\w"))
    chat.page.locator("#stop").click()
    expect(exchange).to_have_attribute("data-state", "stopped")
    part = said(exchange)
    assert part
    assert said(chat.ask("Is there a house?")) in ("Yes", "No")
    assert said(exchange) == part, "what was said stays"


@pytest.mark.parametrize("question", ["Run out of memory.", "Die."])
def test_a_model_that_fails_says_so_and_the_app_goes_on(misbehaving, new_context, question):
    chat = Chat(new_context().new_page(), misbehaving.address)
    chat.ask("Is there a house?", picture(scene(2)))
    failed = chat.ask(question)
    expect(failed).to_have_attribute("data-state", "failed")
    told = failed.locator(".error").inner_text()
    assert told.strip()
    assert "/a/path" not in told
    # The same tab goes on, and so does a new one.
    for other in (chat, Chat(chat.page.context.new_page(), misbehaving.address)):
        exchange = other.ask("Is there a house?", picture(scene(2)))
        assert said(exchange) == "Yes"


# --- the other tabs, the camera, and what can be taken home ------------------------------------


def test_is_it_in_the_picture(chat, tmp_path):
    rows = chat.look_for("house, fish", picture(scene(2)))
    yes = {}
    for noun in ("house", "fish"):
        row = rows.filter(has_text=noun).first
        expect(row.locator("img").first).to_be_visible()
        yes[noun] = max(float(p) for p in re.findall(r"\d*\.\d+|\d+(?= ?%)", row.inner_text())[:1])
    assert yes["house"] > yes["fish"], yes


def test_two_models_side_by_side(chat):
    chat.compare("Is there a house?", picture(scene(2)))
    for side in ("left", "right"):
        exchange = chat.page.locator(f"#compare-{side} li.exchange")
        expect(exchange).to_have_attribute("data-state", "done")
        assert said(exchange) == "Yes"
        chat.word(exchange, "house", ".asked").click()
        expect(chat.page.locator(f"#compare-{side} img.heat").first).to_be_visible()


def test_the_camera(chat):
    part = open_accordion(chat, "camera")
    part.locator('[title="grant webcam access"] button').click()
    chat.page.wait_for_function("document.querySelector('#camera video')?.readyState >= 2")
    part.get_by_label("capture photo").click()
    expect(part.locator(".image-frame img")).to_be_visible()
    exchange = chat.ask("Is there a house?")
    expect(exchange).to_have_attribute("data-state", "done")
    shown = chat.page.locator("#page .stage img.plain")
    expect(shown).to_have_count(1)
    assert shown.evaluate("i => i.naturalWidth") > 100
    chat.ask("Is there a dog?")
    expect(shown).to_have_count(1)  # the photo went with the first question only


def take_home(chat: Chat, format: str) -> str:
    with chat.page.expect_download() as download:
        chat.page.locator(f"#page .download-{format}").click()
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_the_conversation_as_json(chat):
    sent = listen(chat.page)
    chat.ask("Is there a house?", picture(scene(2)))
    text = take_home(chat, "json")
    told = json.loads(text)
    assert "Is there a house?" in text
    assert '"Yes"' in text
    assert isinstance(told, dict)
    for secret in (sent[0]["data"]["key"], str(Path.home()), "/tmp/"):
        assert secret not in text


def test_the_conversation_as_a_page_works_with_no_network(chat, new_context, tmp_path):
    sent = listen(chat.page)
    chat.ask(DESCRIBE, picture(scene(5)))
    path = tmp_path / "conversation.html"
    path.write_text(take_home(chat, "html"), encoding="utf-8")
    assert sent[0]["data"]["key"] not in path.read_text(encoding="utf-8")
    page = unplugged(new_context, path)
    painted = scene(5)
    for noun, mask in zip(painted.nouns, painted.masks, strict=True):
        page.locator(".looking .answered .word").filter(has_text=noun).first.click()
        heat = page.locator(".looking .stage img.heat").first
        expect(heat).to_be_visible()
        assert is_on(heat.get_attribute("src"), mask), noun


def unplugged(new_context: Callable[..., BrowserContext], path: Path) -> Page:
    """A file from the disk in a browser that reaches nothing else."""
    context = new_context(offline=True)
    page = context.new_page()
    context.unroute_all()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    return page


def test_dark_mode(app, new_context):
    light, dark = (
        Chat(new_context(color_scheme=scheme).new_page(), app.address)
        for scheme in ("light", "dark")
    )

    def brightness(chat: Chat) -> tuple[float, float]:
        chat.ask("Is there a house?", picture(scene(2)))
        paper = Image.open(io.BytesIO(chat.page.screenshot())).convert("L")
        ink = chat.page.locator("#page .asked").first.evaluate("e => getComputedStyle(e).color")
        return sum(paper.resize((8, 8)).tobytes()) / 64, sum(map(int, re.findall(r"\d+", ink)[:3]))

    (day, black), (night, white) = brightness(light), brightness(dark)
    assert day > 160 > 95 > night
    assert white > black + 200
