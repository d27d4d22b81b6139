"""The model's thread and its queue, without HTTP."""

import threading
import time
from pathlib import Path

import pytest

from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.serving.batch import Batch
from agevlm_mlx.serving.exchange import Ask, Busy, Closed, Done, Expired, Failed, ModelFailure
from agevlm_mlx.weights import load

from .conftest import Inbox, ask


def question(*images: bytes, max_tokens: int = 6, text: str = "Where is the car?") -> Ask:
    return Ask((Turn("user", text, images),), Sampling(max_tokens=max_tokens))


#: An answer that goes on until somebody ends it.
ENDLESS = question(max_tokens=200)


class Gate:
    """Stops the model's thread at every step until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived, self._open = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False
        step = Batch.step

        def wait(batch: Batch):
            if not self._free:
                self.arrived.release()
                assert self._open.acquire(timeout=30)
            yield from step(batch)

        monkeypatch.setattr(Batch, "step", wait)

    def steps(self, n: int = 1) -> None:
        """Let `n` steps happen."""
        for _ in range(n):
            assert self.arrived.acquire(timeout=30)
            self._open.release()

    def open(self) -> None:
        self._free = True
        self._open.release(1000)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open()  # or the engine could not be closed


def test_answers_come_in_pieces_and_end(start, pictures):
    engine = start()
    inbox = ask(engine, question(pictures[0]))
    done = inbox.end()
    assert isinstance(done, Done)
    assert done.finish_reason == "length"
    assert len(inbox.events) > 2
    assert inbox.text
    again = ask(engine, question(pictures[0]))
    again.end()
    assert again.text == inbox.text
    status = engine.status()
    assert (status["status"], status["answers"], status["failures"]) == ("ok", 2, 0)
    assert (status["image_cache"]["hits"], status["image_cache"]["misses"]) == (1, 1)
    assert status["image_cache"]["images"] == 1
    assert 0 < status["image_cache"]["bytes"] < status["image_cache"]["max_bytes"]
    assert status["prompt_cache"]["sequences"] == 1
    assert status["prompt_cache"]["bytes"] > 0
    assert status["memory"]["active"] > 0


def test_many_at_once_equal_one_at_a_time(start, pictures):
    engine = start(decode_concurrency=3, prompt_concurrency=2)
    questions = [question(p, text=t) for p in pictures for t in ("Where is the car?", "A dog?")]
    expected = []
    for asked in questions:
        inbox = ask(engine, asked)
        inbox.end()
        expected.append(inbox.text)
    assert len(set(expected)) > 6
    boxes = [ask(engine, asked) for asked in questions]
    assert all(isinstance(box.end(), Done) for box in boxes)
    assert [box.text for box in boxes] == expected


def test_a_cancelled_row_leaves_the_batch(start, gate):
    engine = start()
    inbox, other = Inbox(), Inbox()
    job = engine.submit(ENDLESS, inbox)
    engine.submit(ENDLESS, other)
    gate.steps(4)
    gate.arrived.acquire(timeout=30)  # in the fifth step now
    assert len(engine._batch) == 2
    engine.cancel(job)
    heard = len(inbox.events)
    gate._open.release()
    gate.steps(2)
    gate.arrived.acquire(timeout=30)
    assert len(engine._batch) == len(engine._batch._generator._generation_batch) == 1
    assert engine.status()["running"] == 1
    assert len(inbox.events) == heard
    gate.open()
    assert isinstance(other.end(), Done)


def test_a_cancelled_job_leaves_the_queue(start, gate):
    engine = start(decode_concurrency=1)
    ask(engine, ENDLESS)
    gate.arrived.acquire(timeout=30)
    waiting = Inbox()
    job = engine.submit(question(), waiting)
    assert engine.status()["queue_length"] == 1
    engine.cancel(job)
    engine.cancel(job)
    assert engine.status()["queue_length"] == 0
    assert waiting.events == []


def test_a_full_queue_refuses_and_then_takes_again(start, gate):
    engine = start(max_queue=1, decode_concurrency=1, prompt_concurrency=1)
    first = ask(engine, question())
    gate.arrived.acquire(timeout=30)
    second = ask(engine, question())
    with pytest.raises(Busy):
        ask(engine, question())
    gate.open()
    assert isinstance(first.end(), Done)
    assert isinstance(second.end(), Done)
    assert isinstance(ask(engine, question()).end(), Done)


def test_first_come_first_served(start, gate):
    engine = start(decode_concurrency=1, prompt_concurrency=1)
    order: list[int] = []

    class Numbered(Inbox):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n = n

        def __call__(self, event) -> None:
            if isinstance(event, Done):
                order.append(self.n)
            super().__call__(event)

    boxes = [Numbered(n) for n in range(5)]
    for box in boxes:
        engine.submit(question(), box)
    gate.open()
    for box in boxes:
        box.end()
    assert order == list(range(5))


def test_an_answer_that_takes_too_long_fails(start, gate):
    engine = start(decode_concurrency=1)
    inbox, waiting = Inbox(), Inbox()
    engine.submit(ENDLESS, inbox, timeout=0.05)
    engine.submit(ENDLESS, waiting, timeout=0.05)
    gate.steps()
    time.sleep(0.06)
    gate.open()
    assert isinstance(inbox.end().error, Expired)
    assert isinstance(waiting.end().error, Expired)
    assert isinstance(ask(engine, question()).end(), Done)


# --- failures ----------------------------------------------------------------------------------


def test_what_the_asker_did_wrong_concerns_nobody_else(start, pictures):
    engine = start()
    good = ask(engine, question(pictures[0], max_tokens=30))
    bad = {
        "empty": question(text=" "),
        "beyond the context": question(text="dog " * 300),
        "no image": question(b"This is text."),
        "half an image": question(pictures[0][:60]),
        "no bytes": question(b""),
    }
    for asked in bad.values():
        assert isinstance(ask(engine, asked).end().error, UserError)
    assert isinstance(good.end(), Done)
    assert engine.status()["failures"] == 0


def test_a_failing_step_fails_who_is_in_it_and_the_engine_goes_on(
    start, monkeypatch, capsys, pictures
):
    engine = start()
    before = ask(engine, question(pictures[0]))
    before.end()
    step = Batch.step
    broken = threading.Event()

    def fail(batch: Batch):
        if not broken.is_set() and len(batch) == 2:
            broken.set()
            raise MemoryError("[malloc] secret/path")
        yield from step(batch)

    monkeypatch.setattr(Batch, "step", fail)
    first, second = ask(engine, ENDLESS), ask(engine, ENDLESS)
    for box in (first, second):
        error = box.end().error
        assert isinstance(error, ModelFailure)
        assert "secret" not in str(error)
    assert "MemoryError" in capsys.readouterr().err
    after = ask(engine, question(pictures[0]))
    assert isinstance(after.end(), Done)
    assert after.text == before.text
    assert engine.status()["failures"] == 2


def test_a_failing_encoder_fails_one_request(start, monkeypatch, pictures):
    engine = start()
    look = engine._batch.images.look

    def fail(source):
        if source == pictures[1]:
            raise RuntimeError("out of memory")
        return look(source)

    monkeypatch.setattr(engine._batch.images, "look", fail)
    good, bad = ask(engine, question(pictures[0])), ask(engine, question(pictures[1]))
    assert isinstance(bad.end().error, ModelFailure)
    assert isinstance(good.end(), Done)


def test_who_cannot_be_told_is_dropped(start):
    engine = start()

    def closed(_):
        raise RuntimeError("Event loop is closed")

    engine.submit(ENDLESS, closed)
    assert isinstance(ask(engine, question()).end(), Done)
    deadline = time.monotonic() + 10
    while engine.status()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.status()["running"] == 0


# --- beginning and end -------------------------------------------------------------------------


def test_what_loading_raises_is_raised_here(start):
    def load_it():
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        start(load_it)


def test_the_model_lives_in_one_thread(start, folder):
    threads = []

    def load_it():
        threads.append(threading.current_thread())
        return load(folder)

    engine = start(load_it)
    assert threads == [engine._thread] != [threading.current_thread()]
    assert engine.path == Path(folder)


def test_closing_fails_what_is_left(start, gate):
    engine = start(decode_concurrency=1)
    running, waiting = ask(engine, ENDLESS), ask(engine, ENDLESS)
    gate.arrived.acquire(timeout=30)
    threading.Timer(0.1, gate.open).start()
    engine.close()
    for box in (running, waiting):
        end = box.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, Closed)
    assert engine.status()["status"] == "closed"
    with pytest.raises(Closed):
        ask(engine, question())
    engine.close()


def test_the_thread_frees_its_streams(start, monkeypatch):
    freed = []
    monkeypatch.setattr(
        "agevlm_mlx.serving.engine.mx.clear_streams",
        lambda: freed.append(threading.current_thread().name),
    )
    start().close()
    assert freed == ["model"]
