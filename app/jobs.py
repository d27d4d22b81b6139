"""What the model's thread does for a tab. Each job gets the desk and sends plain values back."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from agevlm_mlx.conversation import Conversation
from agevlm_mlx.data.image import Geometry
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import presence
from agevlm_mlx.evaluation.words import Look
from agevlm_mlx.generation import Response
from agevlm_mlx.image_store import Sight
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.weights import Loaded

from . import catalogue
from .catalogue import Choice
from .desk import Desk, Talk
from .pictures import Shown
from .worker import Send

#: Tokens that an answer should have room for; the oldest turns go before it has less.
ROOM = 64
#: Tokens of the shortest answer whose speed is told.
_RATED = 8


@dataclass(frozen=True)
class Question:
    """A message and all that answering it takes. The images of turns and message are `Shown`."""

    key: str
    choice: Choice
    system: str
    turns: tuple[Turn, ...]
    text: str
    pictures: tuple[Shown, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Forgot:
    """So many of the oldest exchanges went, because the model's context is full."""

    exchanges: int


@dataclass(frozen=True)
class Piece:
    """More text of the answer, perhaps none."""

    text: str


@dataclass(frozen=True)
class Answered:
    """The whole answer and its figures (`stats` of the page). said: whether there is one at all."""

    text: str
    said: bool
    stats: dict[str, Any]


@dataclass(frozen=True)
class Looked:
    """Where every word looked, and how the pictures lay before the model; or a note why not."""

    looks: tuple[Look, ...] = ()
    geometries: tuple[Geometry, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class About:
    """A loaded model, for the page. layers: the numbers of those that look."""

    name: str
    facts: dict[str, str]
    layers: tuple[int, ...]
    heads: int


@dataclass(frozen=True)
class Loading:
    """How far loading is, 0..1, and what is being done."""

    part: float
    step: str


def load(desk: Desk, send: Send, choice: Choice) -> None:
    """Load a model: any number of `Loading`, then its `About`."""
    loaded = desk.model(choice, lambda part, step: send(Loading(part, step)))
    send(Loading(1.0, "warming up"))
    _warm_up(loaded)
    model = loaded.model
    facts = catalogue.facts(loaded, choice)
    send(About(facts["Model"], facts, model.looking_layers, catalogue.heads(model)))


def _warm_up(loaded: Loaded) -> None:
    """Answer once for nobody: MLX compiles what it needs, which can take seconds on a CPU."""
    chat = Conversation(loaded)
    with suppress(UserError):  # it will be said to whoever asks
        list(chat.ask("Is there a dog?", Image.new("RGB", (64, 64)), Sampling(max_tokens=2)))
        chat.looks()


def answer(desk: Desk, send: Send, question: Question, stopped: threading.Event) -> None:
    """Answer: `Forgot` if need be, any number of `Piece`, `Answered`, then `Looked`.

    Setting `stopped` ends the answer; what was said so far stays. Raises as `Conversation.ask`.
    """
    talk = desk.talk(question.key, question.choice, question.system)
    talk.pause = lambda: send(Piece(""))
    start = time.monotonic()
    chat = talk.conversation
    asked = Turn("user", question.text, question.pictures)
    seen, known, seconds = _look(talk, (*question.turns, asked))
    sights = [talk.sights[shown.id] for shown in question.pictures]
    system = tuple(turn for turn in chat.turns if turn.role == "system")
    chat.turns = (*system, *(_seen(talk, turn) for turn in question.turns))
    room = min(ROOM, question.sampling.max_tokens)
    gone, images = chat.make_room(question.text, sights, room)
    if gone:
        send(Forgot(gone))
    last: Response | None = None
    times: list[float] = []  # of the first and the newest token
    pieces: Any = chat.ask(question.text, images, question.sampling)
    try:
        while not stopped.is_set() and (piece := next(pieces, None)) is not None:
            last = piece
            times = [*times[:1], time.monotonic() - start]
            send(Piece(piece.text))
    finally:
        pieces.close()
    stats: dict[str, Any] = {
        "image_ms": 1000 * seconds,
        "images_seen": seen,
        "images_known": known,
        "image_bytes": sum({s.key: s.seen.nbytes for s in _sights(chat)}.values()),
        **_figures(last, times),
    }
    said = last is not None
    send(Answered(chat.turns[-1].text if said else "", said, stats))
    if said:
        send(_looks(chat))


def examine(desk: Desk, send: Send, choice: Choice, data: bytes, text: str) -> None:
    """Ask about a picture word by word: any number of `Examined`, the last one whole."""
    for examined in presence.examine(desk.model(choice), data, text, desk.controls(choice)):
        send(examined)


def _look(talk: Talk, turns: Sequence[Turn]) -> tuple[int, int, float]:
    """Look at every picture of the turns that the model does not remember: how many those were,
    how many it did remember, and the seconds that looking took."""
    pictures = {shown.id: shown for turn in turns for shown in turn.images}
    new = [shown for shown in pictures.values() if shown.id not in talk.sights]
    start = time.monotonic()
    for shown in new:
        try:
            talk.look(shown.id, shown.data)
        except UserError as error:
            raise UserError(f"{shown.name}: {str(error).removeprefix('image: ')}") from None
    seconds = time.monotonic() - start if new else 0.0
    talk.sights = {name: talk.sights[name] for name in pictures}
    return len(new), len(pictures) - len(new), seconds


def _seen(talk: Talk, turn: Turn) -> Turn:
    return replace(turn, images=tuple(talk.sights[shown.id] for shown in turn.images))


def _sights(chat: Conversation) -> list[Sight]:
    return [source for source in chat.image_sources if isinstance(source, Sight)]


def _figures(last: Response | None, times: Sequence[float]) -> dict[str, Any]:
    """What an answer took; the rate is that of the tokens after the first one, if they are enough
    to be more than noise."""
    if last is None:
        return {"first_ms": None, "tokens": 0, "tokens_per_second": None, "prompt_tokens": 0,
                "finish": "stopped"}  # fmt: skip
    tokens, taken = last.generation_tokens, times[-1] - times[0]
    return {
        "first_ms": 1000 * times[0],
        "tokens": tokens,
        "tokens_per_second": (tokens - 1) / taken if tokens >= _RATED and taken > 0 else None,
        "prompt_tokens": last.prompt_tokens,
        "finish": last.finish_reason or "stopped",
    }


def _looks(chat: Conversation) -> Looked:
    sights = _sights(chat)
    if not sights:
        return Looked(note="There is no picture that a word could look at.")
    try:
        looks = tuple(chat.looks())
    except UserError as error:
        return Looked(note=str(error).removeprefix("words: "))
    shown = looks[0].values.shape[2] if looks else 0
    return Looked(
        looks,
        tuple(sight.geometry for sight in sights[:shown]),
        "A model with fusion 'concat' can show only pictures of the first message."
        if 0 < shown < len(sights)
        else None,
    )
