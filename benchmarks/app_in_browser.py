"""How long a person waits for the app: measured in a real browser, by the page's own clock.

    python benchmarks/app_in_browser.py --json app_in_browser.json

Starts the app with the shipped model, and for every run a browser with an empty cache. Times end
with the frame that shows what was waited for. Browser and model share this machine's cores.

- first paint: from the request of the page to its first content.
- can be asked: to the message box and the conversation both being there.
- first word, new picture / follow-up: from Enter to the first word of the answer. The picture is
  uploaded before; a new one is decoded and encoded.
- maps: from Enter to words that can be looked at (the answer is complete and all maps are here).
- hover: from the pointer reaching a word to its overlay being shown.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what the tests in a browser share

from agevlm_mlx.evaluation.machine import machine, versions
from tests.app.browsing import Chat, launch, picture, running, scene

#: Notes on the page's clock, in ms, when each thing is first seen after `begin`; `shown` waits
#: for the next frame, which is when a person sees it.
_CLOCK = """
window.clock = {start: 0, seen: {}, wanted: {}};
clock.look = () => {
    for (const [name, there] of Object.entries(clock.wanted)) {
        if (!there()) continue;
        delete clock.wanted[name];
        requestAnimationFrame(() => setTimeout(() => {
            clock.seen[name] = performance.now() - clock.start;
        }));
    }
};
clock.begin = (wanted, start) => {
    clock.seen = {}; clock.wanted = wanted; clock.start = start;
};
document.addEventListener("DOMContentLoaded", () => {
    new MutationObserver(clock.look).observe(document.body, {
        subtree: true, childList: true, characterData: true, attributes: true});
});
const newest = () => [...document.querySelectorAll("#page li.exchange")].at(-1);
clock.begin({ready: () => {
    const box = document.querySelector("#message textarea");
    return box && !box.disabled && document.querySelector("#page .looking .example");
}}, 0);
clock.question = () => {
    const before = document.querySelectorAll("#page li.exchange").length;
    const now = () => document.querySelectorAll("#page li.exchange").length > before;
    document.querySelector("#message textarea").addEventListener("keydown", (event) => {
        clock.begin({
            word: () => now() && newest().querySelector(".answered").textContent.trim(),
            maps: () => now() && newest().querySelector(".answered button.word"),
        }, performance.now());
    }, {once: true, capture: true});
};
clock.hover = (word) => {
    const heat = () => document.querySelector("#page .stage img.heat");
    const before = heat() && heat().src;
    const shown = () => heat() && heat().src !== before && heat().complete
        && heat().naturalWidth && heat().checkVisibility();
    const watch = () => shown() ? clock.look() : requestAnimationFrame(watch);
    word.addEventListener("pointerenter", () => {
        clock.begin({overlay: shown}, performance.now());
        watch();
    }, {once: true, capture: true});
};
"""
_ROWS = {
    "paint": "first paint",
    "ready": "can be asked",
    "new word": "first word, new picture",
    "new maps": "maps, new picture",
    "next word": "first word, follow-up",
    "next maps": "maps, follow-up",
    "hover": "hover to overlay",
}


def seen(page: Page, name: str) -> float:
    """ms after the beginning at which it was shown."""
    return float(page.wait_for_function(f"clock.seen[{name!r}]").json_value())


def one_run(browser: Browser, address: str, file: tuple[str, bytes]) -> dict[str, float]:
    """ms of every row, in a browser with an empty cache."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(_CLOCK)
    page = context.new_page()
    chat = Chat(page, address)
    times = {"ready": seen(page, "ready")}
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    times["paint"] = float(page.evaluate(paint))
    chat.attach(file)
    for name, question in (("new", "Describe the image."), ("next", "Is there a dog?")):
        chat.box.fill(question)
        page.evaluate("clock.question()")
        chat.box.press("Enter")
        times[f"{name} word"], times[f"{name} maps"] = seen(page, "word"), seen(page, "maps")
    word = chat.page.locator("#page .answered button.word").first
    word.scroll_into_view_if_needed()
    page.mouse.move(1, 1)
    word.evaluate("word => clock.hover(word)")
    word.hover()
    times["hover"] = seen(page, "overlay")
    context.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9, help="runs, after one to warm up (9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every time, and with what")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launch(playwright)
        with running(Path(folder) / "app") as app:
            file = picture(scene(0))
            one_run(browser, app.address, file)
            runs = [one_run(browser, app.address, file) for _ in range(args.runs)]
        with_what = {
            "machine": machine(),
            "versions": {**versions(), "browser": browser.version},
            "threads": {
                name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
            },
        }
        browser.close()
    here, limits = with_what["machine"], with_what["threads"]
    threads = ", ".join(f"{name}={value}" for name, value in limits.items() if value)
    print(f"{here['processor']}, {here['cores']} cores, {here['device']}; "
          f"threads: {threads or 'not limited'}")  # fmt: skip
    print(f"Chromium {with_what['versions']['browser']}, headless; {args.runs} runs")
    print(f"{'':<26}{'median':>9}{'least':>9}{'most':>9}   ms")
    for name, row in _ROWS.items():
        times = sorted(run[name] for run in runs)
        print(f"{row:<26}{statistics.median(times):>9.0f}{times[0]:>9.0f}{times[-1]:>9.0f}")
    if args.json:
        result = {"rows": _ROWS, "runs_ms": runs, **with_what}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
