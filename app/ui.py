"""The page (Gradio 6). Everything that can be done without Gradio is in session.py."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

import gradio as gr
from PIL import Image

from agevlm_mlx.data.scenes import make_scene
from agevlm_mlx.errors import UserError

from .session import Done, Session

#: Fonts that every system has: no request leaves the machine.
_THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
_TITLE = "AgeVLM: see where every word looks"
_LEGEND = (
    "One picture for each word that names something: bright is where the model looked when it "
    "read or said the word, the ring marks the strongest place. *On image* is the attention that "
    "fell on the picture at all. A map shows where the model looked, not that its answer is right."
)


def examples(folder: Path) -> list[list[str]]:
    """Paints example pictures into `folder`; rows of (image path, question)."""
    questions = ("Describe the image.", "Is there a {}?", "Where is the {}?", "Is the {} big or small?")
    rows = []
    for number, question in enumerate(questions):
        scene = make_scene(np.random.default_rng((7, number)), "test")
        path = folder / f"example-{number}.png"
        Image.fromarray(scene.image).resize((384, 384), Image.Resampling.LANCZOS).save(path)
        rows.append([str(path), question.format(scene.nouns[-1])])
    return rows
