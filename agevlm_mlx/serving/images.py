"""Where the images of a request may come from: data URLs, allowed domains, one folder.

A server that fetches what a stranger names must not become his way into the network behind it
or the files around it. So a host must be on the list, every address that it resolves to must be
public, the connection goes to the address that was checked (a second look-up could answer
otherwise), redirects are refused, and size and time are limited while reading.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from ..errors import UserError, one_line

#: Addresses of IPv6 that stand for an IPv4 address, which a gateway may reach for us.
_WRAPPED = tuple(
    ipaddress.ip_network(text)
    for text in ("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16",
                 "2001::/32")
)  # fmt: skip
_PORTS = {"http": 80, "https": 443}
_CHUNK = 1 << 16
#: Characters of an address that is no data URL; urlsplit remembers what it has read.
_MAX_ADDRESS = 8192
#: The characters of base64 that some clients escape in a URL.
_ESCAPED = {"%2B": "+", "%2b": "+", "%2F": "/", "%2f": "/", "%3D": "=", "%3d": "="}


@dataclass(frozen=True)
class ImageRules:
    """What `read` may open.

    allow_domains: hosts, lower case, with ":port" where it is not the usual one. root: the
    folder of local files; None for none. max_bytes, timeout (seconds): of one image.
    """

    allow_domains: tuple[str, ...] = ()
    root: Path | None = None
    max_bytes: int = 20 << 20
    timeout: float = 10.0

    def read(self, url: str) -> bytes:
        """The bytes of an image; blocks. ``UserError`` when it may not be or cannot be read."""
        scheme = url[:8].partition(":")[0].lower() if ":" in url[:8] else ""
        if scheme == "data":
            return self._data(url)
        if len(url) > _MAX_ADDRESS:
            raise UserError(
                f"expected an address of at most {_MAX_ADDRESS} characters, got {len(url)}; "
                "send the image as data:image/png;base64,..."
            )
        if scheme in _PORTS:
            return self._fetch(url)
        if self.root is None:
            raise UserError(
                "expected a data URL, got another address or a path; send the image as "
                "data:image/png;base64,..."
            )
        return self._file(url, self.root)

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise UserError(
                f"expected at most {self.max_bytes} bytes, got more; make the image smaller"
            )

    # --- data: ---------------------------------------------------------------------------------

    def _data(self, url: str) -> bytes:
        head, comma, payload = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise UserError("expected data:image/...;base64,..., got another kind of data URL")
        if "%" in payload:  # not unquote(), which makes a text of every escape of a stranger
            for escaped, character in _ESCAPED.items():
                payload = payload.replace(escaped, character)
        self._check_size(len(payload) // 4 * 3 - 2)
        try:
            data = base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            raise UserError("expected base64 after the comma of the data URL, got other") from None
        self._check_size(len(data))
        return data

    # --- files ---------------------------------------------------------------------------------

    def _file(self, url: str, root: Path) -> bytes:
        """Links and ".." are followed first, then the result must lie in the root."""
        refused = UserError(
            "expected a file in the folder of --image-root, got none; name one relative to it"
        )
        path = url
        try:
            if url[:5].lower() == "file:":
                parts = urlsplit(url)
                path = unquote(parts.path)
                if parts.netloc not in ("", "localhost"):
                    raise refused
            base = root.resolve(strict=True)
            found = (base / path).resolve(strict=True)
            if not found.is_relative_to(base):
                raise refused
            # Neither a link that has come in between nor a pipe that blocks.
            handle = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, ValueError, RuntimeError):  # no file, no URL, a circle of links
            raise refused from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise refused
            with open(handle, "rb", closefd=False) as file:
                data = file.read(self.max_bytes + 1)
        finally:
            os.close(handle)
        self._check_size(len(data))
        return data

    # --- http: and https: ----------------------------------------------------------------------

    def _fetch(self, url: str) -> bytes:
        parts, host, port = self._allowed(url)
        deadline = time.monotonic() + self.timeout
        try:
            addresses = public_addresses(host, port)
            return self._download(parts, host, port, addresses, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, UserError):
                raise
            if time.monotonic() >= deadline:
                raise UserError(
                    f"expected the image within {self.timeout:g} s, got no end of it"
                ) from None
            # Not the error's own words: they may name addresses of this network.
            raise UserError(f"could not fetch it ({type(error).__name__})") from None

    def _allowed(self, url: str) -> tuple[SplitResult, str, int]:
        refused = UserError(
            "expected a URL of an allowed domain, got another; send the image as a data URL or "
            "start the server with --allow-domain"
        )
        try:
            parts = urlsplit(url)
            usual = _PORTS[parts.scheme]
            port = parts.port or usual
            host = (parts.hostname or "").encode("idna").decode("ascii").lower()
        except (ValueError, KeyError):
            raise refused from None
        name = host if port == usual else f"{host}:{port}"
        # Credentials in a URL are a way to make a host look like another.
        if not host or "@" in parts.netloc or name not in self.allow_domains:
            raise refused
        return parts, host, port

    def _download(
        self,
        parts: SplitResult,
        host: str,
        port: int,
        addresses: Sequence[str],
        deadline: float,
    ) -> bytes:
        lines = [_connect(addresses, port, deadline)]
        # Every read has the rest of the time, and at its end the line is cut: a host that sends
        # a byte now and then would keep a time limit of each read alone from ending.
        cut = threading.Timer(deadline - time.monotonic(), lambda: _cut(lines[-1]))
        cut.daemon = True
        cut.start()
        connection = http.client.HTTPConnection(host, port)
        try:
            if parts.scheme == "https":
                secure = ssl.create_default_context().wrap_socket(
                    lines[0], server_hostname=host, do_handshake_on_connect=False
                )
                lines.append(secure)
                secure.do_handshake()
            connection.sock = lines[-1]
            usual = port == _PORTS[parts.scheme]
            connection.request(
                "GET",
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                headers={
                    "Host": host if usual else f"{host}:{port}",
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": "agevlm",
                    "Connection": "close",
                },
            )
            with connection.getresponse() as response:
                return self._body(response, deadline)
        finally:
            cut.cancel()
            for line in lines:
                line.close()

    def _body(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        if response.status != 200:
            raise UserError(
                f"expected status 200 without a redirect, got {response.status}; send the "
                "image's own address"
            )
        if (response.length or 0) > self.max_bytes:
            self._check_size(response.length or 0)
        data = bytearray()
        while chunk := response.read(min(_CHUNK, self.max_bytes + 1 - len(data))):
            data += chunk
            self._check_size(len(data))
        if time.monotonic() >= deadline or response.length:
            raise ConnectionError("cut off")
        return bytes(data)


def public_addresses(host: str, port: int) -> list[str]:
    """All addresses of `host`; ``UserError`` if one of them is not a public one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"could not find the host ({one_line(type(error)())})") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses or not all(is_public(address) for address in addresses):
        raise UserError("expected a host with public addresses only, got another")
    return addresses


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet, in its own right."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and any(ip in network for network in _WRAPPED):
        return False
    if ip.version == 6 and ip.is_site_local:
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _connect(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """A connection to the first of these numeric addresses that answers."""
    last: OSError = TimeoutError()
    for address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection((address, port), timeout=left)
        except OSError as error:
            last = error
    raise last


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # The plain method: an SSL socket's own is not made for another thread.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
