"""What the README.md of a checkpoint says, as plain text for the page."""

import re
from pathlib import Path

from agevlm_mlx.console import printable

#: Letters of a README.md that are read, and those of a sentence that the page shows.
_READ, _SHOWN = 100_000, 300
#: How a paragraph begins that is no sentence: title, table, list, quotation, code, picture, tag.
_NO_SENTENCE = ("#", "|", "- ", "* ", ">", "```", "!", "<")
_LICENCE = re.compile(r"licen[cs]e|Apache-|\bMIT\b|\bCC[ -]BY", re.IGNORECASE)


def read_card(folder: Path) -> dict[str, str]:
    """ "Training" and "Licence", as far as the README.md of a checkpoint folder says them."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            text = file.read(_READ)
    except OSError:
        return {}
    front, body = "", text
    if match := re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL):
        front, body = match[1], text[match.end() :]
    paragraphs = [
        _plain(part)
        for part in re.split(r"\n\s*\n", body)
        if not part.lstrip().startswith(_NO_SENTENCE)
    ]
    said = {
        "Training": next((p for p in paragraphs if re.search(r"\btrain|\btaught", p)), ""),
        "Licence": _licence(front, paragraphs),
    }
    return {label: _short(value) for label, value in said.items() if value}


def _licence(front: str, paragraphs: list[str]) -> str:
    if match := re.search(r"^license:[ \t]*(\S.*)$", front, re.MULTILINE):
        return _plain(match[1]).strip("'\"[] ")
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?])\s+", p)]
    return next((s for s in sentences if _LICENCE.search(s)), "")


def _plain(markdown: str) -> str:
    """A paragraph of Markdown in one line of text: no links, tags or marks."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"<[^<>]*>|[`*]|(?<!\w)_+|_+(?!\w)", "", text)
    return printable(" ".join(text.split()))


def _short(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return text[:_SHOWN].rsplit(" ", 1)[0].rstrip(",;:. ") + " …"
