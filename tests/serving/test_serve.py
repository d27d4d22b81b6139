"""`agevlm serve` up to where the model is loaded."""

import argparse
import importlib.util
import signal
import socket

import pytest

from agevlm_mlx import serve
from agevlm_mlx.serving.app import Rules


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr("agevlm_mlx.weights.load", lambda *_: pytest.fail("loaded"))


@pytest.mark.parametrize(
    "args",
    [
        ["--port", "-1"],
        ["--port", "65536"],
        ["--port", "99999"],
        ["--host", "no.such.host.invalid"],
        ["--host", "a b"],
        ["--image-root", "/no/such/folder"],
        ["--image-root", "~no-such-user/folder"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--max-tokens", "0"],
        ["--max-prompt-tokens", "0"],
        ["--decode-concurrency", "0"],
        ["--prompt-concurrency", "0"],
        ["--prefill-step-size", "0"],
        ["--max-queue", "-1"],
        ["--max-images", "-1"],
        ["--max-pixels", "0"],
        ["--max-body-bytes", "0"],
        ["--prompt-cache-size", "-1"],
    ],
    ids=" ".join,
)
def test_bad_options_are_one_line(args, capsys, monkeypatch):
    def getaddrinfo(host, port, *rest, **options):  # no network
        if host != "127.0.0.1":
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port % 65536))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert serve.main(args) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {args[0]}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "args",
    [["--allow-domain", "http://a.example"], ["--allow-domain", "*.example"],
     ["--allow-domain", ""], ["--allow-domain", "a.example:99999"],
     ["--allow-domain", "a.example:"], ["--allow-domain", "a.example."],
     ["--allow-domain", "a/b"], ["--image-cache-bytes", "lots"], ["--image-cache-bytes", "-1"]],
    ids=" ".join,
)  # fmt: skip
def test_values_of_the_wrong_kind(args, capsys):
    with pytest.raises(SystemExit) as caught:
        serve.main(args)
    assert caught.value.code == 2
    assert args[0] in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65535"])
def test_the_ports_there_are(port):
    serve._check(parsed("--port", port))


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve.main(["--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_without_the_extra_it_says_which(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert serve.main([]) == 2
    said = capsys.readouterr().err
    assert said == "error: serve: uvicorn not installed; pip install 'agevlm-mlx[serve]'\n"


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    assert "agevlm serve --allow-domain" in capsys.readouterr().out


def test_signals_are_left_as_they_were(monkeypatch):
    monkeypatch.setattr(serve, "_serve", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    assert serve.main(["--port", "0"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def parsed(*args: str) -> argparse.Namespace:
    return serve._parser().parse_args(args)


def test_the_options_become_rules(tmp_path):
    rules = serve._rules(
        parsed(
            "--allow-domain", "Images.Example", "--allow-domain", "bücher.example:8443",
            "--image-root", str(tmp_path), "--max-tokens", "7", "--max-images", "2",
            "--max-image-bytes", "3KB", "--max-body-bytes", "1MB", "--timeout", "2.5",
            "--allowed-origins", "http://a,http://b",
        )
    )  # fmt: skip
    assert rules.images.allow_domains == ("images.example", "xn--bcher-kva.example:8443")
    assert rules.images.root == tmp_path
    assert rules.images.max_bytes == 3 << 10
    assert (rules.limits.max_tokens, rules.limits.images) == (7, 2)
    assert (rules.max_body_bytes, rules.timeout) == (1 << 20, 2.5)
    assert rules.origins == ("http://a", "http://b")


def test_the_defaults_are_closed():
    rules = serve._rules(parsed())
    assert rules == Rules(hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
    assert parsed().host == "127.0.0.1"


def test_the_options_become_settings():
    settings = serve._settings(
        parsed("--decode-concurrency", "3", "--image-cache-bytes", "2GB", "--max-pixels", "9")
    )
    assert settings.decode_concurrency == 3
    assert settings.image_cache_bytes == 2 << 30
    assert settings.max_pixels == 9


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.0.0.2", True),
     ("0.0.0.0", False), ("192.168.1.5", False), ("my.host", False)],
)  # fmt: skip
def test_only_a_local_server_minds_its_name(host, local):
    names = serve._own_names(host)
    assert (names is not None) == local
    if names is not None:
        assert (f"[{host}]" if ":" in host else host) in names


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("123", 123), ("4K", 4096), ("4kb", 4096), ("1 MB", 1 << 20), ("2G", 2 << 30)],
)
def test_sizes(text, size):
    assert serve._size(text) == size


def test_a_model_is_called_by_its_name_never_by_its_path(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert serve._model_name(None, folder) == "agevlm"
    assert serve._model_name(str(folder), folder) == "my-model"
    assert serve._model_name("someone/model", folder / "snapshots" / "abc") == "someone/model"
