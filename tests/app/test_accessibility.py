"""Axe finds nothing serious on any tab, empty or in use, in light and in dark."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.app.browsing import Chat, picture, scene

pytestmark = pytest.mark.browser

TABS = ("Chat", "Is it in the picture?", "Compare")


def check(chat: Chat, where: str) -> None:
    """Fails with everything that Axe found if anything of it is serious."""
    found = Axe().run(chat.page)
    impacts = {violation["impact"] for violation in found.response["violations"]}
    assert not impacts & {"serious", "critical"}, f"{where}: {found.generate_report()}"


@pytest.fixture(params=["light", "dark"])
def chat(app, new_context, request):
    return Chat(new_context(color_scheme=request.param).new_page(), app.address)


def tab(chat: Chat, name: str) -> None:
    choice = chat.page.get_by_role("tab", name=name)
    choice.click()
    expect(choice).to_have_attribute("aria-selected", "true")


def test_empty_tabs(chat):
    for name in TABS:
        tab(chat, name)
        check(chat, name)


def test_a_conversation_with_a_word_pinned(chat):
    exchange = chat.ask("Describe the image.", picture(scene(0)))
    chat.word(exchange, "dog").click()
    slider = chat.page.locator("#page input.threshold")
    slider.fill(slider.get_attribute("max"))  # underlined words too
    check(chat, "Chat")


def test_a_failed_exchange(chat):
    exchange = chat.ask("Is there a house?", ("notes.png", b"no picture"))
    expect(exchange).to_have_attribute("data-state", "failed")
    check(chat, "Chat")


def test_the_answers_of_the_other_tabs(chat):
    chat.look_for("house, fish", picture(scene(2)))
    check(chat, "Is it in the picture?")
    chat.compare("Is there a house?", picture(scene(2)))
    check(chat, "Compare")
