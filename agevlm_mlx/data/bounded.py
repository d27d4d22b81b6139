"""A memory of what was made before, bounded by bytes and shared by threads."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Bounded(Generic[T]):
    """Values by key, the least recently used forgotten first.

    most: bytes that all values together may take.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """The value of `key`, which ``make()`` makes if it is not here; `size` are its bytes.

        Two threads that ask at once may both make it: nothing waits for anything.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = value, size(value)
                self._bytes += self._kept[key][1]
            while self._bytes > self.most:
                self._bytes -= self._kept.popitem(last=False)[1][1]
        return value
