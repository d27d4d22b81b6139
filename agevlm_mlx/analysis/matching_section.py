"""The report's section about matching and mismatching captions."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from . import figures
from .matching import STATES_OF
from .page import Model, cell, chip, folded, number, plot, table

_SHOWN = {"log_p": "log p(caption | image)", "pmi": "PMI", "yes": "log P(yes) / P(no)"}
_METRICS = (
    ("auroc", "AUROC", "0.5"),
    ("win_rate", "wins in pairs", "0.5"),
    ("d_prime", "d&prime;", "0"),
    ("overlap", "overlap", ""),
    ("recall_at_1", "first of all", ""),
    ("sanity", "mismatched against mismatched", "0.5"),
)


def section(models: Sequence[Model]) -> str:
    """The section, "" when no model has this part."""
    models = [model for model in models if model.data.get("matching")]
    if not models:
        return ""
    parts = {model.n: model.data["matching"] for model in models}
    first = parts[models[0].n]
    titles = [(model.name, model.n) for model in models]
    kinds = [pair for pair in _PAIRS if all(p["scores"]["log_p"][pair[0]] for p in parts.values())]
    rows = [
        (title, [part["scores"][name]["distribution"] for part in parts.values()])
        for name, title in _SHOWN.items()
    ]
    return (
        "<h2>Does it tell a matching caption from another?</h2>"
        f"<p>Each picture meets its own caption, those of {first['others']} other pictures, and "
        f"its own with one noun exchanged for a related one that is not there ({first['hard']} of "
        f"{first['images']} pictures have one). Cosines are of at most {STATES_OF} other captions. "
        "The less two areas overlap, the better the model tells the pairs apart.</p>"
        + plot(figures.distributions("distributions", titles, rows))
        + _aurocs(models, kinds)
        + folded("All numbers", _separations(models, kinds))
        + "<p><small><b>log p</b>: how likely the caption is as the answer to "
        f"“{escape(first['prompt'])}”, mean per token. <b>PMI</b>: less what it is without any "
        "image, so that what is likely in itself counts for nothing. <b>yes</b>: asked "
        f"“{escape(first['question'])}”. <b>AUROC</b>: how often a matching pair scores above a "
        "mismatching one, over all pairs; <b>wins in pairs</b>: over those of one picture. "
        "<b>d&prime;</b>: distance of the means in standard deviations. <b>Overlap</b>: shared "
        "area of the two distributions (near 1 without skill, less with few pictures). "
        "<b>First of all</b>: how often the own caption scores highest. <b>Mismatched against "
        "mismatched</b>: one half of them against the other, a test of the test. Rows in grey are "
        "controls without any image: what they have above no skill, "
        "the words alone give away.</small></p>" + _by_layer(models)
    )


_ROWS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "log_p": ("log p", lambda part: part["scores"]["log_p"]),
    "pmi": ("PMI", lambda part: part["scores"]["pmi"]),
    "yes": ("yes", lambda part: part["scores"]["yes"]),
    "yes_pmi": ("yes, less that without image", lambda part: part["scores"]["yes_pmi"]),
    "raw": ("cosine after the last layer, raw", lambda part: _last(part, "raw")),
    "centred": ("cosine after the last layer, centred", lambda part: _last(part, "centred")),
    "log_p_blind": ("log p, no image", lambda part: part["scores"]["log_p_blind"]),
    "yes_blind": ("yes, no image", lambda part: part["scores"]["yes_blind"]),
}
_PAIRS = (
    ("random", "against other pictures' captions"),
    ("hard", "against its own with one noun exchanged"),
)


def _last(part: Mapping[str, Any], way: str) -> Any:
    return part["layers"][-1][way] if part["layers"] else None


def _cell_of(found: Any, kind: str, metric: str) -> str:
    if not found or not found[kind] or metric != "recall_at_1":
        return cell(found[kind][metric] if found and found[kind] else None)
    # Of how many captions it is the first, and so what guessing gives, differs from row to row.
    chance = found[kind][metric]["no_skill"]
    said = "" if chance is None else f" <small>chance {chance:.2f}</small>"
    return cell(found[kind][metric]).replace("</td>", f"{said}</td>")


def _style(name: str) -> str:
    """Controls are quiet."""
    return ' class="quiet"' if name.endswith("_blind") else ""


def _aurocs(models: Sequence[Model], kinds: Sequence[tuple[str, str]]) -> str:
    """The first table: AUROC of every score, a column for each model and kind of pair."""
    rows = []
    for name, (title, of) in _ROWS.items():
        cells = "".join(
            _cell_of(of(model.data["matching"]), kind, "auroc")
            for kind, _ in kinds
            for model in models
        )
        rows.append(f'<tr{_style(name)}><th scope="row">{title}</th>{cells}</tr>')
    half = "<td>0.5</td>" * len(kinds) * len(models)
    rows.append(f'<tr class="quiet"><th scope="row">no skill</th>{half}</tr>')
    head = ["AUROC"] + [f"{chip(model)}<br>{title}" for _, title in kinds for model in models]
    return table(head, rows)


def _separations(models: Sequence[Model], kinds: Sequence[tuple[str, str]]) -> str:
    """Every number of every score."""
    head = ["score", "model", *(name for _, name, _ in _METRICS)]
    rows = []
    for kind, title in kinds:
        rows.append(f'<tr class="section"><th colspan="{len(head)}">{title}</th></tr>')
        for name, (label, of) in _ROWS.items():
            for model in models:
                found = of(model.data["matching"])
                cells = "".join(_cell_of(found, kind, metric) for metric, *_ in _METRICS)
                rows.append(
                    f'<tr{_style(name)}><th scope="row">{label}</th><td>{chip(model)}</td>'
                    f"{cells}</tr>"
                )
        cells = "".join(f"<td>{text}</td>" for *_, text in _METRICS)
        rows.append(f'<tr class="quiet"><th scope="row">no skill</th><td></td>{cells}</tr>')
    return table(head, rows)


def _by_layer(models: Sequence[Model]) -> str:
    models = [model for model in models if model.data["matching"]["layers"]]
    if not models:
        return ""
    layers = [model.data["matching"]["layers"] for model in models]
    hard = all(rows[0]["raw"]["hard"] for rows in layers)
    panels = [
        (f"{title}, {way}", [[number(row[way][kind]["auroc"]) for row in rows] for rows in layers])
        for kind, title in (("random", "other pictures"), ("hard", "one noun exchanged"))
        if kind == "random" or hard
        for way in ("raw", "centred")
    ]
    titles = [(model.name, model.n) for model in models]
    bands = [
        (f"cosine, {way}", [[row[way]["distribution"] for row in rows] for rows in layers])
        for way in ("raw", "centred")
    ]
    # What mlx-vlm loads puts the image in front of the text, as concat does.
    fusions = {"cross" if m.data["about"].get("fusion") == "cross" else "concat" for m in models}
    what = {
        "concat": "Where the image is a part of the sequence, its state is the mean over its "
        "tokens.",
        "cross": "With <b>cross-attention</b> it is not in the text's stream; its state is "
        "what a layer's cross-attention would write if it looked evenly at the whole image. It "
        "need not point where the words are: values far below one half tell pairs apart as well, "
        "the other way round.",
    }
    said = " ".join(text for fusion, text in what.items() if fusion in fusions)
    return (
        "<h3>Layer by layer</h3><p>The cosine between the mean hidden state of the caption's "
        "tokens and the state of the image, after the embedding and after each decoder layer. Raw "
        "cosines are dominated by a direction that all states share; <b>centred</b> ones have the "
        f"layer's mean taken off. Dotted: chance. {said}</p>"
        + plot(figures.by_layer("auroc-by-layer", panels, titles, "AUROC", 0.5))
        + plot(figures.bands("cosines", titles, bands))
        + "<p><small>Lines are medians, areas reach from 5 to 95 % of the pairs.</small></p>"
    )
