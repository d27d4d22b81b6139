"""The routes of the server, over any engine. Everything that waits is asynchronous here."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..data.records import Turn
from ..errors import UserError
from . import api, replies
from .api import ApiError, ChatRequest, Limits
from .exchange import Ask, Busy, Closed, Done, Event, Expired, Failed, ModelFailure, Piece
from .images import ImageRules
from .replies import Reply

#: Seconds after which a client may try again when there is no place for it.
RETRY_AFTER = 5
#: Seconds in which a request must have arrived.
BODY_TIMEOUT = 20
#: Requests that may be on their way at the same time; one more, and the oldest is given up.
MAX_RECEIVING = 64
#: Requests that have arrived and are being read, with their images, at the same time.
MAX_READING = 32


class Answers(Protocol):
    """What the app needs of an engine (see `engine.Engine`)."""

    def submit(
        self, ask: Ask, deliver: Callable[[Event], None], *, timeout: float | None = None
    ) -> Any: ...

    def cancel(self, job: Any) -> None: ...

    def status(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Rules:
    """What a request may be and where it may come from.

    hosts: names that the Host header may have; None for any. origins: web pages that may use the
    server ("*" for all). timeout: seconds for an answer; None for no limit.
    """

    limits: Limits = field(default_factory=Limits)
    images: ImageRules = field(default_factory=ImageRules)
    max_body_bytes: int = 32 << 20
    timeout: float | None = None
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()


def make_app(engine: Answers, model: str, rules: Rules) -> ASGIApp:
    """The ASGI app that answers as `model`."""
    service = _Service(engine, model, rules)
    middleware = [Middleware(_Guard, rules=rules)]
    if rules.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=rules.origins, allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{model:path}", service.model_entry),
            Route("/health", service.health),
        ],
        middleware=middleware,
        exception_handlers={
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=499),
            Exception: lambda *_: error_response(ModelFailure()),
            **dict.fromkeys((ApiError, UserError, Busy, Closed, Expired), _handled),
        },
    )


# --- errors ------------------------------------------------------------------------------------


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(str(error))
    if isinstance(error, Busy):
        return ApiError("the queue is full; try again later", status=429, code="queue_full")
    if isinstance(error, Closed):
        return ApiError("the server is shutting down", status=503, code="shutting_down")
    if isinstance(error, Expired):
        return ApiError("no answer in the time a request has", status=504, code="timeout")
    return ApiError("the model failed on this request", status=500, code="model_failure")


def error_response(error: Exception) -> JSONResponse:
    told = as_api_error(error)
    retry = {"Retry-After": str(RETRY_AFTER)} if told.status in (429, 503) else {}
    return JSONResponse(told.body, told.status, headers=retry)


def _handled(_: Request, error: Exception) -> Response:
    return error_response(error)


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(f"{error.detail}; see /v1/models", status=error.status_code)
    return JSONResponse(told.body, error.status_code, headers=error.headers)


# --- routes ------------------------------------------------------------------------------------


class _Service:
    def __init__(self, engine: Answers, model: str, rules: Rules) -> None:
        self.engine, self.model, self.rules = engine, model, rules
        self.created = int(time.time())
        self._receiving: dict[asyncio.Timeout, None] = {}  # the oldest first
        self._reading = 0
        self._parsing = asyncio.Lock()

    async def models(self, _: Request) -> Response:
        return JSONResponse(replies.model_list(self.model, self.created))

    async def model_entry(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(replies.model_entry(self.model, self.created))

    async def health(self, _: Request) -> Response:
        status = self.engine.status()
        return JSONResponse(
            {**status, "model": self.model}, 200 if status["status"] == "ok" else 503
        )

    async def chat(self, request: Request) -> ASGIApp:
        body = await self._receive(request)
        if self._reading >= MAX_READING:
            raise Busy
        self._reading += 1
        try:
            # One after the other: values take far more memory than the text they are read from.
            async with self._parsing:
                asked = await run_in_threadpool(self._parse, body)
            del body  # `asked` has the images once more
            self._check_model(asked.model)
            turns = await run_in_threadpool(self._turns, asked)
        finally:
            self._reading -= 1
        ask = Ask(turns, asked.sampling, asked.attention, asked.top_logprobs)
        reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", self.model, int(time.time()), asked)
        return _Answer(self.engine, ask, reply, self.rules.timeout)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            raise ApiError(
                f"model: expected {self.model!r}, got another; see /v1/models",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def _receive(self, request: Request) -> bytearray:
        """The body. Who sends it too slowly is given up and keeps nobody else out."""
        most = self.rules.max_body_bytes
        too_large = ApiError(
            f"body: expected at most {most} bytes; send smaller images", status=413
        )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > most:
            raise too_large
        if len(self._receiving) >= MAX_RECEIVING:
            oldest = next(iter(self._receiving))
            del self._receiving[oldest]
            if not oldest.expired():  # or it is on its way out already
                oldest.reschedule(0)
        body, deadline = bytearray(), asyncio.timeout(BODY_TIMEOUT)
        try:
            async with deadline:
                self._receiving[deadline] = None
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            if deadline not in self._receiving:
                raise Busy from None
            raise ApiError(f"body: expected within {BODY_TIMEOUT} s", status=408) from None
        finally:
            self._receiving.pop(deadline, None)
        return body

    def _parse(self, body: bytearray) -> ChatRequest:
        return api.chat_request(api.read_json(body), self.rules.limits)

    def _turns(self, asked: ChatRequest) -> tuple[Turn, ...]:
        return tuple(
            Turn(
                message.role,  # pyright: ignore[reportArgumentType]
                message.text,
                tuple(self._image(url, where) for url, where in message.images),
            )
            for message in asked.messages
        )

    def _image(self, url: str, where: str) -> bytes:
        try:
            return self.rules.images.read(url)
        except UserError as error:
            raise ApiError(f"{where}: {error}", param=where) from None


# --- answers -----------------------------------------------------------------------------------


class _Gone:
    """The client has left."""


_NextEvent = Callable[[], Awaitable[Event | _Gone]]


@asynccontextmanager
async def _listening(
    engine: Answers, ask: Ask, receive: Receive, timeout: float | None
) -> AsyncIterator[_NextEvent]:
    """The events of a job, and `_Gone` once the client leaves; afterwards the job is cancelled."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event | _Gone] = asyncio.Queue()
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        events.put_nowait(_Gone())

    async def next_event() -> Event | _Gone:
        event = await events.get()
        return _Gone() if left else event

    def deliver(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = engine.submit(ask, deliver, timeout=timeout)
    watcher = asyncio.create_task(watch())
    try:
        yield next_event
    finally:
        watcher.cancel()
        engine.cancel(job)


@dataclass(frozen=True)
class _Answer:
    """The response of a conversation: submits it, and sends it whole or as a stream of events."""

    engine: Answers
    ask: Ask
    reply: Reply
    timeout: float | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _listening(self.engine, self.ask, receive, self.timeout) as next_event:
            if self.reply.request.stream:
                await self._stream(next_event, scope, receive, send)
                return
            pieces = []
            while isinstance(event := await next_event(), Piece):
                pieces.append(event)
            if isinstance(event, Done):
                response = JSONResponse(self.reply.whole(pieces, event))
            elif isinstance(event, Failed):
                response = error_response(event.error)
            else:
                return
            await response(scope, receive, send)

    async def _stream(
        self, next_event: _NextEvent, scope: Scope, receive: Receive, send: Send
    ) -> None:
        event = await next_event()
        # As long as nothing is sent an error can still have its own status.
        if isinstance(event, Failed):
            await error_response(event.error)(scope, receive, send)
            return
        if isinstance(event, _Gone):
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-cache")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        chunks = [self.reply.first()]
        while isinstance(event, Piece):
            await _send_events(send, [*chunks, self.reply.more(event)])
            chunks = []
            event = await next_event()
        if isinstance(event, Done):
            await _send_events(send, [*chunks, *self.reply.last(event), "[DONE]"])
        elif isinstance(event, Failed):
            await _send_events(send, [as_api_error(event.error).body])
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_events(send: Send, events: Sequence[dict[str, Any] | str]) -> None:
    texts = [e if isinstance(e, str) else json.dumps(e, allow_nan=False) for e in events]
    body = "".join(f"data: {text}\n\n" for text in texts).encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await asyncio.sleep(0)  # so that it is noticed when the client has left


# --- who may ask -------------------------------------------------------------------------------


class _Guard:
    """Refuses what a web page makes a browser on this machine send.

    A page can point its own name at 127.0.0.1 (the Host header tells), or post to us from its
    own address (the Origin header tells).
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refused(Request(scope))):
            await error_response(refused)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refused(self, request: Request) -> ApiError | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.rules.hosts is not None and _without_port(host) not in self.rules.hosts:
            return ApiError("Host: expected the address of this server, got another", status=403)
        allowed = self.rules.origins
        if origin is not None and "*" not in allowed and origin not in allowed:
            return ApiError(
                "Origin: web pages may not use this server; start it with --allowed-origins",
                status=403,
            )
        return None


def _without_port(host: str) -> str:
    """ "[::1]:8080" -> "[::1]"."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
