"""Who hears of a run as it goes on, and how a person asks it to stop."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

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


@contextmanager
def finish_the_step(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` (finish the step, save); a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
