"""Items made ahead of their use, by threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Prefetch(Generic[T, R]):
    """``make(item)`` for each item of `wanted`, in order, up to `depth` of them ahead of `next`.

    `make` runs in `workers` threads, several at once, and must not touch MLX arrays. What it
    raises is raised by the `next` whose item it is. Leaving the ``with`` block, in whatever way,
    waits for the items that are being made and drops the others.
    """

    def __init__(
        self, make: Callable[[T], R], wanted: Iterable[T], workers: int, depth: int
    ) -> None:
        self._make, self._wanted, self._depth = make, iter(wanted), depth
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._ahead: deque[Future[R]] = deque()

    def __enter__(self) -> "Prefetch[T, R]":
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def next(self) -> R:
        """What was made of the next item. ``StopIteration`` after the last one."""
        self._fill()
        if not self._ahead:
            raise StopIteration
        made = self._ahead.popleft()
        self._fill()  # so that the threads have work while this one is waited for and used
        return made.result()

    def __iter__(self) -> Iterator[R]:
        return self

    __next__ = next

    def _fill(self) -> None:
        while len(self._ahead) < self._depth:
            try:
                item = next(self._wanted)
            except StopIteration:
                return
            self._ahead.append(self._pool.submit(self._make, item))
