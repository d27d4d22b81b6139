"""The routes over an engine that only pretends."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.serving import app as app_module
from agevlm_mlx.serving.api import Limits
from agevlm_mlx.serving.app import Rules, make_app
from agevlm_mlx.serving.exchange import (
    Ask,
    Busy,
    Closed,
    Done,
    Event,
    Expired,
    Failed,
    ModelFailure,
    Piece,
)
from agevlm_mlx.serving.images import ImageRules

from .conftest import data_url

DONE = Done("stop", 5, 2)
ANSWER = [Piece("A "), Piece("dog"), DONE]
HELLO = [{"role": "user", "content": "Hello"}]


class Fake:
    """An engine that says `events` to everybody, from a thread of its own as the real one does."""

    def __init__(self, *events: Event, raises: Exception | None = None, pause: float = 0) -> None:
        self.events, self.raises, self.pause = events, raises, pause
        self.asked: list[Ask] = []
        self.timeouts: list[float | None] = []
        self.cancelled: list[Any] = []
        self.submitted = threading.Event()

    def submit(self, ask: Ask, deliver: Callable[[Event], None], *, timeout=None) -> Any:
        if self.raises:
            raise self.raises
        self.asked.append(ask)
        self.timeouts.append(timeout)

        def work() -> None:
            time.sleep(self.pause)
            for event in self.events:
                deliver(event)

        threading.Thread(target=work).start()
        self.submitted.set()
        return ask

    def cancel(self, job: Any) -> None:
        self.cancelled.append(job)

    def status(self) -> dict[str, Any]:
        return {"status": "closed" if self.raises else "ok", "queue_length": 3}


class Reply:
    def __init__(self, messages: list[dict]) -> None:
        self.status = messages[0]["status"] if messages else None
        heads = messages[0]["headers"] if messages else []
        self.headers = {name.decode(): value.decode() for name, value in heads}
        self.parts = [m["body"] for m in messages[1:] if m["body"]]
        self.body = b"".join(self.parts)
        self.ended = bool(messages) and not messages[-1].get("more_body")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        *lines, last = self.body.decode().split("\n\n")
        assert last == ""
        assert all(line.startswith("data: ") for line in lines)
        return [e if e == "[DONE]" else json.loads(e) for e in (line[6:] for line in lines)]


async def talk(
    app: Any,
    method: str,
    path: str,
    body: bytes | Sequence[bytes | None] = b"",
    headers: dict[str, str] | None = None,
    leave: Callable[[list[dict]], bool] | None = None,
) -> Reply:
    """One request; a part of its body that is None never comes.

    leave: the client hangs up once this says so of what it has received.
    """
    received: list[dict] = []
    came = asyncio.Event()
    chunks = [body] if isinstance(body, bytes) else list(body)
    requests = [
        {"type": "http.request", "body": chunk, "more_body": n + 1 < len(chunks)}
        for n, chunk in enumerate(chunks)
    ]

    async def receive() -> dict:
        if requests and requests[0]["body"] is not None:
            return requests.pop(0)
        while leave is None or not leave(received):
            await came.wait()
            came.clear()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        received.append(message)
        came.set()
        await asyncio.sleep(0)

    heads = {"host": "127.0.0.1:8080", **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in heads.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
        "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    await asyncio.wait_for(app(scope, receive, send), 20)
    return Reply(received)


def request(engine: Fake, *args: Any, rules: Rules | None = None, **options: Any) -> Reply:
    return asyncio.run(talk(make_app(engine, "tiny", rules or Rules()), *args, **options))


def chat(engine: Fake, rules: Rules | None = None, leave: Any = None, **fields: Any) -> Reply:
    body = {"messages": [{"role": "user", "content": "A dog?"}], **fields}
    path = "/v1/chat/completions"
    return request(engine, "POST", path, json.dumps(body).encode(), rules=rules, leave=leave)


# --- answers -----------------------------------------------------------------------------------


def test_an_answer_in_one_piece():
    engine = Fake(*ANSWER)
    reply = chat(engine, max_tokens=4)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["choices"][0]["message"]["content"] == "A dog"
    assert reply.json["model"] == "tiny"
    assert reply.json["usage"]["total_tokens"] == 7
    assert reply.json["id"].startswith("chatcmpl-")
    (ask,) = engine.asked
    assert ask.turns == (Turn("user", "A dog?"),)
    assert ask.sampling.max_tokens == 4
    assert engine.cancelled == [ask]  # always: it is done with


def test_an_answer_in_pieces():
    engine = Fake(*ANSWER)
    reply = chat(engine, stream=True, stream_options={"include_usage": True})
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.ended
    *chunks, done = reply.events
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "A dog"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert len(reply.parts) >= 3  # not all at the end


def test_an_answer_wakes_a_server_that_sleeps():
    # Nothing else happens in the event loop until the engine has something to say.
    start = time.monotonic()
    assert chat(Fake(*ANSWER, pause=0.1)).status == 200
    assert time.monotonic() - start < 5


def test_an_answer_without_a_word():
    assert chat(Fake(DONE)).json["choices"][0]["message"]["content"] == ""
    *chunks, done = chat(Fake(DONE), stream=True).events
    assert done == "[DONE]"
    assert len(chunks) == 2


def test_images_belong_to_their_message(pictures):
    engine = Fake(*ANSWER)
    one, two = ({"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures[:2])
    text = {"type": "text", "text": "A dog?"}
    messages = [
        {"role": "user", "content": [one, text]},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": [text, two, one]},
    ]
    assert chat(engine, messages=messages).status == 200
    assert [turn.images for turn in engine.asked[0].turns] == [
        (pictures[0],), (), (pictures[1], pictures[0])
    ]  # fmt: skip


def test_options_reach_the_engine():
    engine = Fake(Piece("x"), Done("stop", 1, 1, words=({"word": "dog"},)))
    reply = chat(engine, Rules(timeout=3.0), attention=True, logprobs=True, top_logprobs=2)
    (ask,) = engine.asked
    assert (ask.attention, ask.top_logprobs) == (True, 2)
    assert engine.timeouts == [3.0]
    assert reply.json["choices"][0]["attention"] == [{"word": "dog"}]
    assert reply.json["choices"][0]["logprobs"] == {"content": [], "refusal": None}


# --- clients that leave ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_word_is_cancelled(stream):
    engine = Fake()  # never says anything
    reply = chat(engine, stream=stream, leave=lambda _: engine.submitted.is_set())
    assert reply.status is None
    assert engine.cancelled == engine.asked
    assert len(engine.asked) == 1


def test_a_client_that_leaves_in_the_middle_is_cancelled():
    engine = Fake(Piece("A "))  # and then nothing
    reply = chat(engine, stream=True, leave=lambda received: len(received) >= 2)
    assert reply.status == 200
    assert engine.cancelled == engine.asked
    assert "[DONE]" not in reply.body.decode()


def test_a_cancelled_task_cancels_the_job():
    # What uvicorn does with answers under way when the time to stop has come.
    engine = Fake(Piece("A "))

    async def go() -> None:
        body = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()
        app = make_app(engine, "tiny", Rules())
        task = asyncio.create_task(talk(app, "POST", "/v1/chat/completions", body))
        while not engine.submitted.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert engine.cancelled == engine.asked


def test_a_client_that_leaves_while_it_sends():
    engine = Fake(*ANSWER)

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def go() -> None:
        sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [],
                 "query_string": b"", "root_path": ""}  # fmt: skip
        await make_app(engine, "tiny", Rules())(scope, receive, send)

    asyncio.run(go())
    assert engine.asked == []


# --- errors ------------------------------------------------------------------------------------

FAILURES = [
    (UserError("prompt: expected a question"), 400, "invalid_request_error"),
    (Busy(), 429, "rate_limit_error"),
    (Closed(), 503, "server_error"),
    (Expired(), 504, "server_error"),
    (ModelFailure("MemoryError"), 500, "server_error"),
]


def check_error(body: dict, kind: str) -> dict:
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert "/" not in error["message"].replace("/v1/models", "")
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind"), FAILURES, ids=[str(f[1]) for f in FAILURES])
def test_an_answer_that_fails_has_its_status(error, status, kind, stream):
    engine = Fake(Failed(error))
    reply = chat(engine, stream=stream)
    assert reply.status == status
    check_error(reply.json, kind)
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert engine.cancelled == engine.asked


@pytest.mark.parametrize(("error", "status"), [(Busy(), 429), (Closed(), 503)])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_takes_no_more(error, status, stream):
    reply = chat(Fake(raises=error), stream=stream)
    assert reply.status == status
    assert int(reply.headers["retry-after"]) > 0


def test_an_answer_that_fails_in_the_middle_ends_with_the_error():
    reply = chat(Fake(Piece("A "), Failed(ModelFailure("MemoryError"))), stream=True)
    assert reply.status == 200
    *_, last = reply.events
    check_error(last, "server_error")
    assert reply.ended
    reply = chat(Fake(Piece("A "), Failed(ModelFailure("MemoryError"))))
    assert reply.status == 500


def test_a_bug_is_not_shown(monkeypatch):
    engine = Fake()
    monkeypatch.setattr(engine, "status", lambda: 1 / 0)
    seen: list[Reply] = []

    async def go() -> None:
        app = make_app(engine, "tiny", Rules())
        received = []

        async def send(message: Any) -> None:
            received.append(message)

        async def receive() -> dict:
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "GET", "path": "/health", "headers": [],
                 "query_string": b"", "root_path": ""}  # fmt: skip
        with pytest.raises(ZeroDivisionError):  # which the server writes to the terminal
            await app(scope, receive, send)
        seen.append(Reply(received))

    asyncio.run(go())
    assert seen[0].status == 500
    check_error(seen[0].json, "server_error")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405),
     ("GET", "/v1/embeddings", 404), ("GET", "/../etc/passwd", 404)],
)  # fmt: skip
def test_other_routes(method, path, status):
    reply = request(Fake(), method, path)
    assert reply.status == status
    check_error(reply.json, "invalid_request_error")


def test_bad_requests_never_reach_the_engine(pictures):
    engine = Fake(*ANSWER)
    for fields, param in [
        ({"messages": []}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 2}, "n"),
    ]:
        reply = chat(engine, **fields)
        assert reply.status == 400
        assert check_error(reply.json, "invalid_request_error")["param"] == param
    for body in (b"", b"nonsense", b"[1]", b"\xff\xfe"):
        assert request(engine, "POST", "/v1/chat/completions", body).status == 400
    assert engine.asked == []


def test_an_image_that_may_not_be_read_names_its_place():
    engine = Fake(*ANSWER)
    for url in ("http://127.0.0.1/a.png", "file:///etc/passwd", "../a.png", "data:text/plain,a"):
        content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]
        reply = chat(engine, messages=[{"role": "user", "content": content}])
        assert reply.status == 400
        error = reply.json["error"]
        assert error["param"] == "messages[0].content[1].image_url"
        assert error["message"].startswith("messages[0].content[1].image_url: expected")
        assert "passwd" not in error["message"]
    assert engine.asked == []


def test_another_model_is_not_found():
    reply = chat(Fake(*ANSWER), model="gpt-4o")
    assert reply.status == 404
    assert reply.json["error"]["code"] == "model_not_found"
    assert chat(Fake(*ANSWER), model="tiny").status == 200


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused_while_it_is_read(announced):
    engine = Fake(*ANSWER)
    headers = {"content-length": "1000000"} if announced else {}
    chunks = [b"x" * 60] * 1000
    rules = Rules(max_body_bytes=100)
    reply = request(engine, "POST", "/v1/chat/completions", chunks, headers, rules=rules)
    assert reply.status == 413
    assert "at most 100 bytes" in check_error(reply.json, "invalid_request_error")["message"]
    assert engine.asked == []


@pytest.mark.parametrize("length", ["-1", "abc", "9" * 5000, "²"])
def test_a_length_of_nonsense(length):
    body = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()
    headers = {"content-length": length} if length.isascii() else {}
    reply = request(Fake(*ANSWER), "POST", "/v1/chat/completions", body, headers)
    assert reply.status in (200, 413)


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(app_module, "BODY_TIMEOUT", 0.05)
    engine = Fake(*ANSWER)

    async def go() -> Reply:
        received = []

        async def send(message: Any) -> None:
            received.append(message)

        async def receive() -> dict:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [],
                 "query_string": b"", "root_path": ""}  # fmt: skip
        await asyncio.wait_for(make_app(engine, "tiny", Rules())(scope, receive, send), 5)
        return Reply(received)

    assert asyncio.run(go()).status == 408


def test_clients_that_send_nothing_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(app_module, "MAX_RECEIVING", 3)
    monkeypatch.setattr(app_module, "MAX_READING", 1)
    engine = Fake(*ANSWER)
    path, body = "/v1/chat/completions", json.dumps({"messages": HELLO}).encode()

    async def go() -> list[int | None]:
        app = make_app(engine, "tiny", Rules())
        never = [asyncio.create_task(talk(app, "POST", path, [b"{", None])) for _ in range(5)]
        replies = [await talk(app, "POST", path, body) for _ in range(2)]
        done, waiting = await asyncio.wait(never, timeout=0.1)
        assert {task.result().status for task in done} == {429}
        assert done == set(never[:3])  # the oldest; the others make place for nobody yet
        for task in waiting:
            task.cancel()
        return [reply.status for reply in replies]

    assert asyncio.run(go()) == [200, 200]


def test_a_request_that_comes_while_the_oldest_runs_out_of_time(monkeypatch):
    monkeypatch.setattr(app_module, "MAX_RECEIVING", 1)
    monkeypatch.setattr(app_module, "BODY_TIMEOUT", 0.05)
    engine = Fake(*ANSWER)
    path, body = "/v1/chat/completions", json.dumps({"messages": HELLO}).encode()

    async def go() -> tuple[int | None, int | None]:
        app = make_app(engine, "tiny", Rules())
        never = asyncio.create_task(talk(app, "POST", path, [b"{", None]))
        await asyncio.sleep(0.01)
        other = asyncio.create_task(talk(app, "POST", path, body))
        time.sleep(0.1)  # so that both are due in the same turn of the loop
        return (await other).status, (await never).status

    assert asyncio.run(go()) == (200, 429)


def test_bodies_are_parsed_one_after_the_other(monkeypatch):
    read, now, most = app_module.api.read_json, 0, 0

    def read_json(body: bytearray) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.02)
        now -= 1
        return read(body)

    monkeypatch.setattr(app_module.api, "read_json", read_json)
    engine = Fake(*ANSWER)
    path, body = "/v1/chat/completions", json.dumps({"messages": HELLO}).encode()

    async def go() -> list[int | None]:
        app = make_app(engine, "tiny", Rules())
        bad = [talk(app, "POST", path, b"{") for _ in range(2)]
        good = [talk(app, "POST", path, body) for _ in range(3)]
        return [reply.status for reply in await asyncio.gather(*bad, *good)]

    assert asyncio.run(go()) == [400, 400, 200, 200, 200]
    assert most == 1


@pytest.mark.parametrize("body", [b"[" * 150_000, b'{"a":' * 150_000, b"[{}," * 80_000])
def test_a_body_of_brackets_is_refused(body):
    reply = request(Fake(), "POST", "/v1/chat/completions", body)
    assert reply.status == 400
    assert check_error(reply.json, "invalid_request_error")["message"].startswith("body: expected")


def test_too_many_requests_being_read_are_refused(monkeypatch):
    monkeypatch.setattr(app_module, "MAX_READING", 0)
    reply = chat(Fake(*ANSWER))
    assert reply.status == 429
    assert "retry-after" in reply.headers


def test_limits_of_the_rules_hold(pictures):
    rules = Rules(limits=Limits(max_tokens=5, images=1), images=ImageRules(max_bytes=10))
    assert chat(Fake(*ANSWER), rules, max_tokens=6).status == 400
    engine = Fake(*ANSWER)
    assert chat(engine, rules).status == 200
    assert engine.asked[0].sampling.max_tokens == 5
    part = {"type": "image_url", "image_url": {"url": data_url(pictures[0])}}
    for parts, message in [([part], "at most 10 bytes"), ([part] * 2, "at most 1 images")]:
        reply = chat(engine, rules, messages=[{"role": "user", "content": parts}])
        assert reply.status == 400
        assert message in reply.json["error"]["message"]


# --- models and health -------------------------------------------------------------------------


def test_the_models():
    listed = request(Fake(), "GET", "/v1/models").json
    assert [entry["id"] for entry in listed["data"]] == ["tiny"]
    assert request(Fake(), "GET", "/v1/models/tiny").json == listed["data"][0]
    assert request(Fake(), "GET", "/v1/models/other").status == 404


def test_health():
    reply = request(Fake(), "GET", "/health")
    assert reply.status == 200
    assert reply.json == {"status": "ok", "queue_length": 3, "model": "tiny"}
    assert request(Fake(raises=Closed()), "GET", "/health").status == 503


# --- pages in a browser on the same machine ----------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8080", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:8080", 200),
     ("[::1]", 200), ("evil.example", 403), ("127.0.0.1.evil.example:8080", 403), ("", 403),
     ("localhost:8080@evil.example", 403), ("evil.example:80:8080", 403), ("::1", 403)],
)  # fmt: skip
def test_a_local_server_answers_to_its_own_names(host, status):
    rules = Rules(hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
    assert (
        request(Fake(), "GET", "/v1/models", headers={"host": host}, rules=rules).status == status
    )
    assert request(Fake(), "GET", "/v1/models", headers={"host": host}).status == 200


def test_web_pages_are_refused_unless_allowed():
    page = {"origin": "http://page.example"}
    reply = request(Fake(), "GET", "/v1/models", headers=page)
    assert reply.status == 403
    assert "access-control-allow-origin" not in reply.headers
    for origins in (("http://page.example",), ("*",)):
        rules = Rules(origins=origins)
        reply = request(Fake(), "GET", "/v1/models", headers=page, rules=rules)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == origins[0]
    rules = Rules(origins=("http://other.example",))
    assert request(Fake(), "GET", "/v1/models", headers=page, rules=rules).status == 403


def test_a_browser_may_ask_first():
    headers = {"origin": "http://page.example", "access-control-request-method": "POST",
               "access-control-request-headers": "content-type,authorization"}  # fmt: skip
    rules = Rules(origins=("http://page.example",))
    reply = request(Fake(), "OPTIONS", "/v1/chat/completions", headers=headers, rules=rules)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "http://page.example"
    assert request(Fake(), "OPTIONS", "/v1/chat/completions", headers=headers).status == 403
