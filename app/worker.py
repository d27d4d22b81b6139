"""One thread that owns every MLX object, and the jobs that wait for it.

MLX arrays belong to the thread that made them. So whatever needs the model is a job: a function
that runs in this thread with the thread's desk and sends plain values back.
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from agevlm_mlx.errors import UserError

from .desk import Desk

#: How a job gives a plain value to whoever waits for it.
Send = Callable[[Any], None]

#: Seconds between two calls of `Worker.idle` while there is nothing to do.
TICK = 15.0


@dataclass(frozen=True)
class Ahead:
    """The job waits, and so many are before it; 0 when it starts."""

    count: int


class Unwanted(BaseException):
    """Nobody waits for the job any more. Raised in the job, by `send`."""


@dataclass(eq=False)
class _Job:
    run: Callable[[Desk, Send], None]
    awaited: bool = True  # others are not worth telling those behind them
    events: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    unwanted: threading.Event = field(default_factory=threading.Event)

    def send(self, event: Any) -> None:
        if self.unwanted.is_set():
            raise Unwanted
        self.events.put(event)


@dataclass(frozen=True)
class _Ended:
    error: Exception | None = None


class Stream:
    """What a job sends, for one thread to iterate over."""

    def __init__(self, job: _Job, drop: Callable[[_Job], None]) -> None:
        self._job, self._drop = job, drop

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        event = self._job.events.get()
        if not isinstance(event, _Ended):
            return event
        self._job.events.put(_Ended())  # for whoever asks again
        if event.error:
            raise event.error
        raise StopIteration

    def close(self) -> None:
        """End the iteration, and the job: now if it still waits, else at what it sends next.

        From any thread, also while another one waits for the next event.
        """
        self._job.unwanted.set()
        self._drop(self._job)
        self._job.events.put(_Ended())

    def __del__(self) -> None:
        self._job.unwanted.set()


class Worker:
    """Runs jobs one after the other, in the order in which they came.

    make: makes the desk, in the thread. idle: called now and then, between jobs. A job that takes
    the thread down with it fails alone: the next one finds a new thread with a new desk.
    """

    def __init__(self, make: Callable[[], Desk], idle: Callable[[], None] = lambda: None) -> None:
        self._make, self.idle = make, idle
        self._waiting: deque[_Job] = deque()
        self._change = threading.Condition()
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._ticked = time.monotonic()

    def stream(self, run: Callable[[Desk, Send], None]) -> "Stream":
        """What a job sends, as it comes; `Ahead` first, whenever its place in the queue changes.

        Raises the job's ``UserError``, or a ``RuntimeError`` with a plain sentence when anything
        else went wrong.
        """
        job = _Job(run)
        with self._change:
            if self._closed:
                raise RuntimeError("the model is closed")
            self._waiting.append(job)
            self._start()
            self._tell()
            self._change.notify()
        return Stream(job, self._drop)

    def call(self, run: Callable[[Desk], Any]) -> Any:
        """What `run` returns in the model's thread; raises as `stream` does."""
        found: list[Any] = []
        for event in self.stream(lambda desk, send: send(run(desk))):
            if not isinstance(event, Ahead):
                found.append(event)
        return found[0]

    def post(self, run: Callable[[Desk], None]) -> None:
        """Have `run` done some time, without waiting for it. Ignored once closed."""
        with self._change:
            if not self._closed:
                self._waiting.append(_Job(lambda desk, send: run(desk), awaited=False))
                self._start()
                self._change.notify()

    def close(self) -> None:
        """End the thread; jobs still waiting fail, the one under way at what it sends next."""
        with self._change:
            self._closed = True
            if self._running:
                self._running.unwanted.set()
            self._change.notify()
        if self._thread:
            self._thread.join()
        with self._change:
            self._fail(self._waiting)

    def _drop(self, job: _Job) -> None:
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell()

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="model", daemon=True)
            self._thread.start()

    def _tell(self) -> None:
        before = int(self._running is not None and self._running.awaited)
        for job in self._waiting:
            job.events.put(Ahead(before))
            before += job.awaited

    @staticmethod
    def _fail(jobs: deque[_Job]) -> None:
        while jobs:
            jobs.popleft().events.put(_Ended(RuntimeError("the model is closed")))

    # --- in the thread -----------------------------------------------------------------------

    def _work(self) -> None:
        desk = self._make()
        try:
            while (job := self._next()) is not None:
                self._run(desk, job)
        finally:
            desk.close()
            with self._change:
                self._running = self._thread = None
                if self._waiting and not self._closed:
                    self._start()

    def _next(self) -> _Job | None:
        """The next job, as soon as there is one; None once closed."""
        while True:
            if time.monotonic() - self._ticked >= TICK:
                self._ticked = time.monotonic()
                try:
                    self.idle()
                except Exception:
                    traceback.print_exc(file=sys.stderr)
            with self._change:
                self._running = None
                if not self._waiting and not self._closed:
                    self._change.wait(TICK)
                if self._closed:
                    return None
                if self._waiting:
                    self._running = self._waiting.popleft()
                    self._running.events.put(Ahead(0))
                    self._tell()
                    return self._running

    def _run(self, desk: Desk, job: _Job) -> None:
        error: Exception | None = RuntimeError("the model's thread ended; ask again")
        try:
            if not job.unwanted.is_set():
                job.run(desk, job.send)
            error = None
        except Unwanted:
            error = RuntimeError("the model is closed" if self._closed else "stopped")
        except UserError as bad:
            error = bad
        except Exception as failure:
            traceback.print_exc(file=sys.stderr)
            error = RuntimeError(_told(failure))
            if isinstance(failure, MemoryError) or _is_memory(failure):
                desk.clear()
        finally:
            job.events.put(_Ended(error))


def _is_memory(error: Exception) -> bool:
    """Whether MLX says that memory has run out; it has no kind of error for that."""
    text = str(error).lower()
    return "memory" in text or "unable to allocate" in text or "bad_alloc" in text


def _told(error: Exception) -> str:
    if isinstance(error, MemoryError) or _is_memory(error):
        return (
            "there is not enough memory for this; close other programs, show fewer pictures, or "
            "take a smaller model"
        )
    return f"the model failed ({type(error).__name__}); the terminal says more"
