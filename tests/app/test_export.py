"""The conversation to keep, as JSON and as a page, without a browser."""

import base64
import hashlib
import json
import re
from html import unescape
from typing import Any

import pytest

from app import export

KEY = "the-secret-of-the-tab"
PICTURES = [
    {"id": "p-0", "name": "</script>.png", "width": 40, "height": 30, "src": "data:image/png,0"},
    {"id": "p-1", "name": "two.png", "width": 10, "height": 20, "src": "data:image/png,1"},
]
WORD = {
    "role": "user",
    "start": 0,
    "end": 3,
    "text": "Dog",
    "names": True,
    "grounding": 0.4,
    "on_image": 0.8,
    "peak": {"picture": 0, "x": 0.5, "y": 0.5, "box": [0.4, 0.4, 0.6, 0.6]},
    "layers": ["data:image/png;base64,AAAA", None],
}


def exchange(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "question": "Dog? <!--<script> \u2028 \ud83d\ude00 \U0001f98a",
        "pictures": ["p-0"],
        "answer": "Yes </SCRIPT>",
        "state": "done",
        "ahead": 0,
        "error": None,
        "notes": ["a note"],
        "model": "tiny",
        "stats": {"tokens": 3},
    } | more


def conversation(*exchanges: dict[str, Any]) -> dict[str, Any]:
    model = {"name": "tiny", "layers": [1], "heads": 2}
    examples = [{"id": "e0", "question": "An example"}]
    return {"key": KEY, "busy": True, "model": model, "examples": examples} | {
        "exchanges": list(exchanges)
    }


LOOKS = {
    7: {
        "exchange": 7,
        "pictures": ["p-0", "p-1"],
        "note": None,
        "threshold": 0.2,
        "words": [WORD],
    }
}


def made(state: dict[str, Any], title: str = "Dogs", **about: str) -> str:
    return export.page(state, LOOKS, PICTURES, title, about)


def data(html: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="conversation">(.*?)</script>', html)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_document_has_words_and_no_pictures():
    told = export.document(conversation(exchange(7)), LOOKS, PICTURES)
    assert told["format"] == "agevlm-conversation"
    assert told["version"] == 1
    assert told["model"]["name"] == "tiny"
    (one,) = told["exchanges"]
    assert one["words"] == [{k: v for k, v in WORD.items() if k != "layers"}]
    assert one["pictures"] == [{"name": "</script>.png", "width": 40, "height": 30}]
    assert [picture["name"] for picture in one["looked_at"]] == ["</script>.png", "two.png"]
    assert one["threshold"] == 0.2
    assert one["stats"] == {"tokens": 3}
    text = json.dumps(told)
    assert "data:image" not in text
    assert KEY not in text


def test_neither_has_the_secret_of_the_tab():
    state = conversation(exchange(7, key=KEY))
    assert KEY not in json.dumps(export.document(state, LOOKS, PICTURES))
    assert KEY not in made(state)


@pytest.mark.parametrize("state", ["waiting", "reading", "answering"])
def test_what_is_under_way_counts_as_stopped(state):
    running = conversation(exchange(7), exchange(8, state=state, answer="Ye"))
    for told in (
        export.document(running, LOOKS, PICTURES),
        data(made(running))["state"],
    ):
        assert [one["state"] for one in told["exchanges"]] == ["done", "stopped"]
    assert data(made(running))["state"]["busy"] is False


def test_an_empty_conversation_can_be_kept():
    assert export.document(conversation(), {}, [])["exchanges"] == []
    assert data(export.page(conversation(), {}, [], "Nothing", {}))["state"]["exchanges"] == []


def test_any_text_comes_back_from_the_page_as_it_was():
    odd = exchange(7, question="</script><script>boom()</script> \u2028\u2029 {title} %s \\ '\"")
    html = made(conversation(odd))
    told = data(html)
    assert told["state"]["exchanges"][0]["question"] == odd["question"]
    assert told["pictures"]["p-0"] == PICTURES[0]
    assert told["looks"]["7"]["words"] == [WORD]
    assert len(re.findall(r"</?script", html, re.IGNORECASE)) == 4
    assert "<!--" not in html
    assert "\u2028" not in html


def test_a_lone_surrogate_can_be_written():
    # JavaScript can send half a character.
    made(conversation(exchange(7, question="\ud83d"))).encode()


def test_title_and_facts_are_text():
    html = made(conversation(exchange(7)), "<b>Dogs</b> & {css}", Model="</dl><script>")
    assert html.count("&lt;b&gt;Dogs&lt;/b&gt; &amp; {css}") == 2
    assert "<b>" not in html
    assert "<dd>&lt;/dl&gt;&lt;script&gt;</dd>" in html


def test_the_policy_allows_this_script_and_this_style_only():
    html = made(conversation(exchange(7)))
    found = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    assert found
    policy = dict(part.strip().split(" ", 1) for part in unescape(found.group(1)).split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "data:"
    for name, tag in (("style-src", "style"), ("script-src", "script")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_nothing_in_the_page_names_another_place():
    html = made(conversation(exchange(7)))
    assert re.findall(r"https?:|//cdn|@import|url\(", html) == []


def test_the_files_of_the_component_can_stand_in_a_page():
    assert "</script" not in export.script().lower()
    assert "<!--" not in export.script()
    assert "</style" not in export.style().lower()
    assert "innerHTML" not in export.script()
    selectors = re.sub(r"/\*.*?\*/", "", export.style(), flags=re.DOTALL)
    for rule in re.findall(r"(?m)^ *([^@{};\n][^{};]*)\{", selectors):
        for one in rule.split(","):
            own = re.search(r"\.(looking|presence)\b", one)
            assert own or re.fullmatch(r"\s*(from|to|\d+%)\s*", one), f"{one}: not of ours"
