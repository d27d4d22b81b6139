"""The report's sections: matching, attention, causal test; each "" when no model has it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.image import Geometry, load_image
from ..errors import UserError
from ..evaluation.overlay import display_size, overlay
from ..evaluation.report_page import data_url
from . import figures
from .figures import Bar

#: What is wider than the page can be scrolled, by the keyboard too.
_SCROLL = '<div class="scroll" tabindex="0" role="group" aria-label="can be scrolled">'
#: Side of a picture on the page, in pixels, and how many maps of one are shown.
SIDE, TILES = 168, 4
_SHOWN = {"log_p": "log p(caption | image)", "pmi": "PMI", "yes": "log P(yes) / P(no)"}
_METRICS = (
    ("auroc", "AUROC", "0.5"),
    ("win_rate", "wins in pairs", "0.5"),
    ("d_prime", "d&prime;", "0"),
    ("overlap", "overlap", "1"),
    ("recall_at_1", "first of all", ""),
    ("sanity", "mismatched against mismatched", "0.5"),
)
_BASELINES = {
    "uniform": "even attention",
    "centre": "centre of the picture",
    "shuffled": "another phrase's map",
    "image_only": "the picture's mean map",
}
_LOOKS = {
    "energy": "attention inside the thing",
    "hit": "pointing game",
    "auroc": "AUROC of cells",
    "iou_half": "IoU at half the maximum",
}
_MEASURES = {
    "on_image": "share of all attention on the image",
    "null": "on the null slot",
    "in_mask": "inside the thing",
    "energy": "of the attention on the image, inside the thing",
    "gain": "the same over even attention",
    "hit": "pointing game: the peak is on the thing",
    "near": "the same with TorchRay's tolerance",
    "auroc": "AUROC of cells inside against outside",
    "iou_half": "IoU of the thing and the map above half its maximum",
    "best_iou": "the same at the best threshold (upper bound)",
    "nss": "NSS, standard deviations above the mean",
    "entropy": "entropy (1: spread evenly)",
    "sink": "share of the strongest cell",
    "specificity": "energy more than that of other phrases' maps",
}


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


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{text}</th>' for text in head)
    return (
        f"{_SCROLL}<table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(number: Any) -> figures.Number:
    if not number or number.get("value") is None:
        return (float("nan"), None, None)
    low, high = number.get("interval") or (None, None)
    return (number["value"], low, high)


def _plot(svg: str) -> str:
    return f"{_SCROLL}{svg}</div>"


# --- matching --------------------------------------------------------------------------------


def matching(models: Sequence[Model]) -> str:
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
        f"{first['images']} pictures have one). The less two areas overlap, the better the model "
        "tells the pairs apart.</p>"
        + _plot(figures.distributions("distributions", titles, rows))
        + _aurocs(models, kinds)
        + _folded("All numbers", _separations(models, kinds))
        + "<p><small><b>log p</b>: how likely the caption is as the answer to "
        f"“{escape(first['prompt'])}”, mean per token. <b>PMI</b>: less what it is without any "
        "image, so that what is likely in itself counts for nothing. <b>yes</b>: asked "
        f"“{escape(first['question'])}”. <b>AUROC</b>: how often a matching pair scores above a "
        "mismatching one, over all pairs; <b>wins in pairs</b>: over those of one picture. "
        "<b>d&prime;</b>: distance of the means in standard deviations. <b>Overlap</b>: shared "
        "area of the two distributions. <b>First of all</b>: how "
        "often the own caption scores highest. <b>Mismatched against "
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
    return cell(found[kind][metric] if found else None)


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
    return _table(head, rows)


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
        guess = models[0].data["matching"]["scores"]["log_p"][kind]["recall_at_1"]["no_skill"]
        cells = "".join(f"<td>{text or f'{guess:.2f}'}</td>" for *_, text in _METRICS)
        rows.append(f'<tr class="quiet"><th scope="row">no skill</th><td></td>{cells}</tr>')
    return _table(head, rows)


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{title}</summary>{html}</details>"


def _by_layer(models: Sequence[Model]) -> str:
    models = [model for model in models if model.data["matching"]["layers"]]
    if not models:
        return ""
    layers = [model.data["matching"]["layers"] for model in models]
    hard = all(rows[0]["raw"]["hard"] for rows in layers)
    panels = [
        (f"{title}, {way}", [[_number(row[way][kind]["auroc"]) for row in rows] for rows in layers])
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
        + _plot(figures.by_layer("auroc-by-layer", panels, titles, "AUROC", 0.5))
        + _plot(figures.bands("cosines", titles, bands))
        + "<p><small>Lines are medians, areas reach from 5 to 95 % of the pairs.</small></p>"
    )


# --- attention -------------------------------------------------------------------------------


def looking(models: Sequence[Model], captions: Mapping[str, str]) -> str:
    models = [m for m in models if m.data.get("attention") and m.data["attention"]["measures"]]
    if not models:
        return ""
    first = models[0].data["attention"]
    skipped = sum(first["skipped"].values())
    left = f" {skipped} more could not be measured." if skipped else ""
    return (
        "<h2>Where does it look?</h2>"
        f"<p>Asked “{escape(first['question'])}” about {first['phrases']} things in "
        f"{first['images']} pictures, where does the attention of the noun go?{left} "
        "The map is the mean over all looking layers and heads.</p>"
        + _plot(figures.bars("attention", _look_panels(models)))
        + "<p><small>Bars in grey are what no skill gives: even attention (for the pointing game a "
        "random point), the middle of the picture, the map of another phrase about the same "
        "picture, and the mean of all its maps, which knows the picture but not the phrase."
        "</small></p>" + _heads(models) + _measures(models) + _cards(models, captions)
    )


def _look_panels(models: Sequence[Model]) -> list[figures.Panel]:
    panels = []
    for name, title in _LOOKS.items():
        items: list[Bar] = []
        for model in models:
            found = model.data["attention"]["measures"][name]
            items.append(Bar(model.name, _number(found), model.n))
            if found["best_head"]:
                best = _number(found["best_head"])
                items.append(Bar(f"{model.name}, best head", best, model.n))
        base = models[0].data["attention"]["measures"][name]["baselines"]
        items += [
            Bar(text, _number(base[key]), None, shade)
            for shade, (key, text) in enumerate(_BASELINES.items())
        ]
        panels.append((title, items, None))
    return panels


def _heads(models: Sequence[Model]) -> str:
    titles = [(model.name, model.n) for model in models]
    rows = []
    for name, title in (
        ("energy", "attention inside the thing"),
        ("hit", "pointing game"),
        ("on_image", "share on the image"),
    ):
        columns = [
            (m.data["attention"]["layers"], m.data["attention"]["measures"][name]["by_head"])
            for m in models
        ]
        rows.append((title, columns))
    lines = []
    for model in models:
        best = model.data["attention"]["measures"]["hit"]["best_head"]
        sinks = model.data["attention"]["sinks"]
        line = f"<b class='m{model.n}'>{escape(model.name)}</b>:"
        if best:
            layer = model.data["attention"]["layers"][best["layer"]]
            line += (
                f" the head that points best on half of the pictures (layer {layer}, head "
                f"{best['head']}) hits {percent(best)} of 100{span(best)} on the other half."
            )
        if sinks:
            line += (
                " The cell that gets most whatever is asked holds "
                f"{100 * sinks['share']:.1f} % of the attention on the image (even attention: "
                f"{100 * sinks['even']:.1f} %)."
            )
        lines.append(f"<li>{line}</li>")
    return (
        "<h3>Head by head</h3>"
        + _plot(figures.heat_maps("heads", titles, rows))
        + f"<ul>{''.join(lines)}</ul>"
    )


def _measures(models: Sequence[Model]) -> str:
    rows = []
    for name, title in _MEASURES.items():
        for model in models:
            found = model.data["attention"]["measures"].get(name)
            if not found:
                continue
            base = found["baselines"]
            cells = cell(found) + "".join(cell(base.get(key)) for key in _BASELINES)
            cells += cell(found["best_head"])
            rows.append(f'<tr><th scope="row">{title}</th><td>{chip(model)}</td>{cells}</tr>')
    head = ["measure", "model", "value", *_BASELINES.values(), "best head, on other pictures"]
    return _folded("All measures", _table(head, rows))


def _cards(models: Sequence[Model], captions: Mapping[str, str]) -> str:
    """A few pictures: for some phrases the map of each model, all phrases of a picture alike."""
    kept: dict[str, dict[str, dict[int, tuple[Any, Any]]]] = {}
    for model in models:
        part = model.data["attention"]
        for one in part["kept"]:
            own = kept.setdefault(one["image"], {}).setdefault(one["phrase"], {})
            own[model.n] = (one, part["rows"][one["number"]])
    articles = []
    for image, phrases in kept.items():
        try:
            picture = load_image(Path(image))
        except UserError:  # it was there when it was measured
            continue
        plain = picture.resize(display_size(*picture.size, SIDE), Image.Resampling.BICUBIC)
        groups = [_tile(plain, "the picture", "the picture")]
        for phrase, looks in list(phrases.items())[: max(1, TILES // len(models))]:
            tiles = []
            for model in (m for m in models if m.n in looks):
                one, row = looks[model.n]
                place = Geometry(**one["geometry"])
                shown = overlay(picture, np.array(one["map"]), place, tile=SIDE)
                note = (
                    f"{100 * row['energy']:.0f} % on it, peak {'on' if row['hit'] else 'beside'} it"
                )
                alt = f"{model.name} looks for {phrase}: {note}"
                tiles.append(_tile(shown, alt, f"<b>{escape(phrase)}</b> {chip(model)}<br>{note}"))
            groups.append("".join(tiles))
        tiles = "".join(f'<div class="group">{group}</div>' for group in groups)
        text = escape(captions.get(image, Path(image).name))
        articles.append(
            f'<article><p>{text}</p><div class="strip">{"".join(tiles)}</div></article>'
        )
    return (
        "<h3>Pictures</h3><p>The first pictures of the sample, not a selection. Bright is more "
        "attention, the ring marks the peak; each map has its own scale.</p>" + "".join(articles)
    )


def _tile(image: Image.Image, alt: str, caption: str) -> str:
    return (
        f'<figure><img src="{data_url(image)}" alt="{escape(alt)}" width="{image.width}" '
        f'height="{image.height}"><figcaption>{caption}</figcaption></figure>'
    )


# --- causal test -----------------------------------------------------------------------------


def causal(models: Sequence[Model]) -> str:
    models = [m for m in models if m.data.get("causal") and m.data["causal"]["objects"]]
    if not models:
        return ""
    first = models[0].data["causal"]
    panels = []
    for group, name, title in (
        ("present", "p_yes", "change of P(yes) for things that are there"),
        ("present", "log_p", "change of log p of the noun as a caption"),
        ("absent", "p_yes", "change of P(yes) for things that are not there"),
    ):
        items: list[Bar] = []
        for model in models:
            found = model.data["causal"][group].get(name)
            if found:
                numbers = found["mean colour"]
                own, other = (_number(numbers[f"change_{p}"]) for p in ("object", "elsewhere"))
                items.append(Bar(f"{model.name}: thing blanked", own, model.n))
                items.append(Bar("elsewhere blanked", other, None, 1))
        if items:
            panels.append((title, items, (-1.05, 0.25) if name == "p_yes" else None))
    rows = []
    for group, title in (("present", "things that are there"), ("absent", "things that are not")):
        for model in models:
            for name, found in model.data["causal"][group].items():
                for way in ("mean colour", "blur"):
                    numbers = found[way]
                    label = {"p_yes": "P(yes)", "accuracy": "right answers"}.get(name, "log p")
                    cells = cell(found["before"]) + "".join(
                        cell(numbers[key])
                        for key in (
                            "object",
                            "elsewhere",
                            "change_object",
                            "change_elsewhere",
                            "effect",
                        )
                    )
                    rows.append(
                        f'<tr><th scope="row">{label}, {title}</th><td>{chip(model)}</td>'
                        f"<td>{way}</td>{cells}</tr>"
                    )
    head = ["asked", "model", "blanked with", "before", "thing blanked", "elsewhere blanked"]
    head += ["change", "change elsewhere", "effect of the thing"]
    return (
        "<h2>Does the answer hang on the thing?</h2>"
        f"<p>{first['objects']} things in {first['images']} pictures are blanked, with the "
        "picture's mean colour or by blurring, and the model is asked for them again. As a control "
        "an area of the same size and shape elsewhere is blanked instead. A model that uses the "
        "thing loses with it and not with the control; one that answers from habit loses nothing; "
        "for things that are not there nothing should change.</p>"
        + _plot(figures.bars("causal", panels))
        + "<p><small>Blanked with the mean colour; the blurred ones are in the table.</small></p>"
        + _folded("All numbers", _table(head, rows))
    )
