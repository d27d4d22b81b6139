"""The app as a running command, and pages in a real browser that fail on any complaint."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

from tests.app.browsing import ROOT, App, Chat, launch, running

VIEWPORT = {"width": 1280, "height": 900}
#: What belongs to the terminal and never to a page.
_PRIVATE = re.compile(rf"Traceback|File \"|/gradio_|{re.escape(str(ROOT))}|site-packages|/tmp/")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The real command with the shipped model; Ctrl-C has to end it in peace."""
    with running(tmp_path_factory.mktemp("app")) as app:
        yield app
    assert app.process.returncode in (0, 130), app.complained
    assert "Traceback" not in app.complained, app.complained
    assert app.temporary == [], "files are left behind"


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The app with a model that fails, dies or dawdles when the question says so."""
    script = Path(__file__).with_name("misbehaving.py")
    with running(tmp_path_factory.mktemp("misbehaving"), script) as app:
        yield app
    assert app.process.returncode in (0, 130), app.complained


# Not for the whole run: while Playwright is open no other test could use asyncio.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@dataclass
class Complaints:
    """What a browser said while a test ran."""

    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        """Note errors and requests of every page; nothing but the app can be reached."""
        context.route("**/*", self._route)
        context.on("page", self._page)

    def _route(self, route: Route) -> None:
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()

    def _page(self, page: Page) -> None:
        def console(message: Any) -> None:
            if message.type == "error":
                self.errors.append(f"{message.text} ({message.location.get('url')})")

        page.on("console", console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("websocket", lambda socket: self._foreign_socket(socket.url))

    def _foreign_socket(self, url: str) -> None:
        if urlsplit(url).hostname != "127.0.0.1":
            self.foreign.append(url)


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def new_context(browser: Browser, complaints: Complaints) -> Iterator[Callable[..., Any]]:
    """Makes browser contexts that start with nothing; the options are Playwright's.

    After the test: no console error, no request to another host, no path or traceback shown.
    """
    contexts: list[BrowserContext] = []

    def make(**options: Any) -> BrowserContext:
        # Nothing fades in or out, so that what is looked at is what will stay.
        still = {"viewport": VIEWPORT, "permissions": ["camera"], "reduced_motion": "reduce"}
        context = browser.new_context(**(still | options))
        context.set_default_timeout(20_000)
        complaints.watch(context)
        contexts.append(context)
        return context

    yield make
    shown = [page.inner_text("body") for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    assert complaints.errors == [], "the console of the browser is not empty"
    assert complaints.foreign == [], "the page asked another host"
    for text in shown:
        assert not _PRIVATE.search(text), text


@pytest.fixture
def chat(app: App, new_context: Callable[..., Any]) -> Chat:
    """The page of the app in a fresh browser."""
    return Chat(new_context().new_page(), app.address)
