"""The three tabs of the page: what is on them, and what each event asks of the tab's `Session`."""

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from agevlm_mlx.errors import UserError

from . import parts
from .parts import ANSWERS, AT_ONCE, House
from .session import Session, sentence

#: The second tab of the page, and how a script goes there.
PRESENCE = "Is it in the picture?"
_TO_PRESENCE = f"""() => {{
  const tabs = [...document.querySelectorAll("button[role=tab]")];
  tabs.find((tab) => tab.textContent.trim() === {json.dumps(PRESENCE)})?.click();
  return [];
}}"""
EMPTY = {"text": "", "files": []}
#: What can be asked, to try it.
_TRIES = ("dog, house, fish", "a red car", "A big blue bird is on the left.")
_HEADER = (
    '<div class="frame-header"><h1>AgeVLM: see where every word looks</h1><p>{name}</p>'
    '<p class="here">{where}</p></div>'
)


def header_html(name: str, shared: bool) -> str:
    """The line at the top. shared: whether others than this computer's user may read it."""
    where = (
        "What you show goes to the computer that shares this page"
        if shared
        else "Everything stays on this computer"
    )
    return _HEADER.format(name=html.escape(name), where=where)


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

    def send(
        request: gr.Request, asked: dict[str, Any], photo: str | None, *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """(page, stop button, message, photo); these two are emptied once they are taken."""
        session = house.session(request)
        try:
            if session.busy:
                raise UserError("an answer is being made; wait for it, or stop it first")
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
        yield (
            "",
            parts.facts_html(session.facts()),
            header_html(state["model"]["name"], house.shared),
            state,
        )

    message.submit(send, [message, photo, *settings], [page, stop, message, photo], **ANSWERS)
    asked_again(house, page, stop, settings)
    stop.click(halt, **AT_ONCE)
    new.click(reset, None, [page, message, photo], **AT_ONCE)
    parts.note_uploads(house, message)
    parts.note_uploads(house, photo)
    loaded = load.click(load_model, [*model], [loading, facts, header, page], **ANSWERS)
    return Chat(page, model, facts, settings, loaded)


def answered(session: Session, states: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """(page, stop button) while an answer grows, and as they are when it has ended."""
    for state in states:
        yield state, gr.Button(interactive=True)
    yield session.state(), gr.Button(interactive=session.busy)


def asked_again(
    house: House, page: gr.HTML, stop: gr.Button, settings: list[Any], side: str = ""
) -> None:
    """What the buttons in a conversation do: edit a question, ask it again, ask an example."""
    asks: dict[str, Callable[[Session, Any], Iterator[Any]]] = {
        "edit": lambda session, event: session.edit(event.exchange, event.text),
        "retry": lambda session, event: session.retry(event.exchange),
        "example_select": lambda session, event: session.example(event.id),
    }

    def handler(ask: Callable[[Session, Any], Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def handle(event: gr.EventData, request: gr.Request, *settings: Any) -> Iterator[Any]:
            session = house.session(request, side)
            try:
                parts.tune(session, settings)
            except UserError as error:
                yield unchanged(error, 2)
                return
            yield from answered(session, ask(session, event))

        return handle

    for name, ask in asks.items():
        getattr(page, name)(handler(ask), settings, [page, stop], **ANSWERS)


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


@dataclass(frozen=True)
class Presence:
    """The components of the second tab that "Check" fills."""

    image: gr.Image
    text: gr.Textbox
    out: gr.HTML
    stop: gr.Button


def presence_tab(house: House) -> Presence:
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
        session = house.session(request)

        def tables() -> Iterator[str]:
            files = house.files(request, [path])
            return session.presence(text or "", files[0] if files else None)

        yield from looked(tables)

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
    return Presence(image, text, out, stop)


def looked(tables: Callable[[], Iterator[str]]) -> Iterator[tuple[Any, Any]]:
    """(table, stop button) while words are looked for."""
    running = gr.Button(interactive=True)
    yield parts.progress_bar(None, "looking"), running
    try:
        for table in tables():
            yield table, running
    except (UserError, RuntimeError) as error:
        yield parts.told_html(sentence(error)), running
    yield gr.skip(), gr.Button(interactive=False)


def checked(house: House, page: gr.HTML, presence: Presence, side: str = "") -> None:
    """The button "Check" of an answer: its words in the second tab, each by itself."""

    def check(event: gr.EventData, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        session = house.session(request, side)
        text = session.answer(event.exchange)
        filled: tuple[Any, ...] = None, text
        for shown in looked(lambda: session.presence(text, exchange=event.exchange)):
            yield *filled, *shown
            filled = gr.skip(), gr.skip()

    outputs = [presence.image, presence.text, presence.out, presence.stop]
    # Gradio's own way to select a tab does nothing when it selected the same one before.
    page.check(check, None, outputs, js=_TO_PRESENCE, **ANSWERS)
