"""``report.html``: one self-contained page, readable in light and dark, made from report.json."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from io import BytesIO
from typing import Any

from PIL import Image

from .benchmark import flatten
from .charts import Line, line_chart, smooth
from .gallery import Card
from .report import ARMS

TITLES = {"concat": "concat", "guided": "cross + guidance"}

#: Section, then rows: metric, what it is called, which way is better, what no skill gives
#: ("area": the object's share of the picture).
_TABLE: Sequence[tuple[str, Sequence[tuple[str, str, str, str]]]] = (
    (
        "Does it say yes only to what is there? (POPE)",
        (
            ("pope.adversarial.accuracy", "adversarial: accuracy", "higher", "0.500"),
            ("pope.adversarial.shuffled_accuracy", "same, another picture", "control", "0.500"),
            ("pope.adversarial.blind_accuracy", "same, no picture", "control", "0.500"),
            ("pope.adversarial.f1", "adversarial: F1", "higher", "0.667"),
            ("pope.adversarial.yes_ratio", "adversarial: share of yes", "near 0.5", ""),
            ("pope.popular.accuracy", "popular: accuracy", "higher", "0.500"),
            ("pope.popular.shuffled_accuracy", "same, another picture", "control", "0.500"),
            ("pope.popular.blind_accuracy", "same, no picture", "control", "0.500"),
            ("pope.random.accuracy", "random: accuracy", "higher", "0.500"),
            ("pope.random.shuffled_accuracy", "same, another picture", "control", "0.500"),
            ("pope.random.blind_accuracy", "same, no picture", "control", "0.500"),
        ),
    ),
    (
        "Does it look where the object is?",
        (
            ("pointing_game", "pointing game", "higher", "area"),
            ("energy_in_mask", "attention inside the object", "higher", "area"),
            ("uniform_energy", "same, looking everywhere", "control", ""),
        ),
    ),
    (
        "Does it tell a matching caption from another?",
        (
            ("matching_auroc", "random other caption: AUROC", "higher", "0.500"),
            ("matching_auroc_hard", "one noun exchanged: AUROC", "higher", "0.500"),
        ),
    ),
    (
        "Are its captions about what is there?",
        (
            ("caption_f1", "objects named against objects present: F1", "higher", ""),
            ("recall", "objects present that are named", "higher", ""),
            ("chair_i", "objects named that are absent (CHAIR)", "lower", ""),
            ("chair_s", "captions that name one (CHAIR)", "lower", ""),
            ("mentions_per_caption", "objects named per caption", "", ""),
            ("repeated_mentions", "of these, named twice", "lower", ""),
        ),
    ),
)


def render(
    report: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    cards: Sequence[Card],
) -> str:
    """The page. curves: per arm the rows of ``metrics.jsonl``; the numbers are report.json's."""
    page = resources.files("agevlm_mlx") / "assets" / "report.html"
    template = page.read_text(encoding="utf-8")
    sections = {
        "HEADLINE": _headline(report),
        "TABLE": _table(report),
        "CURVES": _curves(curves),
        "CARDS": "".join(_card(card) for card in cards),
        "LIMITS": _limits(report),
        "ABOUT": _about(report),
    }
    for name, html in sections.items():
        template = template.replace(f"<!--{name}-->", html)
    return template


def _number(value: Any, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "&ndash;"
    return f"{value:.{digits}f}"


def _headline(report: Mapping[str, Any]) -> str:
    flat = {arm: flatten(report["arms"][arm]) for arm in ARMS}
    tiles = (
        ("pope.adversarial.accuracy", "right about the trickiest yes/no questions"),
        ("pointing_game", "looked at the object it was asked for"),
        ("caption_f1", "right about the objects it names by itself (F1)"),
    )
    parts = []
    for key, text in tiles:
        numbers = "".join(
            f'<span class="big {arm}">{100 * flat[arm][key]:.0f}&thinsp;%'
            f"<small>{TITLES[arm]}</small></span>"
            for arm in ARMS
        )
        parts.append(f'<div class="tile"><div class="pair">{numbers}</div><p>{text}</p></div>')
    return "".join(parts)


def _table(report: Mapping[str, Any]) -> str:
    flat = {arm: flatten(report["arms"][arm]) for arm in ARMS}
    rows = []
    for section, measures in _TABLE:
        rows.append(f'<tr class="section"><th colspan="5" scope="rowgroup">{section}</th></tr>')
        for key, label, better, no_skill in measures:
            control = ' class="control"' if better == "control" else ""
            note = f" <small>{better}</small>" if better not in ("", "control") else ""
            cells = "".join(_cell(report["arms"][arm], flat[arm], key, arm) for arm in ARMS)
            gap = report["difference"].get(key)
            area = _number(flat[ARMS[0]].get("uniform_energy"))
            chance = area if no_skill == "area" else no_skill
            rows.append(
                f'<tr{control}><th scope="row">{label}{note}</th>{cells}'
                f"<td>{_gap(gap)}</td><td>{chance}</td></tr>"
            )
    seconds = "".join(f"<td>{_number(flat[arm]['train_seconds'], 0)} s</td>" for arm in ARMS)
    rows.append('<tr class="section"><th colspan="5" scope="rowgroup">Cost</th></tr>')
    rows.append(f'<tr><th scope="row">training time</th>{seconds}<td></td><td></td></tr>')
    size = "".join(f"<td>{report['arms'][arm]['model']['parameters']:,}</td>" for arm in ARMS)
    rows.append(f'<tr><th scope="row">parameters</th>{size}<td></td><td></td></tr>')
    heads = "".join(f'<th scope="col" class="{arm}">{TITLES[arm]}</th>' for arm in ARMS)
    return (
        f'<table><thead><tr><th scope="col">measure</th>{heads}'
        '<th scope="col">difference</th><th scope="col">no skill</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(arm: Mapping[str, Any], flat: Mapping[str, Any], key: str, name: str) -> str:
    interval = arm["intervals"].get(key)
    note = ""
    if interval is not None:
        note = f"<small>{_number(interval[0], 2)}&ndash;{_number(interval[1], 2)}</small>"
    return f'<td class="{name}">{_number(flat.get(key))}{note}</td>'


def _gap(gap: Sequence[float] | None) -> str:
    if gap is None:
        return ""
    value, low, high = gap
    return f"{value:+.3f}<small>{low:+.2f} to {high:+.2f}</small>"


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    panels: Sequence[tuple[str, str, dict[str, Any]]] = (
        ("Language loss (training)", "lm", {"log": True}),
        ("Attention loss (training)", "attention", {}),
        ("Language loss (validation)", "val_lm", {"log": True}),
        ("Pointing game (validation)", "val_pointing", {"floor": 0.0, "ceiling": 1.0}),
    )
    last = max((row["step"] for rows in curves.values() for row in rows), default=1)
    marks = _stages(curves.get(ARMS[-1], ()))
    charts = []
    for title, key, axis in panels:
        lines = []
        for arm in ARMS:
            points = _points(curves.get(arm, ()), key)
            window = 1 if key.startswith("val_") else max(1, len(points) // 40)
            lines.append(Line(TITLES[arm], arm, smooth(points, window)))
        charts.append(line_chart(title, lines, marks=marks, span=(1.0, float(last)), **axis))
    return "".join(f"<figure>{chart}</figure>" for chart in charts)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (float(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float)
    ]


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Where each stage begins, from the rows that name theirs."""
    starts: dict[str, float] = {}
    for row in rows:
        if isinstance(row.get("stage"), str):
            starts.setdefault(row["stage"], float(row["step"]))
    return [(x, name) for name, x in starts.items()] if len(starts) > 1 else []


def _card(card: Card) -> str:
    tiles = [_figure(card.picture, "the picture", "")]
    for arm in ARMS:
        if arm not in card.overlays:
            continue
        hit = "peak on it" if card.hit[arm] else "peak beside it"
        note = f"{100 * card.energy[arm]:.0f} % of its attention on the {card.noun}, {hit}"
        tiles.append(_figure(card.overlays[arm], TITLES[arm], note, arm))
    rows = []
    for asked in card.questions:
        answers = "".join(
            f'<td class="{arm}">{_answer(asked.answers[arm], asked.label)}</td>'
            for arm in ARMS
            if arm in asked.answers
        )
        rows.append(
            f'<tr><th scope="row">{escape(asked.question)}</th>'
            f"<td>{'yes' if asked.label else 'no'}</td>{answers}</tr>"
        )
    captions = [card.caption, *(card.captions[arm] for arm in ARMS if arm in card.captions)]
    cells = "".join(f"<td>{escape(caption) or '<i>nothing</i>'}</td>" for caption in captions)
    rows.append(f'<tr><th scope="row">Describe the image.</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{TITLES[arm]}</th>' for arm in ARMS)
    head = f'<th scope="col">asked</th><th scope="col">true</th>{heads}'
    return (
        f'<article><div class="strip">{"".join(tiles)}</div>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></article>"
    )


def _answer(said: bool, label: bool) -> str:
    verdict = "right" if said == label else "wrong"
    return f'{"yes" if said else "no"} <span class="{verdict}">{verdict}</span>'


def _figure(image: Image.Image, title: str, note: str, style: str = "") -> str:
    alt = escape(f"{title}: {note}" if note else title)
    return (
        f'<figure class="{style}"><img src="{data_url(image)}" alt="{alt}" '
        f'width="{image.width}" height="{image.height}">'
        f"<figcaption><b>{escape(title)}</b> {escape(note)}</figcaption></figure>"
    )


def data_url(image: Image.Image) -> str:
    """The image inside a ``data:`` address, as a JPEG: a quarter of a PNG's size here."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=92, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _limits(report: Mapping[str, Any]) -> str:
    concat, guided = (report["arms"][arm] for arm in ARMS)
    more = guided["model"]["parameters"] / concat["model"]["parameters"]
    return (
        f"<li>The guided model has {more:.2f} times the parameters of concat "
        f"({guided['model']['parameters']:,} and {concat['model']['parameters']:,}) and learns "
        "from masks that concat never sees.</li>"
    )


def _about(report: Mapping[str, Any]) -> str:
    machine, versions = report.get("machine", {}), report.get("versions", {})
    facts = [
        ("machine", ", ".join(f"{k} {v}" for k, v in machine.items())),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("test images", str(report["arms"][ARMS[0]]["counts"].get("images", ""))),
    ]
    facts += [(f"model {TITLES[arm]}", report["arms"][arm]["model"]["fingerprint"]) for arm in ARMS]
    rows = "".join(
        f"<tr><th scope='row'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts
    )
    steps = "".join(
        f"<tr><th scope='row'>{escape(step['name'])}</th><td>{step['seconds']:.0f} s"
        f"{' (kept from an earlier run)' if step.get('reused') else ''}</td></tr>"
        for step in report.get("steps", ())
    )
    commands = "\n".join(escape(line) for line in report.get("commands", ()))
    return (
        f"<table><tbody>{rows}</tbody></table><h3>Time of each step</h3>"
        f"<table><tbody>{steps}</tbody></table><h3>Commands</h3><pre>{commands}</pre>"
    )
