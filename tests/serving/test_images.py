"""Where images may come from: what is refused, and that what is allowed arrives."""

import base64
import contextlib
import http.server
import os
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agevlm_mlx.errors import UserError
from agevlm_mlx.serving import images
from agevlm_mlx.serving.images import ImageRules, is_public, public_addresses

PUBLIC = "93.184.216.34"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Names resolve to what a test says, and nothing is connected unless it says how."""

    def refuse(*args, **options):
        pytest.fail(f"connects to {args}")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail(f"asks for {a[0]}"))


def resolve(monkeypatch, *addresses: str) -> list[tuple]:
    """getaddrinfo answers with `addresses`; the list of what it was asked."""
    asked = []

    def getaddrinfo(host, port, *args, **options):
        asked.append((host, port))
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [
            (family[":" in a], socket.SOCK_STREAM, 6, "", (a, port, 0, 0)[: 4 if ":" in a else 2])
            for a in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


# --- addresses that are not on the list --------------------------------------------------------

RULES = ImageRules(allow_domains=("images.example", "127.0.0.1", "localhost", "odd.example:8443"))


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/a.png",
        "http://images.example.evil.example/a.png",
        "http://evil-images.example/a.png",
        "http://sub.images.example/a.png",
        "http://images.example:8080/a.png",
        "https://images.example:80/a.png",
        "https://odd.example/a.png",
        "http://images.example@evil.example/a.png",
        "http://evil.example#@images.example/a.png",
        "http://evil.example\\@images.example/a.png",
        "http://user@images.example/a.png",
        "http://user:password@images.example/a.png",
        "http://[::1]/a.png",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://[fe80::1%25eth0]/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://0x7f000001/a.png",
        "http://2130706433/a.png",
        "http://0177.0.0.1/a.png",
        "http://127.1/a.png",
        "http://0/a.png",
        "http://localhost./a.png",
        "http://images.example./a.png",
        "http://images.example%00.evil.example/a.png",
        "http://%69mages.example.evil/a.png",
        "http://\u24d4vil.example/a.png",
        "http:///a.png",
        "http://",
        "http:images.example/a.png",
        "http://images.example:99999/a.png",
        "http://images.example:-1/a.png",
        "http://[images.example/a.png",
        "http://" + "a" * 300 + ".example/a.png",
    ],
)
def test_other_hosts_are_refused_without_a_look_up(url):
    with pytest.raises(UserError, match="expected a URL of an allowed domain"):
        RULES.read(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1",
        "198.18.0.1", "192.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:93.184.216.34", "::127.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "2002:7f00:1::", "2001:0:4136:e378::1", "2001:db8::1", "fec0::1",
    ],
)  # fmt: skip
def test_a_host_of_an_address_that_is_not_public_is_refused(monkeypatch, address):
    assert not is_public(address)
    asked = resolve(monkeypatch, PUBLIC, address)
    with pytest.raises(UserError, match="public addresses only") as caught:
        RULES.read("https://images.example/a.png")
    assert address not in str(caught.value)
    assert asked == [("images.example", 443)]


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are_public(monkeypatch, address):
    resolve(monkeypatch, address, address)
    assert public_addresses("images.example", 443) == [address]


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "http://localhost/a.png"])
def test_a_private_host_on_the_list_is_refused_all_the_same(monkeypatch, url):
    resolve(monkeypatch, "127.0.0.1")
    with pytest.raises(UserError, match="public addresses only"):
        RULES.read(url)


def test_a_host_that_is_not_found(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match="could not find the host"):
        RULES.read("http://images.example/a.png")
    resolve(monkeypatch)
    with pytest.raises(UserError, match="public addresses only"):
        RULES.read("http://images.example/a.png")


@pytest.mark.parametrize(
    "url",
    ["ftp://images.example/a.png", "gopher://images.example/", "a.png", "/etc/passwd", "",
     "file:///etc/passwd", "javascript:1", "blob:a", "C:\\a.png", "//images.example/a.png"],
)  # fmt: skip
def test_without_a_folder_nothing_else_is_opened(url):
    with pytest.raises(UserError, match="expected a data URL"):
        RULES.read(url)


# --- fetching ----------------------------------------------------------------------------------


class Host(http.server.BaseHTTPRequestHandler):
    """A web server with all the manners that a fetch must survive."""

    def do_GET(self) -> None:
        self.server.heard.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
        elif path == "/huge":
            self.send_response(200)
            self.send_header("Content-Length", str(10**12))
            self.end_headers()
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"x" * 1000)
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.02)
        elif path == "/slow-head":
            for _ in range(200):
                self.wfile.write(b"X")
                time.sleep(0.02)
        elif path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif path == "/nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
        else:
            self.send_response(200 if path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(b"the image")
        self.close_connection = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client hung up, as it should
            super().handle()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def host(monkeypatch) -> Iterator[http.server.HTTPServer]:
    """A server that connections to the public address reach."""
    monkeypatch.undo()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads = True
    server.heard, server.dialled = [], []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def dial(address, timeout=None):
        server.dialled.append(address)
        if address[0] != PUBLIC:
            raise ConnectionRefusedError
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(server.server_address)
        return connection

    monkeypatch.setattr(socket, "create_connection", dial)
    server.asked = resolve(monkeypatch, PUBLIC)
    yield server
    server.shutdown()
    server.server_close()


def test_an_allowed_image_arrives(host):
    assert RULES.read("http://images.example/a.png?size=2#part") == b"the image"
    assert RULES.read("HTTP://IMAGES.example:80/a.png") == b"the image"
    path, headers = host.heard[0]
    assert path == "/a.png?size=2"
    assert headers["Host"] == "images.example"
    assert "Authorization" not in headers
    assert "Cookie" not in headers


def test_the_connection_goes_to_the_address_that_was_checked(host, monkeypatch):
    # A name that answers with a public address first and with a private one after: rebinding.
    answers = [PUBLIC, "127.0.0.1"]

    def getaddrinfo(name, port, *args, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert RULES.read("http://images.example/a.png") == b"the image"
    assert host.dialled == [(PUBLIC, 80)]
    assert answers == ["127.0.0.1"]


def test_the_next_address_is_tried(host, monkeypatch):
    resolve(monkeypatch, "8.8.8.8", PUBLIC)
    assert RULES.read("http://images.example/a.png") == b"the image"
    assert [address for address, _ in host.dialled] == ["8.8.8.8", PUBLIC]


def test_another_port_that_is_on_the_list(host):
    with pytest.raises(UserError, match="SSLError"):  # the test's host speaks no TLS
        RULES.read("https://odd.example:8443/a.png")
    assert host.asked == [("odd.example", 8443)]
    assert host.dialled == [(PUBLIC, 8443)]


def test_a_certificate_is_checked_against_the_name(host, monkeypatch):
    asked = {}

    class Plain(socket.socket):
        def do_handshake(self) -> None:
            asked["shaken"] = True

    def wrap(self, sock, server_hostname=None, **_):
        asked.update(name=server_hostname, checks=self.check_hostname, mode=self.verify_mode)
        plain = Plain(fileno=sock.detach())
        plain.settimeout(1)
        return plain

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    assert RULES.read("https://images.example/a.png") == b"the image"
    assert asked.pop("shaken")
    assert asked == {"name": "images.example", "checks": True, "mode": ssl.CERT_REQUIRED}
    assert host.heard[0][1]["Host"] == "images.example"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/redirect", "expected status 200 without a redirect, got 302"),
        ("/missing", "got 404"),
        ("/huge", "expected at most 5000 bytes"),
        ("/endless", "expected at most 5000 bytes"),
        ("/slow", "within 0.3 s"),
        ("/slow-head", "within 0.3 s"),
        ("/short", "could not fetch it"),
        ("/nonsense", "could not fetch it"),
        ("/a b", "could not fetch it"),
        ("/\r\nHost: evil", "could not fetch it|got 404"),
    ],
)
def test_bad_manners_of_a_host_are_one_line(host, path, message):
    rules = ImageRules(allow_domains=("images.example",), max_bytes=5000, timeout=0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        rules.read(f"http://images.example{path}")
    assert time.monotonic() - start < 2
    assert "\n" not in str(caught.value)
    assert PUBLIC not in str(caught.value)
    assert len(host.heard) <= 1
    assert all("evil" not in headers.get("Host", "") for _, headers in host.heard)


def test_a_host_that_does_not_answer(host, monkeypatch):
    resolve(monkeypatch, "8.8.8.8")
    with pytest.raises(UserError, match=r"could not fetch it \(ConnectionRefusedError\)"):
        RULES.read("http://images.example/a.png")


# --- data URLs ---------------------------------------------------------------------------------


def test_a_data_url_is_its_bytes():
    rules = ImageRules(max_bytes=9)
    encoded = base64.b64encode(b"the image").decode()
    assert rules.read(f"data:image/png;base64,{encoded}") == b"the image"
    assert rules.read(f"DATA:;base64,{encoded}") == b"the image"
    assert rules.read("data:image/png;base64,") == b""


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_the_characters_of_base64_may_be_escaped_in_a_data_url(case):
    data = b"\xfb\xef\xbe\xff\xff\xff1"
    encoded = base64.b64encode(data).decode()
    assert set("+/=") < set(encoded)
    for character in "+/=":
        encoded = encoded.replace(character, case(f"%{ord(character):x}"))
    # The size that counts is the one without the escapes.
    assert ImageRules(max_bytes=9).read("data:image/png;base64," + encoded) == data


@pytest.mark.parametrize(("escape", "good"), [("%2B", True), ("%41", False), ("%252B", False)])
def test_a_data_url_of_escapes_takes_little_memory(escape, good):
    url = "data:image/png;base64," + escape * 400_000
    tracemalloc.start()
    try:
        with contextlib.nullcontext() if good else pytest.raises(UserError, match="got other"):
            ImageRules().read(url)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(url)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png,abc", "another kind of data URL"),
        ("data:image/png;base64", "another kind of data URL"),
        ("data:", "another kind of data URL"),
        ("data:image/png;base64,a", "got other"),
        ("data:image/png;base64,a*b=", "got other"),
        ("data:image/png;base64,%61%61%61%61", "got other"),
        ("data:image/png;base64,aaa%", "got other"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "got other"),
        ("data:image/png;base64," + base64.b64encode(b"x" * 10).decode(), "at most 9 bytes"),
        ("data:image/png;base64," + "A" * 10**6, "at most 9 bytes"),
    ],
)
def test_a_bad_data_url_is_one_line(url, message):
    with pytest.raises(UserError, match=message) as caught:
        ImageRules(max_bytes=9).read(url)
    assert len(str(caught.value)) < 200


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "a b.png").write_bytes(b"the image")
    (folder / "sub" / "%2e%2e.png").write_bytes(b"odd")
    (folder / "large.png").write_bytes(b"x" * 101)
    (folder / "inside.png").symlink_to(folder / "a b.png")
    (folder / "outside.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    os.mkfifo(folder / "pipe")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "root-too").mkdir()
    (tmp_path / "root-too" / "a.png").write_bytes(b"secret")
    return folder


@pytest.mark.parametrize(
    "url",
    ["a b.png", "sub/../a b.png", "./a b.png", "inside.png", "{root}/a b.png",
     "file:{root}/a%20b.png", "file://{root}/a%20b.png", "FILE://localhost{root}/a%20b.png"],
)  # fmt: skip
def test_files_of_the_folder_are_opened(root, url):
    assert ImageRules(root=root, max_bytes=100).read(url.format(root=root)) == b"the image"


def test_a_path_is_no_url(root):
    assert ImageRules(root=root).read("sub/%2e%2e.png") == b"odd"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "/etc/passwd", "../secret.png", "sub/../../secret.png", "outside.png",
     "up/secret.png", "up/root-too/a.png", "../root-too/a.png", "{root}-too/a.png",
     "file://{root}/../secret.png", "file://{root}/%2e%2e/secret.png",
     "file://{root}/..%2fsecret.png", "%2e%2e/secret.png", "..%2fsecret.png",
     "file://other.host{root}/a%20b.png", "file://[{root}/a%20b.png",
     "file://{root}/a%00b.png", "a\0b.png", "missing.png", "circle",
     "pipe", "sub", "", ".", "..", "/", "~/a.png", "file:", "x" * 5000, "a\nb",
     "ftp://images.example/a.png", "/dev/zero", "/proc/self/environ"],
)  # fmt: skip
def test_nothing_else_is(root, url):
    rules = ImageRules(root=root, max_bytes=100)
    with pytest.raises(UserError, match="expected a file in the folder of --image-root") as caught:
        rules.read(url.format(root=root))
    assert str(root) not in str(caught.value)


def test_a_large_file_is_refused(root):
    with pytest.raises(UserError, match="at most 100 bytes"):
        ImageRules(root=root, max_bytes=100).read("large.png")


def test_a_root_that_is_a_link_or_has_gone(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    assert ImageRules(root=link).read("a b.png") == b"the image"
    with pytest.raises(UserError, match="expected a file in the folder"):
        ImageRules(root=tmp_path / "gone").read("a b.png")


@pytest.mark.parametrize("url", ["http://images.example/", "file:///", "", "../"])
def test_a_very_long_address_is_refused_before_it_is_read(url, root, monkeypatch):
    monkeypatch.setattr(images, "urlsplit", lambda *_: pytest.fail("reads it"))
    rules = ImageRules(allow_domains=("images.example",), root=root)
    with pytest.raises(UserError, match="at most 8192 characters") as caught:
        rules.read(url + "%41" * 3000)
    assert len(str(caught.value)) < 200


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.text(max_size=40)
    | st.builds(
        "{}{}".format,
        st.sampled_from(["http://", "https://images.example", "file://", "data:", "/", "../"]),
        st.text(max_size=20),
    )
)
def test_any_text_is_refused_in_one_line(root, url):
    rules = ImageRules(allow_domains=("images.example",), root=root)
    refused = None
    try:
        with pytest.MonkeyPatch.context() as patch:
            resolve(patch, "127.0.0.1")
            rules.read(url)
    except UserError as error:
        refused = str(error)
    assert refused is not None or url.lower().startswith("data:")
    assert refused is None or ("\n" not in refused and len(refused) < 200)
