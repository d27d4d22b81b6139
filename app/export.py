"""The conversation to keep: a self-contained HTML page that still lights up, and JSON."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

#: What is built upon comes first.
_SCRIPTS = ("page_parts.js", "page_sources.js", "page_exchange.js", "page_stage.js", "page.js")
if TYPE_CHECKING:
    from .session import Session

FORMAT, VERSION = "agevlm-conversation", 1

#: What of an exchange and of a word is kept; anything else (the tab's key, maps) stays behind.
_EXCHANGE = ("id", "question", "pictures", "answer", "state", "error", "notes", "model", "stats")
_WORD = ("role", "start", "end", "text", "names", "grounding", "on_image", "peak")
_STATE = ("model", "exchanges")
_FINISHED = ("done", "stopped", "failed")


def script() -> str:
    """The JavaScript of the page: defines `looking(element, host)`."""
    return "\n".join(_read(name) for name in _SCRIPTS)


def style() -> str:
    """page.css, all of it under `.looking`."""
    return _read("page.css")


def as_json(session: "Session") -> str:
    """The conversation and where its words looked, without pictures."""
    told = document(session.state(), _looks(session), _pictures(session))
    return json.dumps(told, indent=2, ensure_ascii=False)


def as_html(session: "Session") -> str:
    """The conversation as a page of its own, with its pictures and maps."""
    state = session.state()
    first = next((e["question"] for e in state["exchanges"] if e["question"]), "A conversation")
    title = first if len(first) <= 80 else f"{first[:79]}…"
    return page(state, _looks(session), _pictures(session), title, session.facts())


def _looks(session: "Session") -> dict[int, dict[str, Any]]:
    ids = [e["id"] for e in session.state()["exchanges"] if e["state"] in ("done", "stopped")]
    return {number: session.looks(number) for number in ids}


def _pictures(session: "Session") -> list[dict[str, Any]]:
    return session.pictures([i for e in session.state()["exchanges"] for i in e["pictures"]])


def document(
    state: Mapping[str, Any],
    looks: Mapping[int, Mapping[str, Any]],
    pictures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The conversation as JSON values: what was said, and where every word looked.

    looks: by the id of an exchange. pictures: {"id", "name", "width", "height"}; of a picture
    the name and the size are kept, not the picture. "looked_at" are the pictures of an exchange's
    words, in which "picture" of a word's "peak" counts.
    """
    known = {picture["id"]: picture for picture in pictures}
    exchanges = []
    for exchange in _exchanges(state):
        found = looks.get(exchange["id"], {})
        words = [{k: word[k] for k in _WORD if k in word} for word in found.get("words", ())]
        shown = [_facts(known[i]) for i in exchange["pictures"] if i in known]
        seen = [_facts(known[i]) for i in found.get("pictures", ()) if i in known]
        kept = exchange | {"pictures": shown, "words": words, "looked_at": seen}
        exchanges.append(kept | {k: found[k] for k in ("note", "threshold") if k in found})
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": state.get("model"),
        "exchanges": exchanges,
    }


def page(
    state: Mapping[str, Any],
    looks: Mapping[int, Mapping[str, Any]],
    pictures: Sequence[Mapping[str, Any]],
    title: str,
    about: Mapping[str, str],
) -> str:
    """One HTML file that needs no network and may ask for none: what was said, the pictures and
    the map of every word.

    looks: by the id of an exchange, with the maps as data URLs. pictures: {"id", "name", "width",
    "height", "src"}, `src` a data URL. about: facts of the model, label -> text.
    """
    data = {
        "state": {k: state[k] for k in _STATE if k in state}
        | {"busy": False, "examples": [], "exchanges": _exchanges(state)},
        "looks": {str(number): dict(found) for number, found in looks.items()},
        "pictures": {picture["id"]: dict(picture) for picture in pictures},
    }
    css, js = _PAGE_STYLE + style(), f"(() => {{\n{script()}\n{_START}}})();\n"
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    made = datetime.now().astimezone()
    return _PAGE.format(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; "
        f"script-src '{_hash(js)}'; base-uri 'none'; form-action 'none'",
        title=escape(title),
        when=made.isoformat(timespec="minutes"),
        made=made.strftime("%Y-%m-%d %H:%M"),
        facts=f"<details><summary>The model</summary><dl>{facts}</dl></details>" if facts else "",
        css=css,
        js=js,
        data=_in_script(data),
    )


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _exchanges(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The exchanges, one that is still being answered as stopped."""
    kept = []
    for exchange in state.get("exchanges", ()):
        one = {k: exchange[k] for k in _EXCHANGE if k in exchange}
        if one["state"] not in _FINISHED:
            one["state"] = "stopped"
        kept.append(one)
    return kept


def _facts(picture: Mapping[str, Any]) -> dict[str, Any]:
    return {k: picture[k] for k in ("name", "width", "height")}


def _in_script(data: Any) -> str:
    """JSON that ends no script element, whatever is in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 is escaped too
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    """The name by which a Content-Security-Policy allows this very text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


_START = """
const data = JSON.parse(document.getElementById("conversation").textContent);
const view = looking(document.querySelector(".looking"), {
  live: false,
  looks: async ({exchange}) => data.looks[exchange] ?? {pictures: [], words: [], note: null},
  pictures: async (ids) => ids.map((id) => data.pictures[id]).filter(Boolean),
});
view.update(data.state);
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; background: light-dark(#ffffff, #17171c); color: light-dark(#1f2328, #e8e8ee);
  font: 400 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
.sheet { max-width: 76rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
.sheet > header { margin-bottom: 2rem; padding-bottom: 1.25rem;
  border-bottom: 1px solid light-dark(#d8dbe2, #3a3a45); }
.sheet h1 { margin: 0; font-size: 1.5rem; font-weight: 650; line-height: 1.25;
  letter-spacing: -0.01em; overflow-wrap: anywhere; }
.sheet header p, .sheet header details { margin: 0.35rem 0 0; font-size: 0.875rem;
  color: light-dark(#57606a, #b4b4c0); }
.sheet summary { width: fit-content; min-height: 1.5rem; cursor: pointer; }
.sheet dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.15rem 1rem;
  margin: 0.5rem 0 0; }
.sheet dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { .sheet { padding: 1.25rem 1rem 3rem; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<div class="sheet">
<header>
<h1>{title}</h1>
<p>A conversation about pictures, kept <time datetime="{when}">{made}</time>. Point at a word to
see where the model looked for it.</p>
{facts}
</header>
<main><div class="looking alone"></div></main>
</div>
<script type="application/json" id="conversation">{data}</script>
<script>{js}</script>
</body>
</html>
"""
