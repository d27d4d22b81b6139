"""Items made ahead by threads: their order, their number, their errors and their end."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from agevlm_mlx.data.prefetch import Prefetch

#: Seconds after which a test that waits for a thread has failed.
SOON = 30


class Gate:
    """Lets ``make(item)`` end for items that are opened; counts what began."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.open: set[int] = set()
        self.changed = threading.Condition()

    def make(self, item: int) -> int:
        with self.changed:
            self.begun.append(item)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: item in self.open, SOON)
        return item * item

    def let(self, *items: int) -> None:
        with self.changed:
            self.open.update(items)
            self.changed.notify_all()

    def wait_until(self, true: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(true, SOON)


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (1, 5), (4, 2), (3, 8)])
def test_items_come_in_order(workers: int, depth: int) -> None:
    with Prefetch(lambda n: n * n, range(50), workers, depth) as data:
        assert [data.next() for _ in range(50)] == [n * n for n in range(50)]
        for _ in range(2):
            with pytest.raises(StopIteration):
                data.next()
    with Prefetch(str, iter("abc"), workers, depth) as data:
        assert list(data) == ["a", "b", "c"]
    with Prefetch(str, [], workers, depth) as data:
        assert list(data) == []


def test_a_later_item_may_be_ready_first() -> None:
    gate = Gate()
    with Prefetch(gate.make, range(4), workers=2, depth=2) as data:
        gate.let(1)
        gate.wait_until(lambda: gate.begun.count(1) == 1)
        gate.let(0, 2, 3)
        assert list(data) == [0, 1, 4, 9]


def test_no_more_are_made_ahead_than_allowed() -> None:
    gate, asked = Gate(), []
    gate.let(*range(100))

    def wanted():
        for item in range(100):
            asked.append(item)
            yield item

    with Prefetch(gate.make, wanted(), workers=4, depth=3) as data:
        gate.wait_until(lambda: len(gate.begun) == 3)
        assert asked == [0, 1, 2]
        for taken in range(1, 20):
            data.next()
            gate.wait_until(lambda taken=taken: len(gate.begun) == taken + 3)
            assert len(asked) == taken + 3  # what is in use, and three more


def test_workers_work_at_the_same_time() -> None:
    together = threading.Barrier(3)
    with Prefetch(lambda n: together.wait(SOON) * 0 + n, range(9), 3, 3) as data:
        assert list(data) == list(range(9))


def test_an_error_is_raised_at_its_item() -> None:
    def make(n: int) -> int:
        if n % 3 == 1:
            raise ValueError(f"item {n}")
        return n

    with Prefetch(make, range(6), workers=3, depth=6) as data:
        assert data.next() == 0
        with pytest.raises(ValueError, match="item 1"):
            data.next()
        assert [data.next(), data.next()] == [2, 3]
        with pytest.raises(ValueError, match="item 4"):
            data.next()
        assert data.next() == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_early_ends_the_threads(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, before = Gate(), threading.active_count()
    shutdown = ThreadPoolExecutor.shutdown

    def then_open(pool: ThreadPoolExecutor, *, cancel_futures: bool) -> None:
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        gate.let(*range(1000))
        shutdown(pool)

    def leave() -> None:
        with Prefetch(gate.make, range(1000), workers=2, depth=8):
            gate.wait_until(lambda: len(gate.begun) == 2)
            raise error

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", then_open)
    with pytest.raises(error):
        leave()
    assert threading.active_count() == before
    assert sorted(gate.begun) == [0, 1]
