"""Thousands of requests that come, go and change their mind: nothing mixes up, nothing leaks."""

import http.client
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest

from agevlm_mlx.data.records import Turn
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.serving.batch import Batch, Settings
from agevlm_mlx.serving.engine import Engine
from agevlm_mlx.serving.exchange import Ask, Busy, Done, Failed, Piece
from agevlm_mlx.weights import Loaded, load

from .conftest import Inbox, data_url

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).parents[2]

#: Requests to the engine and over HTTP; together the 2,000 of one soak.
ENGINE, HTTP = 1600, 400
CLIENTS = 8
#: Growth of the process that counts as flat, bytes.
FLAT = 8 << 20


def resident(pid: int | str = "self") -> int:
    """Bytes of memory that a process has, measured by the system."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS:"))
        return int(line.split()[1]) << 10
    import os

    number = str(os.getpid() if pid == "self" else pid)
    out = subprocess.run(["ps", "-o", "rss=", "-p", number], capture_output=True, text=True)
    return int(out.stdout) << 10


@pytest.fixture(scope="module")
def asks(loaded: Loaded, pictures: list[bytes]) -> list[tuple[Ask, str]]:
    """Conversations about every mixture of images, with what each is answered alone."""
    source = random.Random(4)
    texts = ("Where is the car?", "Is there a dog in the image?", "A hot dog and a car?")
    asks = []
    for _ in range(48):
        turns = [Turn("system", "See.")] if source.random() < 0.3 else []
        for _ in range(source.choice((0, 0, 1, 2))):
            seen = tuple(source.sample(pictures, source.choice((0, 1))))
            turns += [Turn("user", source.choice(texts), seen), Turn("assistant", "A dog.")]
        seen = tuple(source.sample(pictures, source.choice((0, 1, 1, 2))))
        turns.append(Turn("user", source.choice(texts), seen))
        asks.append(Ask(tuple(turns), Sampling(max_tokens=source.randint(1, 8))))
    return [(asked, alone(loaded, asked)) for asked in asks]


def alone(loaded: Loaded, asked: Ask) -> str:
    batch = Batch(loaded, Settings(prompt_cache_size=0))
    batch.add(asked)
    text = ""
    while len(batch):
        text += "".join(event.text for _, event in batch.step() if isinstance(event, Piece))
    return text


def report(name: str, counts: dict[str, int], before: int, after: int, seconds: float) -> None:
    said = ", ".join(f"{value} {key}" for key, value in counts.items())
    growth = (after - before) / 2**20
    print(f"\n{name}: {said}; resident {before >> 20} MB, {growth:+.1f} MB after; {seconds:.0f} s")


def test_the_engine_under_random_requests_and_cancels(folder, asks):
    # Room for three of the six images and for a few texts, so that both are evicted all the time.
    engine = Engine(
        lambda: load(folder),
        Settings(
            decode_concurrency=6,
            prompt_concurrency=3,
            prefill_step_size=16,
            image_cache_bytes=3 * 2 * 2 * 16 * 2 * 8 * 4,
            prompt_cache_size=4,
        ),
    )
    counts = {"answered": 0, "cancelled": 0}
    wrong: list[tuple[str, str]] = []
    lock = threading.Lock()

    def client(seed: int, requests: int) -> None:
        source = random.Random(seed)
        for _ in range(requests):
            asked, expected = source.choice(asks)
            inbox = Inbox()
            job = engine.submit(asked, inbox)
            if source.random() < 0.3:
                time.sleep(source.random() * 0.02)
                engine.cancel(job)
                with lock:
                    counts["cancelled"] += 1
                continue
            end = inbox.end(60)
            with lock:
                counts["answered"] += 1
                if not isinstance(end, Done) or inbox.text != expected:
                    wrong.append((inbox.text, expected))

    def run(requests: int, seed: int) -> None:
        threads = [
            threading.Thread(target=client, args=(seed + n, requests // CLIENTS))
            for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    start = time.monotonic()
    try:
        run(ENGINE // 2, 100)  # by then all that grows to its size once has done so
        active, before = mx.get_active_memory(), resident()
        run(ENGINE // 2, 200)
        idle_after(engine)
        after = resident()
        report("engine", counts, before, after, time.monotonic() - start)
        assert not wrong, wrong[:3]
        assert counts["answered"] + counts["cancelled"] == ENGINE
        assert counts["cancelled"] > ENGINE / 5
        status = engine.status()
        assert status["failures"] == 0
        assert 0 < status["image_cache"]["images"] <= 3
        assert status["image_cache"]["bytes"] <= status["image_cache"]["max_bytes"]
        assert status["image_cache"]["misses"] > 50  # it did evict
        assert status["image_cache"]["hits"] > 50
        assert after - before < FLAT
        assert mx.get_active_memory() - active < 2 << 20
    finally:
        engine.close(30)


def idle_after(engine: Engine) -> None:
    """All rows are gone soon, and with them what they held."""
    deadline = time.monotonic() + 10
    while engine.status()["running"] or engine.status()["queue_length"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(engine._batch) == 0
    assert len(engine._batch._generator._generation_batch) == 0
    assert len(engine._batch._generator._prompt_batch) == 0


def test_a_failing_step_now_and_then_leaks_nothing(folder, asks, monkeypatch, capsys):
    step, source = Batch.step, random.Random(9)

    def shaky(batch: Batch):
        if source.random() < 0.05:
            raise MemoryError
        yield from step(batch)

    engine = Engine(lambda: load(folder), Settings(decode_concurrency=4))
    monkeypatch.setattr(Batch, "step", shaky)
    try:
        for asked, expected in asks * 3:
            inboxes = [Inbox(), Inbox()]
            for inbox in inboxes:
                engine.submit(asked, inbox)
            for inbox in inboxes:
                if not isinstance(inbox.end(), Failed):
                    assert inbox.text == expected
        idle_after(engine)
        assert engine.status()["failures"] > 5
        assert engine.status()["answers"] > 100
    finally:
        monkeypatch.undo()
        engine.close(30)
    assert "MemoryError" in capsys.readouterr().err


def messages(asked: Ask) -> list[dict]:
    return [
        {
            "role": turn.role,
            "content": [
                *({"type": "image_url", "image_url": {"url": data_url(i)}} for i in turn.images),
                {"type": "text", "text": turn.text},
            ],
        }
        for turn in asked.turns
    ]


def test_a_server_under_random_requests_and_clients_that_leave(folder, asks, tmp_path):
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "agevlm_mlx.serve", "--port", "0", "--model", str(folder),
             "--decode-concurrency", "6", "--max-queue", "4", "--prompt-cache-size", "4"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert server.stdout is not None
    port = int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
    counts = {"answered": 0, "left": 0, "refused": 0}
    wrong: list[tuple] = []
    lock = threading.Lock()

    def client(seed: int, requests: int) -> None:
        source = random.Random(seed)
        for _ in range(requests):
            asked, expected = source.choice(asks)
            stream = source.random() < 0.5
            body = {"messages": messages(asked), "max_tokens": asked.sampling.max_tokens}
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            line.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": stream}),
                         {"Content-Type": "application/json"})  # fmt: skip
            if source.random() < 0.3:
                time.sleep(source.random() * 0.05)
                line.close()
                kind, said = "left", expected
            else:
                response = line.getresponse()
                data = response.read()
                line.close()
                kind, said = "answered", expected
                if response.status == 429:
                    kind = "refused"
                elif response.status != 200:
                    said = data.decode()
                else:
                    said = streamed(data) if stream else whole(data)
            with lock:
                counts[kind] += 1
                if said != expected:
                    wrong.append((said, expected))

    def run(requests: int, seed: int) -> None:
        threads = [
            threading.Thread(target=client, args=(seed + n, requests // CLIENTS))
            for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    start = time.monotonic()
    try:
        run(HTTP // 2, 300)
        before = resident(server.pid)
        run(HTTP // 2, 400)
        deadline = time.monotonic() + 10
        while (status := health(port))["running"] or status["queue_length"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        after = resident(server.pid)
        report("http", counts, before, after, time.monotonic() - start)
        assert not wrong, wrong[:3]
        assert sum(counts.values()) == HTTP
        assert counts["answered"] > HTTP / 2
        assert counts["left"] > HTTP / 5
        assert status["failures"] == 0
        assert after - before < FLAT
    finally:
        server.terminate()
        assert server.wait(20) == 0
        server.stdout.close()
    assert (tmp_path / "log").read_text() == ""


def whole(data: bytes) -> str:
    return json.loads(data)["choices"][0]["message"]["content"]


def streamed(data: bytes) -> str:
    *chunks, done, end = data.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    deltas = (json.loads(chunk[6:])["choices"][0]["delta"] for chunk in chunks)
    return "".join(delta.get("content", "") for delta in deltas)


def health(port: int) -> dict:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", "/health")
    return json.loads(line.getresponse().read())


def test_the_queue_is_full_at_some_time(folder, asks):
    engine = Engine(lambda: load(folder), Settings(decode_concurrency=1), max_queue=2)
    refused, boxes = 0, []
    try:
        for asked, expected in asks:
            inbox = Inbox()
            try:
                engine.submit(asked, inbox)
            except Busy:
                refused += 1
            else:
                boxes.append((inbox, expected))
        assert refused > 0
        for inbox, expected in boxes:
            inbox.end()
            assert inbox.text == expected
    finally:
        engine.close(30)
