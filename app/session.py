"""The model behind the page: one thread that owns it, and a queue of questions. No Gradio.

MLX arrays belong to the thread that made them, so that one thread loads the model and answers
every question, in the order in which they come.
"""

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from PIL import Image

from agevlm_mlx.conversation import Conversation
from agevlm_mlx.data.image import ImageSource
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.overlay import overlay
from agevlm_mlx.image_store import ImageStore
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.weights import Loaded


@dataclass(frozen=True)
class Piece:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class WordView:
    """One word of the question ("user") or the answer ("assistant") and where it looked.

    share: attention on the image, 0..1; the rest is on nothing in it.
    """

    word: str
    role: str
    picture: Image.Image
    share: float


@dataclass(frozen=True)
class Done:
    """The whole answer, where each of its words looked, and how long it took."""

    text: str
    words: tuple[WordView, ...]
    seconds_to_first: float
    tokens_per_second: float


@dataclass(frozen=True)
class _Failed:
    error: Exception


@dataclass(frozen=True)
class _Job:
    image: ImageSource
    question: str
    max_tokens: int
    events: "queue.SimpleQueue[Piece | Done | _Failed]" = field(default_factory=queue.SimpleQueue)
    unwanted: threading.Event = field(default_factory=threading.Event)


class Session:
    """Answers questions about images. Safe to use from any number of threads."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        """`load` is called in the session's own thread; what it raises is raised here."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        started: queue.SimpleQueue[Exception | Path] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, args=(load, started), name="model", daemon=True
        )
        self._thread.start()
        outcome = started.get()
        if isinstance(outcome, Exception):
            self._thread.join()
            raise outcome
        #: The checkpoint that answers.
        self.path = outcome

    def ask(
        self, image: ImageSource | None, question: str, *, max_tokens: int = 256
    ) -> Iterator[Piece | Done]:
        """The answer as it is made: any number of `Piece`, then `Done`.

        Closing the iterator stops the model. Raises ``UserError`` for what a person can put
        right, ``RuntimeError`` with a plain sentence when the model itself fails.
        """
        if image is None:
            raise UserError("no image yet; drop one, paste one or take one with the camera")
        if not question.strip():
            raise UserError('the question is empty; try "Describe the image."')
        if self._closed.is_set():
            raise RuntimeError("the model is closed")
        job = _Job(image, question.strip(), max_tokens)
        self._jobs.put(job)
        return self._events(job)

    def _events(self, job: _Job) -> Iterator[Piece | Done]:
        try:
            while True:
                event = job.events.get()
                if isinstance(event, _Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            job.unwanted.set()

    def close(self) -> None:
        """Stop the thread; questions still waiting fail. Waits for the one under way."""
        self._closed.set()
        self._jobs.put(None)
        self._thread.join()

    # --- in the model's own thread ---------------------------------------------------------

    def _work(
        self, load: Callable[[], Loaded], started: "queue.SimpleQueue[Exception | Path]"
    ) -> None:
        try:
            try:
                loaded = load()
            except Exception as error:
                started.put(error)
                return
            started.put(loaded.path)
            store = ImageStore(loaded.model, loaded.preprocessor)
            while (job := self._jobs.get()) is not None:
                if not job.unwanted.is_set():
                    self._answer(loaded, store, job)
            while not self._jobs.empty():
                if waiting := self._jobs.get():
                    waiting.events.put(_Failed(RuntimeError("the model is closed")))
        finally:
            # Without it MLX 0.32 aborts the process at exit, in one of four runs.
            mx.clear_streams()

    def _answer(self, loaded: Loaded, store: ImageStore, job: _Job) -> None:
        try:
            for event in _stream(loaded, store, job):
                if job.unwanted.is_set() or self._closed.is_set():
                    job.events.put(_Failed(RuntimeError("stopped")))
                    return
                if not isinstance(event, Piece) or event.text:
                    job.events.put(event)
        except UserError as error:
            job.events.put(_Failed(error))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            told = f"the model failed ({type(error).__name__}); the terminal says more"
            job.events.put(_Failed(RuntimeError(told)))


def _stream(loaded: Loaded, store: ImageStore, job: _Job) -> Iterator[Piece | Done]:
    start = time.monotonic()
    chat = Conversation(loaded, store=store)
    last, first = None, 0.0
    sampling = Sampling(max_tokens=job.max_tokens)
    for last in chat.ask(job.question, job.image, sampling):
        first = first or time.monotonic() - start
        yield Piece(last.text)  # also an empty one: between two, a job can be stopped
    (picture,) = chat.pictures()
    words = []
    for word in chat.word_maps():
        shown = overlay(picture.image, word.maps[0], picture.geometry)
        words.append(WordView(word.word, word.role, shown, word.on_image))
    said = chat.turns[-1].text
    yield Done(said, tuple(words), first, last.generation_tps if last else 0.0)
