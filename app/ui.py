"""The page (Gradio 6): its looks, what opens and closes with a tab of the browser, the server.

Everything that can be done without Gradio is in session.py and below.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

import gradio as gr
from gradio.themes import Base
from gradio.themes.utils.colors import Color
from gradio.tunneling import CURRENT_TUNNELS

from agevlm_mlx.errors import UserError

from . import compare, export, presence, tabs
from .guard import Guard
from .parts import QUIET, WAITING, House, facts_html, settings_of, tab_of
from .pictures import MAX_UPLOAD
from .sessions import Sessions
from .uploads import Uploads

TITLE = "AgeVLM: see where every word looks"
#: Seconds between two looks for forgotten uploads, and the age at which they are deleted.
_FORGOTTEN = (600, 3600)
#: Gradio's thumbnails say that they are items of a list, but they are in none.
_REPAIRS = """
const items = document.getElementsByClassName("thumbnail-wrapper");
const repair = () => { for (const item of items) item.setAttribute("role", "group"); };
new MutationObserver(repair).observe(document, {childList: true, subtree: true});
"""


class PortTaken(UserError):
    """Another program has the port."""


@dataclass(frozen=True)
class Addresses:
    """Where the page is; no slash at the end. public: only with ``share``."""

    local: str
    public: str | None = None


def build(house: House) -> gr.Blocks:
    """The page. Each tab of a browser that opens it gets a session of its own."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=_FORGOTTEN) as page:
        header = gr.HTML(
            tabs.header_html("", house.shared), elem_id="header", apply_default_css=False
        )
        with gr.Tabs():
            with gr.Tab("Chat"):
                chat = tabs.chat_tab(house, header)
            with gr.Tab(tabs.PRESENCE):
                second = tabs.presence_tab(house)
            with gr.Tab("Compare"):
                both = compare.compare_tab(house, chat.settings)
        for asked, side in zip((chat.page, *both.pages), ("", "/left", "/right"), strict=True):
            tabs.checked(house, asked, second, side)
        left, right = both.choosers

        def opened(request: gr.Request) -> tuple[Any, ...]:
            session = house.sessions.open(tab_of(request))
            labels = list(house.models())
            label, precision = house.chosen(session.choice)
            chooser = gr.Dropdown(labels, value=label)
            state = session.state()
            header_now = tabs.header_html(state["model"]["name"], house.shared)
            told = header_now, facts_html(session.facts())
            models = chooser, precision, chooser, precision, chooser, _other(precision)
            return state, *told, *models, *settings_of(session)

        def current(request: gr.Request) -> tuple[Any, ...]:
            label, precision = house.chosen(house.session(request).choice)
            return label, precision, _other(precision)

        def closed(request: gr.Request) -> None:
            house.sessions.close(tab_of(request))  # and those of Compare

        page.load(
            opened,
            None,
            [chat.page, header, chat.facts, *chat.model, *left, *right, *chat.settings],
            concurrency_limit=WAITING,
            **QUIET,
        )
        chat.loaded.then(current, None, [*left, right[1]], **QUIET)
        page.unload(closed)
    return page


def _other(precision: str) -> str:
    """A precision to compare with, so that Compare is of use at once."""
    return "As stored" if precision == "4 bits" else "4 bits"


def _head() -> str:
    """Our style sheets and what puts Gradio's own page right.

    Not given to Gradio as `css`: it would add to every selector and drop @container.
    """
    frame = Path(__file__).with_name("frame.css").read_text(encoding="utf-8")
    return f"<style>{export.style()}{presence.style()}{frame}</style><script>{_REPAIRS}</script>"


def theme() -> Base:
    """System fonts, so that no request leaves the computer; one quiet colour, that of the maps."""
    blue = Color(
        "#f3f5fb", "#e6eaf5", "#ccd5ea", "#a9b8db", "#8399c9", "#5f79b3",
        "#3b528b", "#334778", "#2b3c64", "#243252", "#182138",
    )  # fmt: skip
    return Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue="zinc",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="white",
        body_background_fill_dark="*neutral_900",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="*neutral_800",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_label_background_fill_dark="*neutral_900",
        block_shadow="none",
        border_color_primary_dark="*neutral_700",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        input_background_fill="white",
        input_background_fill_dark="*neutral_800",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        button_small_padding="6px 14px",
        button_small_radius="*radius_md",
        button_small_text_size="*text_sm",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
    )


@contextmanager
def running(
    sessions: Sessions,
    *,
    port: int,
    share: bool = False,
    auth: Sequence[tuple[str, str]] = (),
    extra_models: Sequence[Path] = (),
) -> Iterator[Addresses]:
    """The page, served in threads of its own while the block runs; `sessions` stay open.

    `PortTaken`, or ``UserError`` if `share` gave no address.
    """
    _no_proxy()
    with tempfile.TemporaryDirectory(prefix="agevlm-app-") as folder:
        # Where Gradio puts uploads and looks for files that it may serve.
        os.environ["GRADIO_TEMP_DIR"] = os.environ["GRADIO_EXAMPLES_CACHE"] = folder
        uploads = Uploads(Path(folder))
        sessions.when_freed = uploads.forget
        page = build(House(sessions, uploads, extra_models, shared=share))
        try:
            try:
                page.launch(
                    server_name="127.0.0.1",
                    server_port=port,
                    share=share,
                    auth=list(auth) or None,
                    prevent_thread_lock=True,
                    quiet=True,
                    show_error=False,
                    max_threads=4 * WAITING,
                    # Gradio keeps what a tab's components looked like after the tab is closed.
                    state_session_capacity=WAITING,
                    max_file_size=MAX_UPLOAD,
                    footer_links=[],
                    run_history=False,
                    enable_monitoring=False,
                    ssr_mode=False,
                    mcp_server=False,
                    pwa=False,
                    app_kwargs={"middleware": [(Guard, (), {"share": share})]},
                    theme=theme(),
                    head=_head(),
                )
            except OSError:
                raise PortTaken(
                    f"--port: {port} cannot be opened; it is taken, or this computer is too busy: "
                    "try again, or pass another one"
                ) from None
            if share and not page.share_url:
                raise UserError(
                    "--share: expected a public address, got none; leave --share out, or see "
                    "whether this computer can reach the internet"
                )
            # Gradio's page for shared addresses takes its scripts from another host.
            page.share = False
            yield Addresses(f"http://127.0.0.1:{port}", page.share_url)
        finally:
            page.close(verbose=False)
            for tunnel in CURRENT_TUNNELS:
                tunnel.kill()


def _no_proxy() -> None:
    """Gradio asks its own server whether it is there, which no proxy can know."""
    names = ("no_proxy", "NO_PROXY")
    known = next((os.environ[name] for name in names if os.environ.get(name)), "")
    for name in names:
        os.environ[name] = ",".join(filter(None, (known, "127.0.0.1")))
