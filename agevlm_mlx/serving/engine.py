"""The thread that owns the model, and the queue before it. No HTTP.

MLX arrays belong to the thread that made them: one thread loads the model, looks at images and
makes every step of the batch. Any number of threads may submit, cancel and ask how it is.
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..weights import Loaded
from .batch import Batch, Row, Settings
from .exchange import Ask, Busy, Closed, Done, Event, Expired, Failed, ModelFailure, Piece


@dataclass(eq=False)
class Job:
    """One submitted conversation. deliver: gets the events, in the model's thread."""

    ask: Ask
    deliver: Callable[[Event], None]
    deadline: float | None
    unwanted: bool = False


class Engine:
    """Answers conversations, several at a time, first come first served."""

    def __init__(
        self, load: Callable[[], Loaded], settings: Settings | None = None, *, max_queue: int = 64
    ) -> None:
        """`load` is called in the engine's own thread; what it raises is raised here."""
        self._settings = settings or Settings()
        self._max_queue = max_queue
        self._waiting: deque[Job] = deque()
        self._running: dict[Row, Job] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._batch: Batch | None = None
        self._answers = self._failures = 0
        #: What the caches held when it changed last; only the model's thread may count.
        self._caches: dict[str, dict[str, int]] = {}
        started = threading.Event()
        outcome: list[Any] = []
        self._thread = threading.Thread(
            target=self._work, args=(load, outcome, started), name="model", daemon=True
        )
        self._thread.start()
        try:
            started.wait()
        except BaseException:  # Ctrl-C
            self.close(10)
            raise
        if isinstance(outcome[0], Exception):
            self._thread.join()
            raise outcome[0]
        #: The checkpoint that answers.
        self.path: Path = outcome[0]

    def submit(
        self, ask: Ask, deliver: Callable[[Event], None], *, timeout: float | None = None
    ) -> Job:
        """Queue a conversation.

        `deliver` is called with any number of `Piece` and then one `Done` or `Failed`; nothing
        after `cancel`. ``Busy`` when the queue is full, ``Closed`` when the model is gone.
        """
        job = Job(ask, deliver, None if timeout is None else time.monotonic() + timeout)
        with self._changed:
            if self._closing:
                raise Closed
            # Those that will join at the next step wait for nobody.
            joining = max(0, self._settings.decode_concurrency - len(self._running))
            if len(self._waiting) >= self._max_queue + joining:
                raise Busy
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """The answer is not wanted any more; its place is free after the step under way."""
        with self._changed:
            job.unwanted = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """End the thread after the step under way; what is not answered fails with `Closed`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def status(self) -> dict[str, Any]:
        """What ``/health`` says."""
        alive = self._thread.is_alive() and not self._closing
        status: dict[str, Any] = {
            "status": "ok" if alive else "closed",
            "running": len(self._running),
            "queue_length": len(self._waiting),
            "max_queue": self._max_queue,
            "answers": self._answers,
            "failures": self._failures,
        }
        status |= self._caches
        status["memory"] = {
            "active": mx.get_active_memory(),
            "peak": mx.get_peak_memory(),
            "cache": mx.get_cache_memory(),
        }
        return status

    # --- in the model's own thread ---------------------------------------------------------

    def _work(
        self, load: Callable[[], Loaded], outcome: list[Any], started: threading.Event
    ) -> None:
        try:
            try:
                loaded = load()
                self._batch = batch = Batch(loaded, self._settings)
            except Exception as error:
                outcome.append(error)
                return
            outcome.append(loaded.path)
            started.set()
            self._count(batch)
            while self._something_to_do():
                self._round(batch)
            batch.close()
        finally:
            started.set()
            with self._changed:
                self._closing = True
                left = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for job in left:
                _tell(job, Failed(Closed()))
            # Without it MLX 0.32 aborts the process at exit, in one of four runs.
            mx.clear_streams()

    def _something_to_do(self) -> bool:
        """Waits for it; False when the engine is closed."""
        with self._changed:
            while not (self._closing or self._waiting or self._running):
                self._changed.wait()
            return not self._closing

    def _round(self, batch: Batch) -> None:
        """Who leaves, who joins, one step for all."""
        self._drop(batch)
        for _ in range(min(batch.free, self._settings.prompt_concurrency)):
            with self._changed:
                job = self._waiting.popleft() if self._waiting else None
            if job is None:
                break
            self._join(batch, job)
        try:
            for row, event in batch.step():
                job = self._running[row]
                if not isinstance(event, Piece):
                    del self._running[row]
                    self._count(batch)
                if isinstance(event, Failed):
                    self._failures += 1
                    event = Failed(_told(event.error))
                elif isinstance(event, Done):
                    self._answers += 1
                _tell(job, event)
        except Exception as error:
            self._fail_all(batch, error)

    def _drop(self, batch: Batch) -> None:
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._waiting if _late(job, now)]
            for job in late:
                self._waiting.remove(job)
        for row, job in list(self._running.items()):
            expired = _late(job, now)
            if job.unwanted or expired:
                del self._running[row]
                batch.remove(row)
                late += [job] if expired else []
        for job in late:
            _tell(job, Failed(Expired()))

    def _join(self, batch: Batch, job: Job) -> None:
        try:
            row = batch.add(job.ask)
        except UserError as error:
            _tell(job, Failed(error))
        except Exception as error:
            self._failures += 1
            _tell(job, Failed(_told(error)))
        else:
            self._running[row] = job
        self._count(batch)

    def _count(self, batch: Batch) -> None:
        images, prefixes = batch.images, batch.prefixes
        self._caches = {
            "image_cache": {
                "hits": images.hits,
                "misses": images.misses,
                "images": len(images),
                "bytes": images.nbytes,
                "max_bytes": images.max_bytes,
            },
            "prompt_cache": {
                "sequences": len(prefixes),
                "bytes": prefixes.nbytes,
                "max_bytes": prefixes.max_bytes,
            },
        }

    def _fail_all(self, batch: Batch, error: Exception) -> None:
        """A step is one computation for all rows: when it fails, none of them can go on."""
        told = _told(error)
        left = list(self._running.values())
        self._running.clear()
        self._failures += len(left)
        batch.reset()
        for job in left:
            _tell(job, Failed(told))


def _late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline


def _told(error: Exception) -> ModelFailure:
    """Everything for the terminal, nothing of it for the client."""
    traceback.print_exception(error, file=sys.stderr)
    return ModelFailure(type(error).__name__)


def _tell(job: Job, event: Event) -> None:
    if job.unwanted:
        return
    try:
        job.deliver(event)
    except RuntimeError:  # the event loop of the one who asked is closed
        job.unwanted = True
