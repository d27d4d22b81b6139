"""Starting the app as a user does, finding a browser, and finding one's way on the page.

The tests in a browser, `benchmarks/app_in_browser.py` and `scripts/screenshots.py` share it.
"""

import base64
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import (
    Browser,
    FilePayload,
    Locator,
    Page,
    Playwright,
    expect,
    sync_playwright,
)

from agevlm_mlx.data.painting import Scene, make_scene

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "agevlm_mlx" / "assets" / "model"
#: The camera is a moving test pattern, and nobody is asked whether it may be used.
_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
_APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)

#: Generous: the machine may be busy with other things.
expect.set_options(timeout=20_000)
_ENDED = re.compile("done|stopped|failed")


def chromium(playwright: Playwright | None = None) -> str:
    """Path of a Chromium; ``FileNotFoundError`` names what to install."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [path for name in names if (path := shutil.which(name))]
    found += [path for path in _APPLICATIONS if os.access(path, os.X_OK)]
    if playwright is not None and os.access(playwright.chromium.executable_path, os.X_OK):
        found.append(playwright.chromium.executable_path)
    if not found:
        raise FileNotFoundError(
            "the browser tests need Chromium or Google Chrome; Debian or Ubuntu: "
            "sudo apt-get install chromium, Mac: brew install --cask google-chrome, "
            "anywhere: .venv/bin/python -m playwright install chromium"
        )
    return found[0]


def launch(playwright: Playwright) -> Browser:
    """A headless browser with a camera."""
    return playwright.chromium.launch(executable_path=chromium(playwright), args=[*_CAMERA])


# --- the app -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class App:
    """A running app: its process, its port, and the temporary folder that is its own."""

    process: "subprocess.Popen[str]"
    port: int
    folder: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def said(self) -> str:
        """Everything on its standard output so far."""
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def complained(self) -> str:
        """Everything on its standard error so far."""
        return (self.folder / "err").read_text(encoding="utf-8")

    @property
    def temporary(self) -> list[Path]:
        """Every file that it keeps in the temporary folder; MLX's compiled code does not count."""
        inside = [path for path in (self.folder / "tmp").glob("*") if path.name != "mlx"]
        return [path for top in inside for path in (top, *top.rglob("*")) if path.is_file()]


@contextlib.contextmanager
def running(folder: Path, *command: str | Path) -> Iterator[App]:
    """`command` (default: the app with the shipped model), ended with Ctrl-C.

    `folder` takes its output and whatever it writes to the temporary and home folders.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("tmp", "hub"):
        (folder / name).mkdir(parents=True)
    # What MLX compiles for the CPU takes seconds; what it has compiled before is found here.
    compiled = Path(tempfile.gettempdir()) / "mlx"
    compiled.mkdir(exist_ok=True)
    (folder / "tmp" / "mlx").symlink_to(compiled)
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "hub")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    arguments = [*map(str, command or ("-m", "app")), "--model", str(SHIPPED), "--port", str(port)]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=out,
            stderr=err,
            text=True,
            env=environment,
            # A shell that runs the tests in the background has them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    app = App(process, port, folder)
    try:
        for _ in range(600):
            assert process.poll() is None, app.complained
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"the app does not listen after a minute: {app.complained}")
        yield app
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# --- the page ----------------------------------------------------------------------------------


def _png(file: tuple[str, bytes]) -> FilePayload:
    name, data = file
    return {"name": name, "mimeType": "image/png", "buffer": data}


class Chat:
    """The page in one tab."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        page.goto(address)
        self.ready()

    def ready(self) -> None:
        """Wait until a question can be asked."""
        expect(self.page.locator("#page .example").first).to_be_visible()
        expect(self.box).to_be_enabled()

    @property
    def box(self) -> Locator:
        return self.page.locator("#message textarea")

    @property
    def exchanges(self) -> Locator:
        return self.page.locator("#page li.exchange")

    def attach(self, *files: tuple[str, bytes]) -> None:
        """Choose files for the next message and wait until they are uploaded."""
        kinds = {"png": "image/png", "jpg": "image/jpeg", "heic": "image/heic"}
        chosen = [
            (name, kinds.get(name.rsplit(".")[-1], "image/png"), data) for name, data in files
        ]
        self.page.set_input_files(
            "#message input[type=file]",
            [{"name": name, "mimeType": kind, "buffer": data} for name, kind, data in chosen],
        )
        expect(self.page.locator("#message .thumbnail-item")).to_have_count(len(files))

    def look_for(self, words: str, file: tuple[str, bytes]) -> Locator:
        """Ask "Is it in the picture?" for some words; the rows of the table."""
        self.page.get_by_role("tab", name="Is it in the picture?").click()
        self.page.set_input_files("#presence-image input[type=file]", _png(file))
        expect(self.page.locator("#presence-image img")).to_be_visible()
        self.page.locator("#presence-text textarea").fill(words)
        self.page.locator("#presence-ask").click()
        rows = self.page.locator("#presence-out tbody tr")
        expect(rows.nth(words.count(","))).to_be_visible()
        return rows

    def compare(self, text: str, file: tuple[str, bytes]) -> None:
        """Ask two models, and wait for both answers."""
        self.page.get_by_role("tab", name="Compare").click()
        self.page.set_input_files("#compare-message input[type=file]", _png(file))
        expect(self.page.locator("#compare-message .thumbnail-item")).to_have_count(1)
        box = self.page.locator("#compare-message textarea")
        box.fill(text)
        box.press("Enter")
        for side in ("left", "right"):
            exchange = self.page.locator(f"#compare-{side} li.exchange").last
            expect(exchange).to_have_attribute("data-state", "done")

    def send(self, text: str, *files: tuple[str, bytes]) -> Locator:
        """Ask without waiting for the answer; the new exchange.

        The page takes none while the one before it is answered, which is when Stop can be pressed.
        """
        if files:
            self.attach(*files)
        expect(self.page.locator("#stop")).to_be_disabled()
        new = self.exchanges.nth(self.exchanges.count())
        self.box.fill(text)
        self.box.press("Enter")
        for _ in range(10):
            with contextlib.suppress(AssertionError):
                expect(new).to_be_attached(timeout=3000)
                return new
            if self.box.input_value():  # it is emptied when the question is taken
                self.box.press("Enter")
        raise AssertionError(f"the page does not take the question {text!r}")

    def ask(self, text: str, *files: tuple[str, bytes]) -> Locator:
        """Ask, and wait for the whole answer and its words."""
        return self.ended(self.send(text, *files))

    def ended(self, exchange: Locator) -> Locator:
        """The exchange, once it has ended and, if it went well, its words can be looked at."""
        expect(exchange).to_have_attribute("data-state", _ENDED)
        if exchange.get_attribute("data-state") != "failed":
            expect(exchange.locator(".asked .word").first).to_be_visible()
        return exchange

    def word(self, exchange: Locator, text: str, part: str = ".answered") -> Locator:
        """The first button of that word."""
        exact = re.compile(rf"^\s*{re.escape(text)}\s*$")
        return exchange.locator(f"{part} button.word").filter(has_text=exact).first

    def heats(self) -> list[str | None]:
        """The source of the overlay over each picture, None where none is shown."""
        return self.page.locator("#page .stage figure").evaluate_all(
            """figures => figures.map(figure => {
                const heat = figure.querySelector("img.heat");
                return heat && heat.checkVisibility({opacityProperty: true,
                    visibilityProperty: true}) && heat.getAttribute("src") || null;
            })"""
        )

    def facts(self) -> str:
        return self.page.locator("#facts").inner_text()


# --- pictures ----------------------------------------------------------------------------------


def scene(index: int) -> Scene:
    """One of the pictures that the shipped model was not trained on."""
    return make_scene(2, "test", index)


def picture(painted: Scene, side: int = 512, turned: bool = False) -> tuple[str, bytes]:
    """(name, file) of a painted scene; turned: a photograph that says which side is up."""
    image = Image.fromarray(painted.image).resize((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if not turned:
        image.save(file, "PNG")
        return "scene.png", file.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    image.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=exif)
    return "photo.jpg", file.getvalue()


def strength(source: str) -> np.ndarray:
    """f32 [h w] how bright an overlay is, from the data URL of a PNG with alpha."""
    data = base64.b64decode(source.partition("base64,")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), np.float32)
    return pixels[..., :3].mean(axis=-1) * pixels[..., 3]


def is_on(source: str, mask: np.ndarray) -> bool:
    """Is the brightest place of the overlay on the object, or within half a token's cell?"""
    found = strength(source)
    y, x = np.unravel_index(found.argmax(), found.shape)
    side = mask.shape[0]
    y, x = int((y + 0.5) / found.shape[0] * side), int((x + 0.5) / found.shape[1] * side)
    near = side // 16
    return bool(mask[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1].any())


def main() -> int:
    """Is there a browser? (`make chromium` asks.)"""
    try:
        with sync_playwright() as playwright:
            print(f"Chromium: {chromium(playwright)}")
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
