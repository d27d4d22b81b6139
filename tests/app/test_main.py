"""The command line of `agevlm-app`, with the real model behind a page made of nothing."""

import os
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import app as package
from agevlm_mlx.errors import UserError
from app import __main__ as command
from app import window

is_free = command._is_free  # the real one


class Page:
    """Stands for `app.ui`: keeps what it was given, and does `meanwhile` once it is waited for."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.sessions: Any = None
        self.closed = False
        self.public: str | None = None
        self.taken: set[int] = set()  # since it was looked at
        self.meanwhile: Callable[[], None] = lambda: None

    class PortTaken(UserError):
        pass

    @contextmanager
    def running(self, sessions: Any, **given: Any) -> Iterator[Any]:
        if given["port"] in self.taken:
            raise self.PortTaken(f"--port: {given['port']} cannot be opened")
        self.sessions, self.given = sessions, given
        try:
            local = f"http://127.0.0.1:{given['port']}"
            yield types.SimpleNamespace(local=local, public=self.public)
        finally:
            self.closed = True


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Page:
    """The page of the command, which is then ended with Ctrl-C."""

    def wait() -> None:
        page.meanwhile()
        raise KeyboardInterrupt

    page = Page()
    monkeypatch.chdir(tmp_path)  # no runs/ of whoever runs the tests
    monkeypatch.setitem(sys.modules, "app.ui", page)
    monkeypatch.setattr(package, "ui", page, raising=False)
    monkeypatch.setattr(command, "_wait", wait)
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    monkeypatch.setattr(command, "_is_free", lambda port: True)
    monkeypatch.delenv(command.AUTH_VARIABLE, raising=False)
    return page


def models() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "model"]


# --- starting and ending ---------------------------------------------------------------------


def test_one_line_with_the_address_and_the_model(page, capsys):
    assert command.main([]) == 130
    out, error = capsys.readouterr()
    assert out == "AgeVLM is at http://127.0.0.1:7860 with the shipped model; Ctrl-C ends it.\n"
    assert error == "\ninterrupted\n"
    assert page.given == {"port": 7860, "share": False, "auth": [], "extra_models": []}


def test_it_ends_with_nothing_left_behind(page):
    page.meanwhile = lambda: page.sessions.open("tab")
    before = signal.getsignal(signal.SIGTERM)
    assert command.main([]) == 130
    assert page.closed
    assert len(page.sessions) == 0
    assert models() == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_kind_kill_ends_it_as_well(page):
    page.meanwhile = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        command.main([])
    assert leaving.value.code == 0
    assert page.closed
    assert models() == []


def test_what_a_new_tab_begins_with(page, tmp_path):
    (tmp_path / "more").mkdir()
    told: list[Any] = []

    def look() -> None:
        session = page.sessions.open("tab")
        told.append((session.state()["model"]["name"], session.sampling, session.system))

    page.meanwhile = look
    arguments = ["--bits", "4", "--temp", "0.5", "--max-tokens", "7", "--stop", "end"]
    arguments += ["--system-prompt", "Be brief.", "--models", "more", "--port", "8000"]
    assert command.main(arguments) == 130
    [(called, sampling, system)] = told
    assert called == "the shipped model in 4 bits"
    assert (sampling.temp, sampling.max_tokens, sampling.stop) == (0.5, 7, ("end",))
    assert system == "Be brief."
    assert page.given["extra_models"] == [Path("more")]
    assert page.given["port"] == 8000


def test_a_conversation_is_freed_after_so_many_minutes(page, monkeypatch):
    told: list[Any] = []

    def look() -> None:
        session = page.sessions.open("tab")
        for seconds in (110, 130):
            monkeypatch.setattr(session, "idle", lambda seconds=seconds: seconds)
            page.sessions.free_idle()
            told.append(len(page.sessions))

    page.meanwhile = look
    assert command.main(["--idle", "2"]) == 130
    assert told == [1, 0]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_a_terminal(page, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    command.main([])
    error = capsys.readouterr().err
    assert ("model: 100 %, reading, 7.9 MB of 7.9 MB" in error) == terminal
    assert ("\r" in error) == terminal


def test_a_model_that_cannot_be_used(page, capsys, tmp_path):
    assert command.main(["--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: expected an AgeVLM checkpoint, found no config.json in it\n"
    )
    assert page.sessions is None
    assert models() == []


def test_a_model_that_fails_is_a_line_too(page, capsys, monkeypatch):
    monkeypatch.setattr("app.catalogue.load", lambda *args, **options: 1 / 0)
    assert command.main([]) == 2
    assert "error: the model failed (ZeroDivisionError)" in capsys.readouterr().err
    assert models() == []


# --- ports -----------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_taken_port_is_passed_over_unless_it_was_asked_for(page, taken, capsys, monkeypatch):
    monkeypatch.setattr(command, "_is_free", is_free)
    assert not is_free(taken)
    monkeypatch.setattr(command, "PORTS", range(taken, taken + 1))
    with pytest.raises(UserError, match=f"--port: {taken} to {taken} are taken"):
        command._port(None)
    assert command.main(["--port", str(taken)]) == 2
    assert capsys.readouterr().err == (
        f"error: --port: {taken} is taken by another program; pass another one, or leave it out\n"
    )


def test_the_next_port_is_taken_and_that_is_said(page, capsys, monkeypatch):
    monkeypatch.setattr(command, "_is_free", lambda port: port >= 7863)
    assert command.main([]) == 130
    out, error = capsys.readouterr()
    assert "http://127.0.0.1:7863 " in out
    assert "Port 7860 is taken by another program; this is 7863." in error
    assert page.given["port"] == 7863


def test_a_port_that_another_program_was_faster_to_take(page, capsys):
    page.taken = {7860, 7861}  # though they were free a moment ago

    def is_free(port: int) -> bool:
        return port not in tried or port not in page.taken

    tried: list[int] = []
    running = page.running

    def run(sessions: Any, **given: Any) -> Any:
        tried.append(given["port"])
        return running(sessions, **given)

    page.running = run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_is_free", is_free)
        assert command.main([]) == 130
        assert tried == [7860, 7861, 7862]
        assert "is taken by another program; this is 7862." in capsys.readouterr().err
        assert command.main(["--port", "7861"]) == 2
    assert "--port: 7861" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "70000", "-1"])
def test_a_port_that_cannot_be(page, port, capsys):
    assert command.main(["--port", port]) == 2
    assert f"--port: expected 1 to 65535, got {port}" in capsys.readouterr().err


# --- who may see it --------------------------------------------------------------------------


def test_names_and_passwords(page, monkeypatch):
    monkeypatch.setenv(command.AUTH_VARIABLE, "ann:a b:c\n\n  bob:x \n")
    assert command.main(["--auth", "eve:p", "--auth", "joe:q"]) == 130
    assert page.given["auth"] == [("eve", "p"), ("joe", "q"), ("ann", "a b:c"), ("bob", "x")]


@pytest.mark.parametrize("pair", ["secret", ":secret", "name:", "", ":"])
@pytest.mark.parametrize("variable", [False, True])
def test_half_a_password_is_refused_and_not_repeated(page, pair, variable, monkeypatch, capsys):
    if variable:
        monkeypatch.setenv(command.AUTH_VARIABLE, f"x:y\n{pair or ':'}")
    assert command.main([] if variable else ["--auth", pair]) == 2
    error = capsys.readouterr().err
    where = command.AUTH_VARIABLE if variable else "--auth"
    assert error == f"error: {where}: expected NAME:PASSWORD, neither of them empty\n"


@pytest.mark.parametrize("auth", [False, True])
def test_a_public_address_comes_with_a_warning(page, auth, capsys):
    page.public = "https://abc.gradio.live"
    assert command.main(["--share", *(["--auth", "me:secret"] if auth else [])]) == 130
    out, error = capsys.readouterr()
    assert page.given["share"]
    assert "Anyone on the internet can open https://abc.gradio.live" in error
    assert ("--auth NAME:PASSWORD" in error) != auth
    assert "secret" not in out + error


def test_nothing_is_shared_unless_asked_for(page, capsys):
    command.main([])
    assert not page.given["share"]
    assert "internet" not in capsys.readouterr().err


# --- window and browser ----------------------------------------------------------------------


class FakeWebview(types.ModuleType):
    """Stands for pywebview: settings, windows, and a loop that ends as if the window was closed."""

    class WebViewException(Exception):
        pass

    def __init__(self, error: str = "", kill: bool = False) -> None:
        super().__init__("webview")
        self.destroyed, self._kill = 0, kill
        self.settings = {"ALLOW_DOWNLOADS": False}
        self.windows: list[tuple[Any, ...]] = []
        self.started: list[dict[str, Any]] = []
        self._error = error

    def create_window(self, title: str, url: str, **options: Any) -> Any:
        self.windows.append((title, url, options))
        return self

    def destroy(self) -> None:
        self.destroyed += 1

    def start(self, **options: Any) -> None:
        if self._error:
            raise self.WebViewException(self._error)
        assert threading.current_thread() is threading.main_thread()
        if self._kill:
            os.kill(os.getpid(), signal.SIGTERM)
        self.started.append(options | {"downloads": self.settings["ALLOW_DOWNLOADS"]})


def test_closing_the_window_ends_the_app(page, monkeypatch, capsys):
    webview = FakeWebview()
    monkeypatch.setitem(sys.modules, "webview", webview)
    assert command.main(["--window"]) == 0
    [(title, url, options)] = webview.windows
    assert (title, url) == ("AgeVLM", "http://127.0.0.1:7860")
    assert options["text_select"]  # an answer can be copied
    assert webview.started == [{"private_mode": True, "downloads": True}]
    assert "closing the window ends it" in capsys.readouterr().out
    assert page.closed
    assert models() == []


def test_a_kind_kill_closes_the_window(page, monkeypatch):
    webview = FakeWebview(kill=True)
    monkeypatch.setitem(sys.modules, "webview", webview)
    assert command.main(["--window"]) == 0
    assert webview.destroyed == 1
    assert page.closed


def test_a_computer_without_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, "webview", FakeWebview("You must have\nGTK or QT."))
    with pytest.raises(UserError) as caught:
        window.show("http://127.0.0.1:7860")
    assert str(caught.value) == (
        "--window: cannot open one here: You must have GTK or QT. Without --window it is a page "
        "for the browser"
    )


@pytest.mark.parametrize("flags", [[], ["--browser"]])
def test_the_browser_is_opened_only_if_asked_for(page, flags, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    command.main(flags)
    assert opened == ["http://127.0.0.1:7860"] * len(flags)


# --- bad input -------------------------------------------------------------------------------


def test_help_says_how_to_start_it(capsys):
    with pytest.raises(SystemExit) as leaving:
        command.main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert text.count("agevlm-app") >= 2
    for flag in ("--model", "--bits", "--port", "--share", "--auth", "--window", "--browser",
                 "--models", "--idle", "--system-prompt", "--temp", "--max-tokens"):  # fmt: skip
        assert f"\n  {flag}" in text or f"| {flag}" in text, flag


@pytest.mark.parametrize(
    ("missing", "flags", "extra"),
    [("gradio", [], "app"), ("gradio", ["--window"], "app"), ("webview", ["--window"], "window")],
)
def test_what_is_not_installed_is_named(page, missing, flags, extra, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else object())
    assert command.main(flags) == 2
    error = capsys.readouterr().err
    assert f'pip install "agevlm-mlx[{extra}]"' in error
    assert error.count("\n") == 1
    assert page.sessions is None


def test_without_a_window_pywebview_is_not_needed(page, monkeypatch):
    installed = {"webview": None}
    monkeypatch.setattr(command, "find_spec", lambda name: installed.get(name, object()))
    assert command.main([]) == 130


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--idle", "0"], "--idle: expected more than 0 minutes, got 0"),
        (["--idle", "nan"], "--idle: expected more than 0 minutes, got nan"),
        (["--models", "absent"], "--models: expected a folder, got absent"),
        (["--temp", "-1"], "--temp: expected 0 (greedy) or more, got -1.0"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
    ],
)
def test_numbers_and_folders_that_cannot_be(page, flags, expected, capsys):
    assert command.main(flags) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert page.sessions is None


@pytest.mark.parametrize("flags", [["--bits", "3"], ["--window", "--browser"], ["--port", "x"]])
def test_flags_that_argparse_refuses(page, flags):
    with pytest.raises(SystemExit) as leaving:
        command.main(flags)
    assert leaving.value.code == 2
