"""The real page, served by the real command on the loopback address, asked over HTTP."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from agevlm_mlx.data.painting import make_scene
from app.pictures import MAX_UPLOAD
from tests.app.tab import Tab

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port() -> int:
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(port: int, model: Path, temporary: Path) -> "subprocess.Popen[str]":
    clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    return subprocess.Popen(
        [sys.executable, "-m", "app", "--model", str(model), "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "TMPDIR": str(temporary)},
    )


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of the command."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def served(port: int, tiny_checkpoint: Path, temporary: Path) -> Iterator["subprocess.Popen[str]"]:
    process = start(port, tiny_checkpoint, temporary)
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


@pytest.fixture
def client(served, port) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        yield client


def uploads(temporary: Path) -> list[Path]:
    return [path for path in temporary.glob("agevlm-app-*/*/*") if path.is_file()]


def until(true: Callable[[], bool]) -> None:
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in 30 seconds")


def painted() -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_scene(2, "test", 2).image).save(file, "PNG")
    return file.getvalue()


def test_a_question_its_words_and_what_stays_of_it(client, temporary):
    with Tab(client).open() as tab:
        picture = tab.upload("painted.png", painted())
        tab["message"] = {"text": "Is there a dog?", "files": [picture]}
        tab.happen("submit", "message")
        (exchange,) = tab["page"]["exchanges"]
        assert exchange["state"] == "done", exchange
        assert exchange["stats"]["images_seen"] == 1
        query = {"key": tab["page"]["key"], "exchange": exchange["id"]}
        looks = tab.serve("page", "looks", query)
        assert [w["text"] for w in looks["words"] if w["role"] == "user"][-1] == "dog"
        (shown,) = tab.serve("page", "pictures", {**query, "ids": exchange["pictures"]})
        assert shown["src"].startswith("data:image/")
        for kind in ("json", "html"):
            file = tab.serve("page", "download", {**query, "format": kind})
            assert "Is there a dog?" in file["text"]
            assert query["key"] not in file["text"]
        tab["message"] = {"text": "And a house?", "files": []}
        tab.happen("submit", "message")
        assert tab["page"]["exchanges"][-1]["stats"]["images_known"] == 1
        assert [path.name for path in uploads(temporary)] == ["painted.png"]
    until(lambda: uploads(temporary) == [])


def test_a_word_and_two_models(client):
    with Tab(client).open() as tab:
        tab["presence-image"] = tab.upload("painted.png", painted())
        tab["presence-text"] = "dog, house"
        tab.happen("click", "presence-ask")
        assert tab["presence-out"].count("<img") >= 2
        tab["compare-message"] = {"text": "Is there a dog?", "files": [tab["presence-image"]]}
        tab.happen("submit", "compare-message")
        for side in ("left", "right"):
            assert tab[f"compare-{side}"]["exchanges"][-1]["state"] == "done"
        assert "4 bits" in tab["compare-status"]


def test_bad_input_is_a_sentence_and_the_server_goes_on(client):
    with Tab(client).open() as tab:
        for data in (b"", b"no picture", painted()[:200]):
            tab["message"] = {"text": "Is there a dog?", "files": [tab.upload("bad.png", data)]}
            tab.happen("submit", "message")
            exchange = tab["page"]["exchanges"][-1]
            assert exchange["state"] == "failed"
            assert exchange["error"].startswith("bad.png")
        tab["model"] = "/nowhere/at/all"
        tab.happen("click", "load")
        assert "told" in tab["loading"]
        assert "/nowhere" not in tab["loading"]
        tab["message"] = {"text": "Hello", "files": []}
        tab.happen("submit", "message")
        assert tab["page"]["exchanges"][-1]["state"] == "done"


def test_a_file_that_is_too_large_is_refused(client):
    large = {"files": ("large.png", b"\0" * (MAX_UPLOAD + 1), "image/png")}
    assert client.post("/gradio_api/upload", files=large).status_code == 413


def test_the_page_names_no_other_host(client):
    page = client.get("/").text
    assert "see where every word looks" in page
    assert "fonts.googleapis.com" not in page
    assert '"analytics_enabled":true' not in page


def test_files_of_the_server_are_not_served(client):
    for path in ("/etc/passwd", str(ROOT / "pyproject.toml"), str(ROOT / "app" / "ui.py")):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_a_taken_port_is_one_line(served, port, tiny_checkpoint, temporary):
    second = start(port, tiny_checkpoint, temporary)
    _, error = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"error: --port: {port} is taken" in error
    assert "Traceback" not in error


def test_ctrl_c_ends_it(served, port, temporary):
    served.send_signal(signal.SIGINT)
    out, error = served.communicate(timeout=60)
    assert served.returncode in (0, 130), error
    assert f"http://127.0.0.1:{port}" in out
    assert "Traceback" not in error
    assert list(temporary.glob("agevlm-app-*")) == []
