"""A tiny random model, pictures, and an engine in memory for the server's tests."""

import base64
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from PIL import Image

from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data import chat
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.serving.batch import Settings
from agevlm_mlx.serving.engine import Engine
from agevlm_mlx.serving.exchange import Ask, Done, Event, Failed, Piece
from agevlm_mlx.weights import Loaded, load, save_model

TEXTS = ["Is there a dog or a hot dog in the image?", "Where is the car?", "A dog and a car."]


@pytest.fixture(scope="session")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_config: Callable[..., ModelConfig]
) -> Path:
    """A checkpoint whose answers depend on the image and do not end early."""
    mx.random.seed(5)
    tokenizer = TokenizerWrapper(chat.build_tokenizer(TEXTS * 3, 400))
    config = tiny_model_config(400, gate_init=2.0)
    # A context that a test can fill, and more to say than the same word again and again.
    text_config = {
        **config.text_config,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    model = AgeVLM(replace(config, text_config=text_config))
    model.update(tree_map(lambda p: 2 * p if p.ndim == 2 else p, model.parameters()))
    out = tmp_path_factory.mktemp("models") / "tiny"
    save_model(out, model, tokenizer, Preprocessor(image_size=16), "# tiny\n")
    return out


@pytest.fixture(scope="session")
def loaded(folder: Path) -> Loaded:
    """The model in the tests' own thread, for what a single request would answer."""
    return load(folder)


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Some PNG files, all different."""
    return [picture(seed) for seed in range(6)]


def picture(seed: int) -> bytes:
    """A PNG file of 30 x 20 px with a few colours."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((30, 20), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Inbox:
    """Collects what an engine delivers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, n: int = 1, timeout: float = 30) -> list[Event]:
        """The events, once there are `n` of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= n, timeout), self.events
            return list(self.events)

    def end(self, timeout: float = 30) -> Done | Failed:
        """The last event, once it is there."""

        def over() -> bool:
            return bool(self.events) and isinstance(self.events[-1], Done | Failed)

        with self._changed:
            assert self._changed.wait_for(over, timeout), self.events
        last = self.events[-1]
        assert isinstance(last, Done | Failed)
        return last

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Engine]]:
    """``start(max_queue=..., **settings)``: an engine that is closed after the test."""
    engines: list[Engine] = []

    def new(load_it: Any = None, *, max_queue: int = 64, **settings: Any) -> Engine:
        engine = Engine(
            load_it or (lambda: load(folder)), Settings(**settings), max_queue=max_queue
        )
        engines.append(engine)
        return engine

    yield new
    for engine in engines:
        engine.close(30)


def ask(engine: Engine, question: Ask) -> Inbox:
    inbox = Inbox()
    engine.submit(question, inbox)
    return inbox
