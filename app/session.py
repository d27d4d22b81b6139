"""One tab's conversation, as plain data; the model's own side of it lies on the desk."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from agevlm_mlx.data.image import load_image
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.presence import Examined
from agevlm_mlx.sampling import Sampling

from . import jobs, presence
from .catalogue import Choice, told
from .desk import Desk
from .exchange import Exchange
from .jobs import About
from .pictures import Shown, data_url, take
from .worker import Ahead, Send, Stream, Worker

#: Characters of a question, pictures of a message and of a conversation, and their bytes.
MAX_TEXT, MAX_PICTURES, MAX_ALL_PICTURES, MAX_BYTES = 8000, 8, 32, 256 << 20
#: Of so many exchanges, the newest ones, the maps of every head are kept; of others their mean.
MAPS_KEPT = 8
#: Seconds between two states while an answer grows: more than a screen shows is of no use.
FRAME = 1 / 30

File = tuple[str, bytes]
State = dict[str, Any]


class Session:
    """What one tab asked, was answered and showed.

    Methods may be called from any thread; one question at a time is answered. What a person can
    put right becomes a sentence in the conversation.
    """

    def __init__(
        self,
        worker: Worker,
        choice: Choice,
        about: About,
        *,
        sampling: Sampling | None = None,
        system: str = "",
        examples: Sequence[tuple[str, Shown]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        #: What the page shows to ask for this tab's pictures and maps. Never exported.
        self.key = secrets.token_urlsafe(24)
        self.choice, self.about = choice, about
        self.sampling, self.system = sampling or Sampling(), system
        self._worker, self._examples = worker, tuple(examples)
        self._exchanges: list[Exchange] = []
        self._next_id = 1
        self._notes = list(notes)
        self._lock = threading.Lock()
        #: Of the answer that is being made: set to end it, and what comes of it.
        self._stop: threading.Event | None = None
        self._stream: Stream | None = None
        self._closed = False
        self._working = 0
        self._touched = time.monotonic()

    # --- what the page shows -----------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a question is being answered."""
        return self._stop is not None

    def idle(self) -> float:
        """Seconds since anyone asked for anything; 0 while something is being done."""
        return 0.0 if self.busy or self._working else time.monotonic() - self._touched

    def state(self) -> State:
        """Everything that the page shows but pictures and maps; JSON values."""
        about = self.about
        return {
            "key": self.key,
            "busy": self.busy,
            "model": {"name": about.name, "layers": list(about.layers), "heads": about.heads},
            "examples": [{"id": shown.id, "question": text} for text, shown in self._examples],
            "exchanges": [exchange.describe() for exchange in self._exchanges],
        }

    def pictures(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Pictures of this tab (and the examples), by their ids; others are left out."""
        self._touch()
        own = {shown.id: shown for exchange in self._exchanges for shown in exchange.pictures}
        own |= {shown.id: shown for _, shown in self._examples}
        wanted = dict.fromkeys(name for name in ids if isinstance(name, str))
        return [_picture(own[name]) for name in wanted if name in own]

    def looks(
        self, exchange: int, layer: int | None = None, head: int | None = None
    ) -> dict[str, Any]:
        """Where the words of an exchange looked, for one looking layer and head, counted from 0
        (None: the mean). What the exchange does not have is the mean, too."""
        self._touch()
        found = self._find(exchange)
        if found is None or not found.ended:
            return {"exchange": None, "pictures": [], "words": [], "note": "No such answer."}
        return found.where(layer, head)

    def facts(self) -> dict[str, str]:
        """What is known of the model, by label."""
        return self.about.facts

    # --- asking ------------------------------------------------------------------------------

    def ask(self, text: str, files: Sequence[File] = ()) -> Iterator[State]:
        """Ask about the pictures so far and those of `files` (name, bytes): the state as it grows.

        Nothing happens while another question is being answered.
        """
        return self._ask(text, lambda: self._take(files))

    def example(self, id: str) -> Iterator[State]:
        """Ask the question of an example about its picture."""
        text, shown = next((e for e in self._examples if e[1].id == id), ("", None))
        return self._ask(text, lambda: (shown,) if shown else ())

    def edit(self, exchange: int, text: str) -> Iterator[State]:
        """Ask another question instead of an earlier one; what came after it is dropped."""
        found = self._find(exchange)
        if found is None:
            return iter([self.state()])
        return self._ask(text, lambda: _pictures_of(found), found)

    def retry(self, exchange: int) -> Iterator[State]:
        """Ask a question again; what came after it is dropped."""
        found = self._find(exchange)
        if found and not self.busy and found.state == "done" and found.model == self.about.name:
            self._notes += self._same_again()
        return self.edit(exchange, found.question if found else "")

    def _same_again(self) -> list[str]:
        chosen = self.sampling
        why = "the seed is given" if chosen.seed is not None else "the temperature is 0"
        sampled = chosen.temp > 0 and chosen.seed is None
        return [] if sampled else [f"Asked again: {why}, so expect the same answer."]

    def stop(self) -> None:
        """End the answer that is being made, if any; what was said so far stays."""
        with self._lock:
            if self._stop is not None:
                self._stop.set()
            # Before its first word the model is not waited for: it may be reading for long.
            if self._stream is not None and not any(e.answer for e in self._exchanges[-1:]):
                self._stream.close()

    def reset(self) -> State:
        """Forget the conversation and its pictures."""
        self.stop()
        with self._lock:
            self._exchanges = []
            # Under the lock: no question of now may come after it.
            self._worker.post(lambda desk: desk.forget(self.key))
        self._touch()
        return self.state()

    def switch(self, choice: Choice) -> Iterator[tuple[float, str]]:
        """Load another model, which goes on with the conversation: (0..1, what is being done).

        Raises ``UserError`` or ``RuntimeError``, with the model as it was.
        """
        with self._at_work(lambda desk, send: jobs.load(desk, send, choice)) as events:
            try:
                for event in events:
                    if isinstance(event, About):
                        with self._lock:
                            self.choice, self.about = choice, event
                    elif isinstance(event, Ahead):
                        yield 0.0, f"waiting, {event.count} before" if event.count else "loading"
                    else:
                        yield event.part, event.step
            except UserError as error:
                raise UserError(told(error, choice)) from None

    def answer(self, exchange: int) -> str:
        """The text of an answer; empty for one that there is not."""
        found = self._find(exchange)
        return found.answer if found else ""

    def presence(
        self, text: str, file: File | None = None, exchange: int | None = None
    ) -> Iterator[str]:
        """Ask about a picture word by word: the table as it grows, as HTML.

        The picture is that of `file`, or the last one that an exchange was about (None: of the
        conversation). Raises ``UserError`` and ``RuntimeError``.
        """
        shown = take(*file) if file else self._last_picture(exchange)
        picture, choice = load_image(shown.data), self.choice
        with self._at_work(
            lambda desk, send: jobs.examine(desk, send, choice, shown.data, text)
        ) as events:
            for event in events:
                if isinstance(event, Examined):
                    yield presence.table(event, picture)

    @contextmanager
    def _at_work(self, job: Callable[[Desk, Send], None]) -> Iterator[Stream]:
        """What a job sends; meanwhile the conversation is not idle."""
        with self._lock:
            self._working += 1
        try:
            with closing(self._worker.stream(job)) as events:
                yield events
        finally:
            with self._lock:
                self._working -= 1
            self._touch()

    def _last_picture(self, exchange: int | None) -> Shown:
        found = None if exchange is None else self._find(exchange)
        for one in [found] if found else reversed(self._exchanges):
            if pictures := one.seen or one.pictures:
                return pictures[-1]
        raise UserError("expected a picture; drop one here, or show one in the chat first")

    def close(self) -> None:
        """Stop what is under way and let go of everything; nothing can be asked any more."""
        self._closed = True
        self.reset()

    def _ask(
        self,
        text: str,
        pictures: Callable[[], tuple[Shown, ...]],
        instead_of: Exchange | None = None,
    ) -> Iterator[State]:
        stop = threading.Event()
        exchange = self._begin(text, instead_of, stop)
        if exchange is None:  # another question is being answered, or the tab is closed
            yield self.state()
            return
        try:
            exchange.unread = True
            exchange.pictures = pictures()
            exchange.unread = False
            exchange.notes += [shown.note for shown in exchange.pictures if shown.note]
            self._check(exchange)
            yield from self._answer(exchange, stop)
        except (UserError, RuntimeError) as error:
            exchange.state, exchange.error = "failed", sentence(error)
        finally:
            if exchange.state in ("waiting", "reading", "answering"):
                exchange.state = "stopped"
            self._stop = None
            self._touch()
        yield self.state()

    def _begin(
        self, text: str, instead_of: Exchange | None, stop: threading.Event
    ) -> Exchange | None:
        # Half of a surrogate pair can be in what a browser sends, but in no JSON or UTF-8.
        question = text.encode("utf-8", "replace").decode().strip()
        with self._lock:
            if self._stop is not None or self._closed:
                return None
            self._stop = stop
            if instead_of in self._exchanges:
                del self._exchanges[self._exchanges.index(instead_of) :]
                for earlier in self._exchanges:
                    earlier.forgotten = False  # there may be room for it again
            about, notes = self.about, self._notes
            exchange = Exchange(self._next_id, question, about.name, about.layers, notes=notes)
            self._notes = []
            self._next_id += 1
            self._exchanges.append(exchange)
            return exchange

    def _take(self, files: Sequence[File]) -> tuple[Shown, ...]:
        if len(files) > MAX_PICTURES:
            raise UserError(
                f"expected at most {MAX_PICTURES} pictures in a message, got {len(files)}; "
                "show the others with the next one"
            )
        return tuple(take(name, data) for name, data in files)

    def _check(self, exchange: Exchange) -> None:
        if not exchange.question:
            raise UserError('the question is empty; try "Describe the image."')
        for what, text in (("", exchange.question), ("system prompt: ", self.system)):
            if len(text) > MAX_TEXT:
                raise UserError(
                    f"{what}expected at most {MAX_TEXT} characters, got {len(text)}; shorten it"
                )
        every = [shown for one in self._exchanges for shown in one.pictures]
        size = sum(len(shown.data) for shown in every)
        if len(every) > MAX_ALL_PICTURES or size > MAX_BYTES:
            exchange.pictures = ()
            raise UserError(
                f"expected at most {MAX_ALL_PICTURES} pictures and {MAX_BYTES >> 20} MB in a "
                f"conversation, got {len(every)} and {size >> 20} MB; start a new one"
            )

    def _answer(self, exchange: Exchange, stop: threading.Event) -> Iterator[State]:
        with self._lock:
            if stop.is_set():  # perhaps the exchange is none of the conversation any more
                return
            # The model may have changed while the pictures were read.
            exchange.model, exchange.layers = self.about.name, self.about.layers
            turns, pictures = self._turns(exchange)
            exchange.seen = (*(shown for turn in turns for shown in turn.images), *pictures)
            if not exchange.seen:
                exchange.notes.append("There is no picture yet: the language model answers alone.")
            question = jobs.Question(self.key, self.choice, self.system, turns, exchange.question,
                                     pictures, self.sampling)  # fmt: skip
            self._stream = self._worker.stream(
                lambda desk, send: jobs.answer(desk, send, question, stop)
            )
        shown = 0.0
        try:
            for event in self._stream:
                self._apply(exchange, event)
                if not isinstance(event, jobs.Piece) or time.monotonic() - shown >= FRAME:
                    shown = time.monotonic()
                    yield self.state()
        finally:
            self._stream.close()
            self._stream = None
        if exchange.stats and exchange.stats["finish"] != "stopped":
            exchange.state = "done"

    def _apply(self, exchange: Exchange, event: Any) -> None:
        match event:
            case Ahead(count):
                exchange.state, exchange.ahead = ("waiting" if count else "reading"), count
            case jobs.Forgot(count):
                kept = [e for e in self._exchanges if e.said and not e.forgotten]
                for old in kept[:count]:
                    old.forgotten = True
                many = "exchange was" if count == 1 else f"{count} exchanges were"
                exchange.notes.append(
                    f"The oldest {many} forgotten, because the model's context is full. "
                    "Pictures are still known."
                )
            case jobs.Piece(text):
                exchange.answer = (exchange.answer + text).lstrip()
                exchange.state = "answering" if exchange.answer else exchange.state
            case jobs.Answered(text, said, stats):
                exchange.answer, exchange.said, exchange.stats = text, said, stats
            case jobs.Looked(looks, geometries, note):
                exchange.looks, exchange.geometries, exchange.no_looks = looks, geometries, note
                exchange.seen = exchange.seen[: len(geometries)]  # concat shows the first ones
                for old in [e for e in self._exchanges if e.looks][:-MAPS_KEPT]:
                    old.thin()

    def _turns(self, until: Exchange) -> tuple[tuple[Turn, ...], tuple[Shown, ...]]:
        """What the model is told before an exchange, and the pictures to ask it with. Those of
        what it forgot belong to what comes next."""
        turns: list[Turn] = []
        moved: tuple[Shown, ...] = ()
        for exchange in self._exchanges[: self._exchanges.index(until)]:
            if exchange.said and exchange.forgotten:
                moved += exchange.pictures
            elif exchange.said:
                turns += [
                    Turn("user", exchange.question, moved + exchange.pictures),
                    Turn("assistant", exchange.answer),
                ]
                moved = ()
        return tuple(turns), moved + until.pictures

    def _find(self, id: int) -> Exchange | None:
        return next((exchange for exchange in self._exchanges if exchange.id == id), None)

    def _touch(self) -> None:
        self._touched = time.monotonic()


def _pictures_of(exchange: Exchange) -> tuple[Shown, ...]:
    """The pictures that an exchange was to show."""
    if exchange.unread:
        raise UserError("its pictures could not be read; ask anew, with others")
    return exchange.pictures


def _picture(shown: Shown) -> dict[str, Any]:
    width, height = shown.size
    return {"id": shown.id, "name": shown.name, "width": width, "height": height,
            "src": data_url(shown)}  # fmt: skip


def sentence(error: Exception) -> str:
    """An error of ours as a sentence; a file's name at its beginning stays as it is."""
    text = str(error)
    first = text.split(" ", 1)[0]
    return f"{text[:1].upper() if first.isalpha() else text[:1]}{text[1:].rstrip('.')}."
