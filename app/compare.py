"""The tab that asks two models the same, side by side."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from agevlm_mlx.errors import UserError

from . import parts
from .parts import ANSWERS, AT_ONCE, House
from .session import Session, sentence
from .tabs import EMPTY, asked_again, message_box, taken, unchanged

SIDES = ("left", "right")


@dataclass(frozen=True)
class Compare:
    """The components that the rest of the page fills, left and right."""

    choosers: list[tuple[gr.Dropdown, gr.Radio]]
    pages: list[gr.HTML]


def compare_tab(house: House, settings: list[Any]) -> Compare:
    """The same question to two models, one after the other; `settings` are those of the chat."""
    choosers = []
    with gr.Row():
        for side, precision in (("left", "As stored"), ("right", "4 bits")):
            names = f"compare-{side}-model", f"compare-{side}-bits"
            with gr.Column():
                label = f"{side.capitalize()} model"
                choosers.append(parts.model_chooser(house, label, names, precision))
    message = message_box("compare-message", "Ask both models about a picture")
    with gr.Row(elem_classes="frame-actions"):
        stop = gr.Button("Stop", elem_id="compare-stop", size="sm", interactive=False)
        new = gr.Button("New comparison", elem_id="compare-new", size="sm")
    status = gr.HTML(elem_id="compare-status", apply_default_css=False)
    pages = []
    with gr.Row():
        for side in SIDES:
            with gr.Column():
                pages.append(parts.conversation(house, f"compare-{side}", side.capitalize()))

    def both(request: gr.Request) -> list[Session]:
        return [house.session(request, f"/{side}") for side in SIDES]

    def send(request: gr.Request, asked: dict[str, Any], *chosen: Any) -> Iterator[tuple[Any, ...]]:
        """(left page, right page, status, message, stop button)"""
        try:
            files = house.files(request, asked["files"])
            choices = [house.choice(request, *chosen[:2]), house.choice(request, *chosen[2:4])]
            sessions = both(request)
            for session in sessions:
                parts.tune(session, chosen[4:])
        except UserError as error:
            yield unchanged(error, 5)
            return
        shown = [gr.skip(), gr.skip()]
        running, told = gr.Button(interactive=True), ""
        for number, (session, choice) in enumerate(zip(sessions, choices, strict=True)):
            try:
                if session.choice != choice:
                    for part, step in session.switch(choice):
                        yield *shown, parts.progress_bar(part, step), gr.skip(), running
            except (UserError, RuntimeError) as error:
                told += parts.told_html(f"{('Left', 'Right')[number]} model: {sentence(error)}")
                continue
            before, first = session.state(), True
            for state in session.ask(asked["text"] or "", files):
                shown[number] = state
                emptied = first and not number and taken(before, state)
                yield *shown, told, EMPTY if emptied else gr.skip(), running
                first = False
            last = shown[number]["exchanges"][-1:]
            if not last or last[0]["state"] == "stopped":  # stopped, or begun anew
                break
        ended = [session.state() for session in sessions]
        told += stats_html(ended)
        yield *ended, told, gr.skip(), gr.Button(interactive=False)

    def halt(request: gr.Request) -> None:
        for session in both(request):
            session.stop()

    def reset(request: gr.Request) -> tuple[Any, ...]:
        return *(session.reset() for session in both(request)), "", EMPTY

    inputs = [message, *choosers[0], *choosers[1], *settings]
    message.submit(send, inputs, [*pages, status, message, stop], **ANSWERS)
    stop.click(halt, **AT_ONCE)
    new.click(reset, None, [*pages, status, message], **AT_ONCE)
    parts.note_uploads(house, message)
    for page, side in zip(pages, SIDES, strict=True):
        asked_again(house, page, stop, settings, f"/{side}")
    return Compare(choosers, pages)


def stats_html(states: Sequence[dict[str, Any]]) -> str:
    """A table of how fast each side answered the last question."""
    last = [state["exchanges"][-1] if state["exchanges"] else {} for state in states]
    if not all(exchange.get("stats") for exchange in last):
        return ""
    rows = (
        ("First word", "first_ms", "{:.0f} ms", 1),
        ("Speed", "tokens_per_second", "{:.0f} tokens/s", 1),
        ("Looking at pictures", "image_ms", "{:.0f} ms", 1),
        ("Memory of the pictures", "image_bytes", "{:,.0f} kB", 1e-3),
    )
    body = ""
    for label, name, form, scale in rows:
        body += f"<tr><th scope='row'>{label}</th>"
        for exchange in last:
            value = exchange["stats"][name]  # None: it has no word
            body += f"<td>{'' if value is None else form.format(scale * value)}</td>"
        body += "</tr>"
    head = "".join(f"<th scope='col'>{html.escape(exchange['model'])}</th>" for exchange in last)
    return (
        f"<table class='compared'><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
