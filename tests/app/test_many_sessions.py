"""Two hundred tabs come, ask about a picture of their own and go: nothing of them stays."""

import contextlib
import ctypes
import gc
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from agevlm_mlx.sampling import Sampling
from tests.app.browsing import SHIPPED, App, Chat, picture, running, scene
from tests.app.tab import Tab

pytestmark = pytest.mark.chaos

#: By the 80th session Gradio has forgotten the first ones, of which it keeps 64.
TABS, SETTLED = 200, 80
#: MB that the memory may grow by after that; the pictures of these sessions alone are 120.
ALLOWED = 25


def megabytes(pid: int) -> float:
    """Memory of a process that lies in RAM."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(told.stdout) / 1024


def give_back() -> None:
    """Let go of what nobody refers to, down to the pages that glibc would keep for later."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not on a Mac
        ctypes.CDLL(None).malloc_trim(0)


def own_picture(number: int) -> tuple[str, bytes]:
    """A picture that no other session has: the same file would be stored once."""
    painted = scene(2)
    painted.image[:4, :4] = np.frombuffer(number.to_bytes(3, "big"), np.uint8)
    return picture(painted, side=1024)


def converse(tab: Tab, number: int) -> None:
    """Upload, ask, and pull the maps of the answer's words, as the page does."""
    shown = tab.upload(*own_picture(number))
    tab["message"] = {"text": "Is there a house?", "files": [shown]}
    tab.happen("submit", "message")
    state = tab["page"]
    assert state["exchanges"][-1]["answer"] == "Yes", state
    query = {"key": state["key"], "exchange": state["exchanges"][-1]["id"]}
    looked = tab.serve("page", "looks", query)
    assert "house" in [word["text"] for word in looked["words"]]


def sessions_left(app: App) -> int:
    """How many sessions the app says are open."""
    before = app.said.count("sessions ")
    app.process.send_signal(signal.SIGUSR1)
    while app.said.count("sessions ") == before:
        time.sleep(0.05)
    return int(re.findall(r"sessions (\d+)", app.said)[-1])


def wait_until_all_are_closed(app: App) -> None:
    for _ in range(400):
        if sessions_left(app) == 0:
            return
        time.sleep(0.1)
    pytest.fail(f"{sessions_left(app)} sessions stay open")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The app, which also says how many sessions are open."""
    script = Path(__file__).with_name("misbehaving.py")
    with running(tmp_path_factory.mktemp("watched"), script) as app:
        yield app
    assert "Traceback" not in app.complained, app.complained


def test_two_hundred_tabs_leave_nothing_behind(watched):
    memory = {}
    with httpx.Client(base_url=watched.address, timeout=60, trust_env=False) as client:
        for number in range(1, TABS + 1):
            with Tab(client).open() as tab:
                converse(tab, number)
            if number in (SETTLED, TABS):
                wait_until_all_are_closed(watched)
                memory[number] = megabytes(watched.process.pid)
    assert watched.temporary == [], "uploads stay"
    assert memory[TABS] - memory[SETTLED] < ALLOWED, memory


def test_ten_real_tabs_leave_nothing_behind(watched, new_context):
    for number in range(10):
        page = new_context().new_page()
        Chat(page, watched.address).ask("Is there a house?", own_picture(TABS + number))
        page.close()
    wait_until_all_are_closed(watched)
    assert watched.temporary == []


def test_two_hundred_sessions_without_a_page():
    from app.catalogue import Choice, load_model
    from app.desk import Desk
    from app.sessions import Sessions
    from app.worker import Worker

    worker = Worker(lambda: Desk(load_model))
    memory = {}
    try:
        sessions = Sessions(worker, Choice(str(SHIPPED)))
        for number in range(1, TABS + 1):
            session = sessions.open(f"tab {number}")
            session.sampling = Sampling(max_tokens=4)
            *_, state = session.ask("Is there a house?", [own_picture(number)])
            assert state["exchanges"][-1]["state"] == "done"
            assert session.looks(state["exchanges"][-1]["id"])["words"]
            sessions.close(f"tab {number}")
            assert len(sessions) == 0
            assert sessions.by_key(session.key) is None
            if number in (SETTLED, TABS):
                worker.call(lambda desk: None)  # what was posted before is done
                give_back()
                memory[number] = megabytes(os.getpid())
        assert worker.call(lambda desk: len(desk._talks)) == 0
    finally:
        worker.close()
    assert memory[TABS] - memory[SETTLED] < ALLOWED, memory
