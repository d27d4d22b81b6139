"""The page (Gradio 6). Everything that can be done without Gradio is in session.py."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

import gradio as gr
from gradio.themes import Default
from PIL import Image

from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.errors import UserError
from agevlm_mlx.weights import shipped

from .session import Done, Session, WordView

_TITLE = "AgeVLM: see where every word looks"
_LEGEND = (
    "One picture for each word that names something. Bright: where the model looked when it read "
    "the word (asked) or said it (answered); the ring marks the strongest place. The percentage is "
    "the attention that fell on the image at all. A map shows where the model looked, not that "
    "its answer is right."
)
_QUESTIONS = (
    "Describe the image.",
    "Is there a {}?",
    "Where is the {}?",
    "Is the {} big or small?",
)
#: Seconds after which uploads and overlays are deleted, and how often that is looked at.
_KEEP = (3600, 600)


def image_file(**options: Any) -> gr.Image:
    """An image input that gives the path of the uploaded file, unopened.

    Gradio would decode it and fail without a word on a file that is no image; our own loader
    checks it (`Session.ask`) and says what is wrong. Replaced on the instance: Gradio writes a
    stub file next to any module that subclasses a component.
    """
    image = gr.Image(type="filepath", **options)
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def examples(folder: Path) -> list[list[str]]:
    """Paint example pictures into `folder`; rows of (image path, question)."""
    rows = []
    for number, question in enumerate(_QUESTIONS):
        scene = make_scene(2, "test", number)
        path = folder / f"example-{number}.png"
        Image.fromarray(scene.image).resize((512, 512), Image.Resampling.LANCZOS).save(path)
        rows.append([str(path), question.format(scene.nouns[-1])])
    return rows


def _caption(word: WordView) -> str:
    said = "asked" if word.role == "user" else "answered"
    return f"{word.word} ({said}), {100 * word.share:.0f} %"


def build(session: Session, example_rows: list[list[str]]) -> gr.Blocks:
    """The page of one session."""

    def answer(image: str | None, question: str | None) -> Iterator[tuple[Any, Any, Any]]:
        yield "", [], ""
        text = ""
        try:
            for event in session.ask(image, question or ""):
                if isinstance(event, Done):
                    gallery = [(word.picture, _caption(word)) for word in event.words]
                    status = (
                        f"First word after {1000 * event.seconds_to_first:.0f} ms, "
                        f"{event.tokens_per_second:.0f} tokens/s"
                    )
                    yield event.text, gallery, status
                else:
                    text += event.text
                    yield text, [], ""
        except (UserError, RuntimeError) as error:
            # Only sentences of our own reach the page: no path of the server's, no traceback.
            told = str(error).replace(str(image), "the image") if image else str(error)
            yield text, [], f"⚠ {told[:1].upper()}{told[1:]}."

    own = session.path == shipped("model")
    name = "the small one of the package" if own else f"`{session.path.name}`"
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=_KEEP) as page:
        gr.Markdown(f"# {_TITLE}\nModel: {name}, on this computer.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2):
                image = image_file(
                    label="Image",
                    sources=["upload", "webcam", "clipboard"],
                    buttons=[],
                    height=340,
                )
                question = gr.Textbox(
                    label="Question", placeholder="Is there a dog?", lines=1, max_lines=3
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3):
                text = gr.Textbox(label="Answer", interactive=False, lines=2)
                status = gr.Markdown()
                words = gr.Gallery(
                    label="Where each word looked",
                    columns=3,
                    fit_columns=False,
                    object_fit="contain",
                    height="auto",
                    buttons=["fullscreen"],
                )
                gr.Markdown(_LEGEND)
        inputs, outputs = [image, question], [text, words, status]
        gr.Examples(example_rows, inputs, label="Examples", cache_examples=False)
        running = gr.on(
            [ask.click, question.submit],
            answer,
            inputs,
            outputs,
            api_visibility="private",
            # The model's thread takes one question at a time; more may wait for it.
            concurrency_limit=8,
        )
        stop.click(None, None, None, cancels=[running], api_visibility="private")
    return page


def serve(session: Session, *, port: int, share: bool) -> None:
    """Show the page at 127.0.0.1 until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="agevlm-app-") as folder:
        page = build(session, examples(Path(folder)))
        print(f"Chat at http://127.0.0.1:{port} with {session.path}; Ctrl-C ends it.", flush=True)
        try:
            page.launch(
                server_name="127.0.0.1",
                server_port=port,
                share=share,
                show_error=False,
                quiet=not share,
                max_file_size="32mb",
                allowed_paths=[folder],
                footer_links=[],
                # System fonts only: no request leaves the machine.
                theme=Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
            )
        except OSError as error:
            raise UserError(f"--port: {port} is taken; pass another one ({error})") from None
        finally:
            page.close()
