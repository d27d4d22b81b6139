"""The three tabs of the page: what is on them, and what each event asks of the tab's `Session`."""

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from agevlm_mlx.errors import UserError

from . import parts
from .parts import ANSWERS, AT_ONCE, House, sentence
from .session import Session

EMPTY = {"text": "", "files": []}
#: What can be asked, to try it.
_TRIES = ("dog, house, fish", "a red car", "A big blue bird is on the left.")
_HEADER = (
    '<div class="frame-header"><h1>AgeVLM: see where every word looks</h1><p>{name}</p>'
    '<p class="here">Everything stays on this computer</p></div>'
)


def header_html(name: str) -> str:
    return _HEADER.format(name=html.escape(name))


@dataclass(frozen=True)
class Chat:
    """The components of the chat that the rest of the page fills or reads."""

    page: gr.HTML
    model: tuple[gr.Dropdown, gr.Radio]
    facts: gr.HTML
    settings: list[Any]
    loaded: Any  # the event after which another model may answer


def message_box(name: str, placeholder: str) -> gr.MultimodalTextbox:
    """A text box that takes pictures; what is no picture is refused in the chat, in words."""
    return gr.MultimodalTextbox(
        show_label=False,
        label="Your question",
        placeholder=placeholder,
        file_count="multiple",
        max_lines=6,
        max_plain_text_length=100_000,
        container=False,
        elem_id=name,
    )


def picture_box(name: str, label: str, sources: Sequence[str], height: int) -> gr.Image:
    """An image input that gives the path of the uploaded file, unopened.

    Gradio would decode it and fail without a word on a file that is no image; the session says
    what is wrong. Replaced on the instance: Gradio writes a stub file next to any module that
    subclasses a component.
    """
    image = gr.Image(
        type="filepath",
        label=label,
        sources=list(sources),  # pyright: ignore[reportArgumentType]
        buttons=[],
        height=height,
        webcam_options=gr.WebcamOptions(mirror=False),
        elem_id=name,
    )
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def chat_tab(house: House, header: gr.HTML) -> Chat:
    """Ask about pictures; the answer's words light them up."""
    page = parts.conversation(house, "page")
    message = message_box("message", "Ask about a picture: drop it here, paste it or attach it")
    with gr.Row(elem_classes="frame-actions"):
        stop = gr.Button("Stop", elem_id="stop", size="sm", interactive=False)
        new = gr.Button("New conversation", elem_id="new", size="sm")
    with gr.Accordion("Camera", open=False, elem_id="camera"):
        photo = picture_box("camera-picture", "Picture for the next question", ["webcam"], 320)
    with gr.Accordion("Model and settings", open=False, elem_id="settings"):
        with gr.Row():
            with gr.Column():
                model = parts.model_chooser(house, "Model", ("model", "bits"), "As stored")
                load = gr.Button("Load", elem_id="load", size="sm")
                loading = gr.HTML(elem_id="loading")
            facts = gr.HTML(elem_id="facts")
        settings = parts.setting_controls()

    def answered(session: Session, states: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """(page, stop button) while an answer grows, and as they are when it has ended."""
        for state in states:
            yield state, gr.Button(interactive=True)
        yield session.state(), gr.Button(interactive=session.busy)

    def send(
        request: gr.Request, asked: dict[str, Any], photo: str | None, *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """(page, stop button, message, photo); these two are emptied once they are taken."""
        session = house.session(request)
        try:
            files = house.files(request, [*asked["files"], photo])
            parts.tune(session, settings)
        except UserError as error:
            yield unchanged(error, 4)
            return
        before, first = session.state(), True
        for shown in answered(session, session.ask(asked["text"] or "", files)):
            emptied = first and taken(before, shown[0])
            yield *shown, *((EMPTY, None) if emptied else (gr.skip(), gr.skip()))
            first = False

    def again(ask: Callable[[Session, Any], Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """A handler of an event of the page that asks something in its place."""

        def handle(event: gr.EventData, request: gr.Request, *settings: Any) -> Iterator[Any]:
            session = house.session(request)
            try:
                parts.tune(session, settings)
            except UserError as error:
                yield unchanged(error, 2)
                return
            yield from answered(session, ask(session, event))

        return handle

    def halt(request: gr.Request) -> None:
        house.session(request).stop()

    def reset(request: gr.Request) -> tuple[Any, Any, Any]:
        return house.session(request).reset(), EMPTY, None

    def load_model(request: gr.Request, label: str | None, precision: str) -> Iterator[Any]:
        """(progress or an error, facts, header, page)"""
        session = house.session(request)
        rest = gr.skip(), gr.skip(), gr.skip()
        try:
            for part, step in session.switch(house.choice(request, label, precision)):
                yield parts.progress_bar(part, step), *rest
        except (UserError, RuntimeError) as error:
            yield parts.told_html(sentence(error)), *rest
            return
        state = session.state()
        yield "", parts.facts_html(session.facts()), header_html(state["model"]["name"]), state

    message.submit(send, [message, photo, *settings], [page, stop, message, photo], **ANSWERS)
    edit = again(lambda session, event: session.edit(event.exchange, event.text))
    page.edit(edit, settings, [page, stop], **ANSWERS)
    retry = again(lambda session, event: session.retry(event.exchange))
    page.retry(retry, settings, [page, stop], **ANSWERS)
    example = again(lambda session, event: session.example(event.id))
    page.example_select(example, settings, [page, stop], **ANSWERS)
    stop.click(halt, **AT_ONCE)
    new.click(reset, None, [page, message, photo], **AT_ONCE)
    parts.note_uploads(house, message)
    parts.note_uploads(house, photo)
    loaded = load.click(load_model, [*model], [loading, facts, header, page], **ANSWERS)
    return Chat(page, model, facts, settings, loaded)


def unchanged(error: UserError, outputs: int) -> tuple[Any, ...]:
    """Say what is wrong over the page, and leave the components as they are: a handler that
    yields nothing would empty them."""
    gr.Warning(sentence(error))
    return (gr.skip(),) * outputs


def taken(before: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether the first state after a question says that it is being answered."""
    known = {exchange["id"] for exchange in before["exchanges"]}
    new = [exchange for exchange in first["exchanges"] if exchange["id"] not in known]
    return bool(new) and new[-1]["state"] != "failed"


def presence_tab(house: House) -> None:
    """Which of some words, and whether a sentence, fits a picture."""
    with gr.Row():
        with gr.Column(scale=2):
            image = picture_box(
                "presence-image",
                "Picture (none: the last one of the chat)",
                ["upload", "webcam", "clipboard"],
                300,
            )
        with gr.Column(scale=3):
            text = gr.Textbox(
                label="Words, with commas between, or a sentence",
                placeholder="house, fish",
                lines=2,
                max_lines=4,
                elem_id="presence-text",
            )
            with gr.Row(elem_classes="frame-tries"):
                for example in _TRIES:
                    button = gr.Button(example, size="sm")
                    button.click(None, None, text, js=f"() => {json.dumps(example)}", **AT_ONCE)
            with gr.Row(elem_classes="frame-actions"):
                stop = gr.Button("Stop", elem_id="presence-stop", size="sm", interactive=False)
                ask = gr.Button("Look", elem_id="presence-ask", variant="primary", size="sm")
    out = gr.HTML(elem_id="presence-out", apply_default_css=False)

    def look(request: gr.Request, text: str | None, path: str | None) -> Iterator[tuple[Any, Any]]:
        running = gr.Button(interactive=True)
        yield parts.progress_bar(None, "looking"), running
        try:
            files = house.files(request, [path])
            tables = house.session(request).presence(text or "", files[0] if files else None)
            for table in tables:
                yield table, running
        except (UserError, RuntimeError) as error:
            yield parts.told_html(sentence(error)), running
        yield gr.skip(), gr.Button(interactive=False)

    asking = gr.on([ask.click, text.submit], look, [text, image], [out, stop], **ANSWERS)
    # Closing the handler's generator ends the work.
    stop.click(
        lambda: (parts.told_html("Stopped."), gr.Button(interactive=False)),
        None,
        [out, stop],
        cancels=[asking],
        **AT_ONCE,
    )
    parts.note_uploads(house, image)


def compare_tab(house: House) -> tuple[tuple[gr.Dropdown, gr.Radio], ...]:
    """The same question to two models, one after the other; their choosers."""
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
        for side in ("left", "right"):
            with gr.Column():
                pages.append(parts.conversation(house, f"compare-{side}", side.capitalize()))

    def both(request: gr.Request) -> list[Session]:
        return [house.session(request, side) for side in ("/left", "/right")]

    def send(request: gr.Request, asked: dict[str, Any], *models: Any) -> Iterator[tuple[Any, ...]]:
        """(left page, right page, status, message, stop button)"""
        try:
            files = house.files(request, asked["files"])
            choices = [house.choice(request, *models[:2]), house.choice(request, *models[2:])]
        except UserError as error:
            yield unchanged(error, 5)
            return
        sessions, shown = both(request), [gr.skip(), gr.skip()]
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
            if shown[number]["exchanges"][-1]["state"] == "stopped":
                break
        ended = [session.state() for session in sessions]
        told += stats_html(ended)
        yield *ended, told, gr.skip(), gr.Button(interactive=False)

    def halt(request: gr.Request) -> None:
        for session in both(request):
            session.stop()

    def reset(request: gr.Request) -> tuple[Any, ...]:
        return *(session.reset() for session in both(request)), "", EMPTY

    inputs = [message, *choosers[0], *choosers[1]]
    message.submit(send, inputs, [*pages, status, message, stop], **ANSWERS)
    stop.click(halt, **AT_ONCE)
    new.click(reset, None, [*pages, status, message], **AT_ONCE)
    parts.note_uploads(house, message)
    return tuple(choosers)


def stats_html(states: Sequence[dict[str, Any]]) -> str:
    """A table of how fast each side answered the last question."""
    last = [state["exchanges"][-1] if state["exchanges"] else {} for state in states]
    if not all(exchange.get("stats") for exchange in last):
        return ""
    rows = {
        "First word": ("first_ms", "{:.0f} ms"),
        "Speed": ("tokens_per_second", "{:.0f} tokens/s"),
        "Looking at pictures": ("image_ms", "{:.0f} ms"),
        "Memory of the pictures": ("image_bytes", "{:,} bytes"),
    }
    body = "".join(
        f"<tr><th scope='row'>{label}</th>"
        + "".join(f"<td>{form.format(exchange['stats'][name])}</td>" for exchange in last)
        + "</tr>"
        for label, (name, form) in rows.items()
    )
    head = "".join(f"<th scope='col'>{html.escape(exchange['model'])}</th>" for exchange in last)
    return (
        f"<table class='compared'><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
