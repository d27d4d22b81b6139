"""Pieces of the report's page: models with their colours, numbers, tables, figures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from . import figures

#: What is wider than the page can be scrolled, by the keyboard too.
_SCROLL = '<div class="scroll" tabindex="0" role="group" aria-label="can be scrolled">'


@dataclass(frozen=True)
class Model:
    """One model of the page: its number (and colour), its name, and what was measured."""

    n: int
    name: str
    data: Mapping[str, Any]

    def separated(self, score: str, kind: str, metric: str) -> Mapping[str, Any] | None:
        """A number of the matching part, None if there is none."""
        part = self.data.get("matching")
        found = part["scores"][score][kind] if part else None
        return _known(found[metric]) if found else None

    def looked(self, measure: str) -> Mapping[str, Any] | None:
        """A number of the attention part, None if there is none."""
        part = self.data.get("attention")
        return _known(part["measures"].get(measure)) if part else None

    def effect(self, name: str, sign: int) -> Mapping[str, Any] | None:
        """What blanking the thing itself does, beyond blanking elsewhere."""
        part = self.data.get("causal")
        if not part or not part["objects"]:
            return None
        found = _known(part["present"][name]["mean colour"]["effect"])
        return _scaled(found, sign) if found else None


def _known(number: Any) -> Mapping[str, Any] | None:
    return number if number and number["value"] is not None else None


def _scaled(number: Mapping[str, Any], by: float) -> dict[str, Any]:
    pair = number["interval"]
    pair = sorted(by * v for v in pair) if pair else None
    return {**number, "value": by * number["value"], "interval": pair}


def chip(model: Model) -> str:
    """Its name in its colour."""
    return f'<b class="m{model.n}">{escape(model.name)}</b>'


def percent(number: Mapping[str, Any], sign: bool = False) -> str:
    """A share as a number of hundred."""
    value = number["value"]
    if value is None:
        return "?"
    rounded = round(100 * value)
    return f"{rounded:+d}" if sign and rounded else str(rounded)


def span(number: Mapping[str, Any], sign: bool = False) -> str:
    """The interval of a share, " (97 to 100)"."""
    pair = number.get("interval")
    if not pair:
        return ""
    low, high = (percent({"value": v}, sign) for v in pair)
    return f" ({low} to {high})"


def cell(number: Any, digits: int = 2) -> str:
    """A table's cell: the value and its interval."""
    if not number or number.get("value") is None:
        return "<td>&ndash;</td>"
    pair, note = number.get("interval"), ""
    if pair:
        note = f" <small>{pair[0]:.{digits}f} to {pair[1]:.{digits}f}</small>"
    text = f"{number['value']:.{digits}f}{note}"
    return f"<td>{re.sub(r'-(?=0[.]0+(?![0-9]))', '', text).replace('-', '&minus;')}</td>"


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table with these column heads, of rows in HTML."""
    heads = "".join(f'<th scope="col">{text}</th>' for text in head)
    return (
        f"{_SCROLL}<table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def number(found: Any) -> figures.Number:
    """A number of the result as figures take it."""
    if not found or found.get("value") is None:
        return (float("nan"), None, None)
    low, high = found.get("interval") or (None, None)
    return (found["value"], low, high)


def plot(svg: str) -> str:
    """A figure in the page."""
    return f"{_SCROLL}{svg}</div>"


def folded(title: str, html: str) -> str:
    """A part that is read by those who want it."""
    return f"<details><summary>{title}</summary>{html}</details>"
