"""The model's thread: one job after the other, each failing alone."""

import threading
import time

import pytest

from agevlm_mlx.errors import UserError
from app import worker as worker_module
from app.desk import Desk
from app.worker import Ahead, Worker


def no_model(choice, progress):
    raise UserError("no model here")


@pytest.fixture
def worker():
    made = Worker(lambda: Desk(no_model))
    yield made
    made.close()


def values(events):
    return [event for event in events if not isinstance(event, Ahead)]


def test_jobs_run_in_one_thread_and_in_order(worker):
    order, threads = [], set()

    def job(number):
        def run(desk, send):
            threads.add(threading.get_ident())
            order.append(number)
            send(number)

        return run

    streams = [worker.stream(job(n)) for n in range(20)]
    assert [values(stream) for stream in reversed(streams)] == [[n] for n in range(19, -1, -1)]
    assert order == list(range(20))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_job_is_told_how_many_are_before_it(worker):
    go = threading.Event()
    first = worker.stream(lambda desk, send: (send("on"), go.wait(10)))
    assert "on" in first  # reads up to it
    second = worker.stream(lambda desk, send: None)
    third = worker.stream(lambda desk, send: None)
    assert [next(second), next(third)] == [Ahead(1), Ahead(2)]
    go.set()
    assert list(third)[-1] == Ahead(0)
    assert list(second)[-1] == Ahead(0)
    assert not values(first)


def test_closing_a_stream_stops_its_job_and_no_other(worker):
    sent = []

    def endless(desk, send):
        while True:
            sent.append(1)
            send(len(sent))

    stream = worker.stream(endless)
    assert values([next(stream) for _ in range(3)])
    stream.close()
    assert worker.call(lambda desk: "next") == "next"
    before = len(sent)
    time.sleep(0.02)
    assert len(sent) == before


def test_a_job_that_nobody_wants_any_more_is_not_begun(worker):
    go, begun = threading.Event(), []
    blocking = worker.stream(lambda desk, send: go.wait(10))
    waiting = worker.stream(lambda desk, send: begun.append(1))
    next(waiting)
    waiting.close()
    go.set()
    list(blocking)
    worker.call(lambda desk: None)
    assert not begun


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (UserError("no such picture"), UserError, "no such picture"),
        (ZeroDivisionError("secret"), RuntimeError, r"the model failed \(ZeroDivisionError\)"),
        (MemoryError(), RuntimeError, "not enough memory"),
        (RuntimeError("[METAL] Command buffer: Insufficient Memory"), RuntimeError, "not enough"),
        (RuntimeError("[malloc] Unable to allocate 9 bytes"), RuntimeError, "not enough memory"),
    ],
)
def test_an_error_is_a_sentence_and_the_next_job_runs(worker, capsys, error, kind, told):
    def fail(desk, send):
        send("some")
        raise error

    stream = worker.stream(fail)
    got = []
    with pytest.raises(kind, match=told) as raised:
        got.extend(stream)
    assert "secret" not in str(raised.value)
    assert ("secret" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)
    assert worker.call(lambda desk: 1) == 1


def test_out_of_memory_clears_the_desk(worker):
    desk = worker.call(lambda desk: desk)
    cleared = []
    desk.clear = lambda: cleared.append(1)
    with pytest.raises(RuntimeError, match="memory"):
        worker.call(lambda desk: (_ for _ in ()).throw(MemoryError()))
    assert cleared


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_thread_taken_down_is_replaced(worker, end):
    old = worker.call(lambda desk: (threading.current_thread(), desk))

    def die(desk, send):
        raise end

    dying = worker.stream(die)
    waiting = worker.stream(lambda desk, send: send("served"))
    with pytest.raises(RuntimeError, match="ended; ask again"):
        list(dying)
    assert values(waiting) == ["served"]
    thread, desk = worker.call(lambda desk: (threading.current_thread(), desk))
    assert thread is not old[0]
    assert desk is not old[1]
    old[0].join(10)
    assert not old[0].is_alive()


def test_a_closed_worker_serves_nobody():
    worker = Worker(lambda: Desk(no_model))
    go = threading.Event()

    def running(desk, send):
        go.set()
        while True:
            send(1)
            time.sleep(0.001)

    streams = [worker.stream(running), worker.stream(lambda desk, send: send(2))]
    go.wait(10)
    worker.close()
    for stream in streams:
        with pytest.raises(RuntimeError, match="closed"):
            list(stream)
    with pytest.raises(RuntimeError, match="closed"):
        worker.stream(lambda desk, send: None)
    worker.post(lambda desk: None)
    worker.close()


def test_now_and_then_it_has_time_for_others(monkeypatch):
    monkeypatch.setattr(worker_module, "TICK", 0.01)
    ticked = threading.Event()
    worker = Worker(lambda: Desk(no_model), ticked.set)
    try:
        worker.call(lambda desk: None)
        assert ticked.wait(10)
    finally:
        worker.close()


def test_what_fails_now_and_then_takes_no_job_with_it(monkeypatch, capsys):
    monkeypatch.setattr(worker_module, "TICK", 0.01)
    worker = Worker(lambda: Desk(no_model), lambda: 1 / 0)
    try:
        thread = worker.call(lambda desk: threading.current_thread())
        time.sleep(0.05)
        assert worker.call(lambda desk: threading.current_thread()) is thread
    finally:
        worker.close()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_many_threads_at_once(worker):
    got = {}

    def ask(n):
        got[n] = values(worker.stream(lambda desk, send: [send((n, k)) for k in range(5)]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == {n: [(n, k) for k in range(5)] for n in range(30)}
