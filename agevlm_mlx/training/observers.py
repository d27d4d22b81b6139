"""Who hears of a run as it goes on, and how a person asks it to stop."""

import errno
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, Protocol

from ..models.agevlm import AgeVLM
from .log import Metrics, Progress


class Observer(Protocol):
    """Who is told of a run as it goes on; on rank 0 only."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row that ``metrics.jsonl`` gets."""
        ...

    def look(self, step: int, model: AgeVLM) -> None:
        """The model after `step` steps: at the start, each ``train.pictures_every``, at the end."""
        ...

    def close(self) -> None:
        """The run ends, for whatever reason."""
        ...


class Tell:
    """Everyone who hears of a step: the metrics file, the progress line, the observers."""

    def __init__(
        self, metrics: Metrics | None, progress: Progress, observers: Sequence[Observer]
    ) -> None:
        self.metrics, self.progress, self.observers = metrics, progress, observers

    def row(self, **row: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(**row)
        for observer in self.observers:
            observer.row(row)

    def sync(self) -> None:
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()
        for observer in self.observers:
            observer.close()


class Lasting:
    """A stream that training outlives: when nobody reads it any more, it says nothing more."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream does."""
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream does."""
        with self._silenced():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a reader that has left, a terminal that is closed
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # In its place, so that what is buffered ends there, too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def finish_the_step(stop: threading.Event) -> Iterator[None]:
    """SIGINT, SIGTERM and a closed terminal (SIGHUP) set `stop`: finish the step, save. A second
    one interrupts at once; what is ignored (nohup) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [s for s in asked if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, handle) for s in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
