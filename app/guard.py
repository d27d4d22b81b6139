"""Who may talk to the page: this computer's browser, on the page's own address."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

#: Names of this computer that a browser may call the page by.
LOCAL = ("127.0.0.1", "localhost", "[::1]")
#: Where `share` puts the page.
SHARED = ".gradio.live"
#: Everything comes from the page's own address; Gradio makes functions of text, hence "eval".
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
#: Parts of Gradio that the page does not need: they fetch other addresses, or keep and tell what
#: happened in a tab.
CLOSED = (
    "/gradio_api/file=http",
    "/gradio_api/file/http",
    "/gradio_api/proxy=",
    "/gradio_api/deep_link",
    "/gradio_api/info",
    "/gradio_api/openapi.json",
    "/monitoring",
)

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Guard:
    """ASGI middleware: refuses what another web page makes a browser on this computer send.

    Such a page can point its own name at 127.0.0.1 (the Host header tells) or post from its own
    address (the Origin header tells). What is answered may load nothing from another host.
    """

    def __init__(self, app: App, *, share: bool = False) -> None:
        self._app, self._share = app, share

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        if refused := self._refused(scope):
            status, text = refused
            await guarded(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [(b"content-type", b"text/plain; charset=utf-8")],
                }
            )
            await guarded({"type": "http.response.body", "body": text.encode()})
            return
        await self._app(scope, receive, guarded)

    def _refused(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._ours(host):
            return 403, "Host: expected the address of this page, got another.\n"
        origin = headers.get(b"origin")
        if origin is not None and not self._same(origin.decode("latin-1").lower(), host):
            return 403, "Origin: other web pages may not use this one.\n"
        if scope["path"].lower().startswith(CLOSED):
            return 404, "Not found.\n"
        return None

    def _ours(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        name = name if colon and port.isdecimal() else host
        return name in LOCAL or (self._share and name.endswith(SHARED))

    def _same(self, origin: str, host: str) -> bool:
        """Whether `origin` is the page's own; the tunnel of `share` may rewrite Host."""
        place = urlsplit(origin).netloc
        return place == host or (self._share and self._ours(place))
