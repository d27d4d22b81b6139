"""The real page, served by the real command on the loopback address."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port() -> int:
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(port: int, model: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "app", "--model", str(model), "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
    )


@pytest.fixture(scope="module")
def served(port: int, tiny_checkpoint: Path) -> Iterator["subprocess.Popen[str]"]:
    process = start(port, tiny_checkpoint)
    try:
        for _ in range(300):
            assert process.poll() is None, process.stderr and process.stderr.read()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_page_names_no_other_host(served, port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as reply:
        page = reply.read().decode()
    assert "see where every word looks" in page
    assert "fonts.googleapis.com" not in page
    assert '"analytics_enabled":true' not in page


def test_files_of_the_server_are_not_served(served, port):
    for path in ("/etc/passwd", str(ROOT / "pyproject.toml")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/file={path}", timeout=30)
        assert refused.value.code in (403, 404)


def test_a_taken_port_is_one_line(served, port, tiny_checkpoint):
    second = start(port, tiny_checkpoint)
    _, error = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"error: --port: {port} is taken" in error
    assert "Traceback" not in error


def test_ctrl_c_ends_it(served, port):
    served.send_signal(signal.SIGINT)
    out, error = served.communicate(timeout=60)
    assert served.returncode in (0, 130), error
    assert f"http://127.0.0.1:{port}" in out
    assert "Traceback" not in error
