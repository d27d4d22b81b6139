"""The two pictures of the app in the README, taken in a real browser with the shipped model.

  python scripts/screenshots.py --out docs

Writes app-chat.png (a word lit up on the picture) and app-presence.png (the table of "Is it in
the picture?").
"""

import argparse
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import (
    Browser,
    FloatRect,
    Page,
    ViewportSize,
    expect,
    sync_playwright,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what the tests in a browser share

from tests.app.browsing import Chat, launch, picture, running, scene

VIEW = ViewportSize(width=1280, height=900)
PICTURE = picture(scene(25), side=768)  # a tree, an umbrella and a flower


def take(page: Page, path: Path, last: str) -> None:
    """Everything down to the element `last`, as the page is with no pointer on it."""
    page.mouse.move(1, 1)
    box = page.locator(last).bounding_box()
    assert box is not None, last
    height = round(box["y"] + box["height"] + 12)
    page.set_viewport_size(ViewportSize(width=VIEW["width"], height=max(height, VIEW["height"])))
    clip = FloatRect(x=0, y=0, width=VIEW["width"], height=height)
    page.screenshot(path=path, clip=clip, animations="disabled")


def chat_picture(browser: Browser, address: str, path: Path) -> None:
    """A question, its answer, a follow-up, and where one word of the answer looked."""
    chat = Chat(browser.new_context(viewport=VIEW).new_page(), address)
    first = chat.ask("Describe the image.", PICTURE)
    chat.ask("Is there a dog?")
    chat.word(first, "umbrella").click()
    expect(chat.page.locator("#page img.heat").first).to_be_visible()
    take(chat.page, path, "#message")


def presence_picture(browser: Browser, address: str, path: Path) -> None:
    """Words that are and one that is not in the picture."""
    chat = Chat(browser.new_context(viewport=VIEW).new_page(), address)
    chat.look_for("umbrella, flower, pizza", PICTURE)
    take(chat.page, path, "#presence-out table.words")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder (docs)")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launch(playwright)
        with running(Path(folder) / "app") as app:
            chat_picture(browser, app.address, out / "app-chat.png")
            presence_picture(browser, app.address, out / "app-presence.png")
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
