"""The tab "Is it in the picture?" as HTML: a row for each word, and how well the sentence fits.

No Gradio, no MLX. Every text in it is escaped.
"""

import base64
import io
import math
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from agevlm_mlx.evaluation.grounding import NOT_GROUNDED, NOT_GROUNDED_MEANS
from agevlm_mlx.evaluation.overlay import overlay

from .overlay import peak

if TYPE_CHECKING:  # its module needs MLX
    from agevlm_mlx.evaluation.presence import Examined, Match, Presence

#: Pixels of a thumbnail's longer side; shown smaller, so that it is sharp on any screen.
_TILE = 192
_COLUMNS = ("Word", "P(yes)", "without the picture", "Grounding", "Where it looked")
_MEANING = (
    (
        "P(yes)",
        "The model is asked “Is there a …?”. Of its answers Yes and No, by their first tokens and "
        "nothing else, the share of Yes. The mark in the bar is the share without the picture.",
    ),
    (
        "without the picture",
        "The same question to the same model, shown nothing. Where both numbers are alike, the "
        "answer is habit, not sight.",
    ),
    (
        "Grounding",
        "The share of the word's attention that is on the picture, times how concentrated it is "
        f"there (0 to 1). {NOT_GROUNDED_MEANS}",
    ),
    (
        "Where it looked",
        "Bright where the word of the question looked; the ring is the strongest place. It shows "
        "where the model looked, not that its answer is right.",
    ),
)
_PROVES = (
    "A gain says that the model reads this sentence otherwise with this picture in front of it, "
    "not that every word is true: a sentence with a wrong word can gain too. Change the word and "
    "compare. The other pictures are painted scenes that show as little as possible of what the "
    "sentence names; beside a photograph they are an easy comparison."
)


def style() -> str:
    """The rules for everything under ``.presence``."""
    return (resources.files(__package__ or "app") / "presence.css").read_text("utf-8")


def table(examined: "Examined", picture: Image.Image) -> str:
    """What is known so far, as HTML. picture: upright RGB, the one that was examined."""
    wanted, rows, match = examined.wanted, examined.rows, examined.match
    parts = []
    if match is None:
        parts.append(f"<p class='progress'>{len(rows)} of {len(wanted.words)} words asked …</p>")
    if rows:
        parts.append(_words(examined, picture))
    if match is not None:
        parts.append(_fit(match))
        meaning = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in _MEANING)
        parts.append(
            f"<details><summary>What the numbers mean</summary><dl>{meaning}</dl></details>"
        )
    return f"<div class='presence'>{''.join(parts)}</div>"


def _text(text: str) -> str:
    """Escaped, and no line ends between a number and its percent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def _words(examined: "Examined", picture: Image.Image) -> str:
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in _COLUMNS)
    body = "".join(_row(row, picture) for row in examined.rows)
    left_out = examined.wanted.left_out
    more = ""
    if left_out:
        more = (
            f"<p>{left_out} more word{'s' * (left_out > 1)} left out: "
            f"{len(examined.wanted.words)} at a time.</p>"
        )
    return (
        "<div class='wide' role='region' tabindex='0' aria-label='Words'><table class='words'>"
        "<caption>What the model says of each word</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def _row(row: "Presence", picture: Image.Image) -> str:
    low = row.grounding < NOT_GROUNDED
    weak = "<span class='weak'>not grounded</span>" if low else ""
    return (
        f"<tr><th scope='row'>{escape(row.word)}</th>"
        f"<td>{_bar(row.p_yes, row.blind)}<span class='number'>{_percent(row.p_yes)}</span></td>"
        f"<td class='number'>{_percent(row.blind)}</td>"
        f"<td><span class='number'>{_number(_cut(row.grounding))}</span>{weak}</td>"
        f"<td>{_thumbnail(row, picture)}</td></tr>"
    )


def _bar(value: float, control: float) -> str:
    if not (math.isfinite(value) and math.isfinite(control)):
        return ""
    return (
        f"<span class='bar' aria-hidden='true' style='--p: {value:.4f}; --blind: {control:.4f}'>"
        "</span>"
    )


def _percent(value: float) -> str:
    """A probability as words: never 0 % or 100 %, which it is not."""
    if not math.isfinite(value):
        return "no number"
    if value < 0.005:
        return "&lt; 1 %"
    return "&gt; 99 %" if value > 0.995 else f"{100 * value:.0f} %"


def _cut(value: float) -> float:
    """To two decimals downwards, so that what is below the threshold also reads so."""
    return math.floor(100 * value) / 100 if math.isfinite(value) else value


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212") if math.isfinite(value) else "no number"


def _thumbnail(row: "Presence", picture: Image.Image) -> str:
    if not np.isfinite(row.look).all():
        return "no map"
    # What a crop or padding did to the picture is undone by both, in the same way.
    at = peak(row.look, row.geometry)
    down = ("upper", "middle", "lower")[min(int(3 * at["y"]), 2)]
    across = ("left", "centre", "right")[min(int(3 * at["x"]), 2)]
    alt = (
        f"Where {row.word} looked: most at the {down} {across}, {100 * at['x']:.0f} % from the "
        f"left and {100 * at['y']:.0f} % from the top."
    )
    file = io.BytesIO()
    shown = overlay(picture, row.look, row.geometry, tile=_TILE)
    shown.save(file, "JPEG", quality=88)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    width, height = shown.size
    return f"<img src='{source}' width='{width}' height='{height}' alt='{escape(alt)}'>"


def _fit(match: "Match") -> str:
    numbers = (
        ("with this picture", match.log_p),
        ("without a picture", match.blind),
        (f"with {len(match.shuffled)} other pictures, mean", match.log_p - match.over_shuffled),
    )
    rows = "".join(
        f"<tr><th scope='row'>{name}</th><td class='number'>{_number(value)}</td></tr>"
        for name, value in numbers
    )
    return (
        "<h2>How well the sentence fits</h2>"
        f"<blockquote>{escape(match.sentence)}</blockquote>"
        f"<p class='verdict'>{verdict(match)}</p>"
        f"<p>{escape(_PROVES)}</p>"
        "<table class='match'><caption>Mean log-probability of its tokens, in nats</caption>"
        f"<tbody>{rows}</tbody></table>"
    )


def verdict(match: "Match") -> str:
    """What the match says, in a sentence."""
    if not math.isfinite(match.over_blind):
        return "The model gives no number for this sentence."
    gain = f"{abs(match.over_blind):.2f}"
    if gain == "0.00":
        first = "This picture makes the sentence neither likelier nor less likely than no picture"
    else:
        which = "likelier" if match.over_blind > 0 else "less likely"
        first = (
            f"This picture makes the sentence {gain} nats per token {which} than no picture does"
        )
    beaten, others = match.beaten, len(match.shuffled)
    return f"{first}, and it fits better than {beaten} of {others} other pictures."
