"""Every event of the page, through Gradio's own server, with sessions that have no model."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")

from agevlm_mlx.errors import UserError
from app import catalogue, tabs, ui
from tests.app.fake_sessions import FakeSessions
from tests.app.tab import Tab

PNG = b"\x89PNG: bytes that nobody looks into"


class Served:
    """The page with fake sessions, and a client of it."""

    def __init__(self, sessions: FakeSessions, client: httpx.Client) -> None:
        self.sessions, self.client = sessions, client

    def session(self, tab: Tab, side: str = "") -> Any:
        return self.sessions.tabs[tab.name + side]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setattr(catalogue, "choices", lambda extra: [("small one", "/secret/a"), ("b", "/b")])
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "no_proxy", "NO_PROXY"):
        patch.setenv(name, "localhost")  # so that it is as before afterwards
    sessions = FakeSessions()
    with (
        ui.running(sessions, port=port) as addresses,
        httpx.Client(base_url=addresses.local, timeout=30, trust_env=False) as client,
    ):
        yield Served(sessions, client)
    patch.undo()
    with pytest.raises(httpx.ConnectError):
        httpx.get(addresses.local, trust_env=False)


@pytest.fixture
def tab(served: Served) -> Iterator[Tab]:
    with Tab(served.client).open() as tab:
        yield tab


def asked(tab: Tab, text: str, *files: Any) -> list[Any]:
    tab["message"] = {"text": text, "files": list(files)}
    return tab.happen("submit", "message")


def last(tab: Tab, component: str = "page") -> dict[str, Any]:
    return tab[component]["exchanges"][-1]


def until(true: Any) -> None:
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in five seconds")


# --- opening and closing -------------------------------------------------------------------------


def test_a_tab_is_a_session(served, tab):
    assert tab["page"]["key"] == served.session(tab).key
    assert "the shipped model" in tab["header"]
    assert "1 million" in tab["facts"]
    assert tab["model"] == "small one"
    assert tab["compare-left-model"] == "small one"


def test_the_page_holds_no_path_of_the_server_and_no_api(served, tab):
    told = str(tab.page)
    assert "/secret" not in told
    assert "site-packages" not in told
    assert tab.page["enable_queue"]
    assert tab.page["analytics_enabled"] is False
    assert tab.page["footer_links"] == []
    assert {handler["api_visibility"] for handler in tab.page["dependencies"]} <= {
        "private",
        "undocumented",
    }


def test_closing_a_tab_closes_its_sessions_and_deletes_its_uploads(served):
    with Tab(served.client).open() as tab:
        sent, pending = tab.upload("sent.png", PNG), tab.upload("pending.png", PNG + b"other")
        asked(tab, "Is there a dog?", sent)
        tab["compare-message"] = {"text": "Is there a dog?", "files": [sent]}
        tab.happen("submit", "compare-message")
        tab["message"] = {"text": "", "files": [pending]}
        tab.happen("change", "message")
        assert {tab.name, f"{tab.name}/left", f"{tab.name}/right"} <= set(served.sessions.tabs)
    until(lambda: not any(name.startswith(tab.name) for name in served.sessions.tabs))
    for upload in (sent, pending):
        until(lambda upload=upload: not Path(upload["path"]).exists())


def test_what_another_tab_has_stays(served, tab):
    with Tab(served.client).open() as other:
        mine, same = other.upload("mine.png", PNG + b"mine"), other.upload("kept.png", PNG + b"!")
        asked(other, "Is there a dog?", mine, same)
        asked(tab, "Is there a dog?", same)
    until(lambda: not Path(mine["path"]).exists())
    assert Path(same["path"]).exists()


# --- the chat ------------------------------------------------------------------------------------


def test_a_question_with_pictures(served, tab):
    taken = tab.upload("camera.png", PNG + b"camera")
    tab["camera-picture"] = taken
    told = asked(tab, "Is there a dog?", tab.upload("a b.png", PNG))
    assert last(tab)["answer"] == "A big red dog."
    assert last(tab)["state"] == "done"
    assert tab["message"] == {"text": "", "files": []}
    assert tab["camera-picture"] is None
    ((text, files),) = served.session(tab).asked
    assert text == "Is there a dog?"
    assert files == [("a b.png", PNG), ("camera.png", PNG + b"camera")]
    assert sum(message["msg"] == "process_generating" for message in told) > 3, "it streams"


def test_a_refused_question_stays_in_the_box(served, tab):
    photo = tab.upload("a.png", PNG)
    asked(tab, "", photo)
    assert last(tab)["error"] == "The question is empty."
    assert tab["message"]["files"] == [photo]


def test_an_upload_that_is_gone_is_said(served, tab):
    photo = tab.upload("gone.png", PNG + b"gone")
    Path(photo["path"]).unlink()
    told = asked(tab, "Is there a dog?", photo)
    assert not served.session(tab).asked
    assert tab["message"]["text"] == "Is there a dog?"
    assert "Traceback" not in str(told)


def test_only_uploads_are_read(served, tab):
    other = {"path": __file__, "orig_name": "x", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AssertionError):
        asked(tab, "Is there a dog?", other)
    assert not served.session(tab).asked


def test_settings_reach_the_session(served, tab):
    ids = component_ids(tab)
    values = {"Temperature": 0.5, "Seed": "7", "Stop words": "end\nfin", "Top-k": 4}
    values |= {"Repetition penalty": 1.5, "System prompt": " be brief ", "Longest": 9}
    for label, value in values.items():
        tab.values[ids[label]] = value
    asked(tab, "Is there a dog?")
    sampling = served.session(tab).sampling
    assert (sampling.temp, sampling.seed, sampling.stop) == (0.5, 7, ("end", "fin"))
    assert (sampling.top_k, sampling.repetition_penalty, sampling.max_tokens) == (4, 1.5, 9)
    assert served.session(tab).system == "be brief"


def component_ids(tab: Tab) -> dict[str, int]:
    """Ids of the settings by the beginning of their labels."""
    labels = ("Temperature", "Seed", "Stop words", "Top-k", "Repetition", "System", "Longest")
    found = {}
    for part in tab.page["components"]:
        label = part["props"].get("label") or ""
        found |= {name: part["id"] for name in labels if label.startswith(name)}
    return found | {"Repetition penalty": found["Repetition"], "System prompt": found["System"]}


def test_a_wrong_setting_is_said_and_the_message_stays(served, tab):
    tab.values[component_ids(tab)["Seed"]] = "seven"
    told = asked(tab, "Is there a dog?")
    assert not served.session(tab).asked
    assert tab["message"]["text"] == "Is there a dog?"
    (log,) = (message for message in told if message["msg"] == "log")
    assert log["level"] == "warning"
    assert "whole number" in log["log"]


def test_example_edit_and_retry(served, tab):
    tab.happen("example_select", "page", {"id": "e0"})
    assert last(tab)["question"] == "example e0"
    tab.happen("edit", "page", {"exchange": last(tab)["id"], "text": "And now?"})
    assert [exchange["question"] for exchange in tab["page"]["exchanges"]] == ["And now?"]
    tab.happen("retry", "page", {"exchange": last(tab)["id"]})
    assert [text for text, _ in served.session(tab).asked] == ["example e0", "And now?", "And now?"]


def test_stop_ends_the_answer(served, tab):
    session = served.session(tab)
    session._pause = 30
    asking = threading.Thread(target=asked, args=(tab, "Is there a dog?"))
    asking.start()
    until(lambda: session.busy)
    tab.happen("click", "stop")
    asking.join(10)
    assert last(tab)["state"] == "stopped"


def test_while_another_answer_is_made_the_message_stays(served, tab):
    served.session(tab).busy = True
    asked(tab, "Me too?")
    assert tab["message"]["text"] == "Me too?"
    assert not served.session(tab).asked


def test_a_new_conversation(served, tab):
    asked(tab, "Is there a dog?")
    tab["message"] = {"text": "unsent", "files": []}
    tab.happen("click", "new")
    assert tab["page"]["exchanges"] == []
    assert tab["message"]["text"] == ""


# --- models --------------------------------------------------------------------------------------


def test_loading_a_model(served, tab):
    tab["model"], tab["bits"] = "b", "4 bits"
    told = tab.happen("click", "load")
    assert "progress" in str(told)
    assert served.session(tab).choice == catalogue.Choice("/b", 4)
    assert "/b" in tab["header"], "the fake's name of it"
    assert tab["loading"] == ""


def test_a_model_that_is_missing(served, tab):
    tab["model"] = "missing"
    tab.happen("click", "load")
    assert "expected a checkpoint folder" in tab["loading"]
    assert served.session(tab).choice == catalogue.Choice()


# --- the other tabs ------------------------------------------------------------------------------


def test_presence(served, tab):
    tab["presence-text"], tab["presence-image"] = "dog", tab.upload("a.png", PNG)
    tab.happen("click", "presence-ask")
    assert "<td>dog</td><td>a.png</td>" in tab["presence-out"]
    tab["presence-text"], tab["presence-image"] = "dog", None
    tab.happen("click", "presence-ask")
    assert "<td>dog</td><td>None</td>" in tab["presence-out"]
    tab["presence-text"] = ""
    tab.happen("click", "presence-ask")
    assert "expected words, got nothing" in tab["presence-out"]


def test_compare(served, tab):
    tab["compare-message"] = {"text": "Is there a dog?", "files": [tab.upload("a.png", PNG)]}
    tab["compare-right-bits"] = "4 bits"
    tab.happen("submit", "compare-message")
    for side in ("left", "right"):
        assert last(tab, f"compare-{side}")["answer"] == "A big red dog."
    assert served.session(tab, "/right").choice.bits == 4
    assert served.session(tab, "/left").choice.bits is None
    assert tab["compare-left"]["key"] != tab["compare-right"]["key"]
    assert "210 tokens/s" in tab["compare-status"]
    assert tab["compare-message"] == {"text": "", "files": []}
    tab.happen("click", "compare-new")
    assert tab["compare-left"]["exchanges"] == tab["compare-right"]["exchanges"] == []


def test_the_header_says_where_what_you_show_goes():
    alone, shared = (tabs.header_html("a <model>", shared) for shared in (False, True))
    assert "Everything stays on this computer" in alone
    assert "a &lt;model&gt;" in alone
    assert "What you show goes to the computer that shares this page" in shared
    assert "{" not in alone + shared


def test_a_new_comparison_while_the_first_answers(served, tab):
    tab["compare-message"] = {"text": "Is there a dog?", "files": []}

    def begin_anew() -> None:
        until(lambda: getattr(served.sessions.tabs.get(tab.name + "/left"), "busy", False))
        # What the button does, from another line of the same tab.
        for side in ("/left", "/right"):
            served.session(tab, side).reset()

    other = threading.Thread(target=begin_anew)
    other.start()
    tab.happen("submit", "compare-message")  # asserts that it succeeded
    other.join()
    assert tab["compare-left"]["exchanges"] == tab["compare-right"]["exchanges"] == []
    assert tab["compare-message"] == {"text": "", "files": []}


def test_compare_with_a_model_that_is_missing(served, tab):
    tab["compare-right-model"] = "missing"
    tab["compare-message"] = {"text": "Is there a dog?", "files": []}
    tab.happen("submit", "compare-message")
    assert last(tab, "compare-left")["state"] == "done"
    assert "Right model: " in tab["compare-status"]


@pytest.mark.parametrize("page", ["page", "compare-right"])
def test_the_words_of_an_answer_are_checked(tab, page):
    message = "message" if page == "page" else "compare-message"
    tab[message] = {"text": "Is there a dog?", "files": []}
    tab.happen("submit", message)
    number = last(tab, page)["id"]
    tab.happen("check", page, {"exchange": number})
    assert tab["presence-text"] == "A big red dog."
    assert f"<td>A big red dog.</td><td>{number}</td>" in tab["presence-out"]


def test_edit_and_retry_on_one_side(tab):
    tab["compare-message"] = {"text": "Is there a dog?", "files": []}
    tab.happen("submit", "compare-message")
    number = last(tab, "compare-left")["id"]
    tab.happen("edit", "compare-left", {"exchange": number, "text": "And now?"})
    tab.happen("retry", "compare-right", {"exchange": number})
    assert last(tab, "compare-left")["question"] == "And now?"
    assert last(tab, "compare-right")["question"] == "Is there a dog?"
    assert last(tab, "compare-right")["state"] == "done"


# --- what the script asks ------------------------------------------------------------------------


def test_the_script_gets_looks_and_files(tab):
    key = tab["page"]["key"]
    found = tab.serve("page", "looks", {"key": key, "exchange": 1, "layer": None, "head": 0})
    assert found["exchange"] == 1
    assert tab.serve("page", "pictures", {"key": key, "ids": ["e0"]}) == []
    for kind in ("json", "html"):
        file = tab.serve("page", "download", {"key": key, "format": kind})
        assert file["name"].endswith(kind)
        assert file["text"]


@pytest.mark.parametrize("query", [None, [], {}, {"key": 5}, {"key": "guessed"}])
@pytest.mark.parametrize("function", ["looks", "pictures", "download"])
def test_without_the_key_there_is_a_sentence(tab, function, query):
    assert re.fullmatch(r"[A-Z].* reload .*\.", tab.serve("page", function, query)["error"])


def test_what_goes_wrong_is_a_sentence_without_a_path(tab, capsys):
    key = tab["page"]["key"]
    assert tab.serve("page", "looks", {"key": key, "exchange": 13}) == {
        "error": "The model failed."
    }
    assert "/a/path" not in str(tab.serve("page", "looks", {"key": key, "exchange": 14}))
    assert "/a/path" in capsys.readouterr().err
    assert "words" in tab.serve("page", "looks", {"key": key, "exchange": ["x"], "layer": "y"})


def test_another_tab_cannot_be_asked_without_its_key(served, tab):
    with Tab(served.client).open() as other:
        stolen = {"key": "", "exchange": 1}
        assert "error" in other.serve("page", "looks", stolen)
        assert other["page"]["key"] != tab["page"]["key"]


# --- the server ----------------------------------------------------------------------------------


def test_a_taken_port_is_one_line(served):
    port = served.client.base_url.port
    with (
        pytest.raises(UserError, match=f"^--port: {port} cannot be opened"),
        ui.running(FakeSessions(), port=port),
    ):
        pass


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_names_and_pages_are_refused(served, headers, status):
    assert served.client.get("/config", headers=headers).status_code == status
    reply = served.client.post("/gradio_api/upload", files={"files": b"x"}, headers=headers)
    assert (reply.status_code == 403) == (status == 403)


def test_the_page_may_load_nothing_from_elsewhere(served):
    policy = served.client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy


@pytest.mark.parametrize("path", ["file=http://127.0.0.1:1/x", "proxy=http://a.hf.space/", "info"])
def test_parts_of_gradio_that_are_closed(served, path):
    assert served.client.get(f"/gradio_api/{path}").status_code == 404
