"""The report's sections about attention and the causal test."""

from collections.abc import Mapping, Sequence
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
from .page import Model, cell, chip, folded, number, percent, plot, span, table

#: Side of a picture on the page, in pixels, and how many maps of one are shown.
SIDE, TILES = 168, 4
#: What needs no model, and what is made of a model's own maps.
_COMMON = {"uniform": "even attention", "centre": "centre of the picture"}
_OWN = {"shuffled": "another phrase's map", "image_only": "the picture's mean map"}
_BASELINES = _COMMON | _OWN
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


def looking(models: Sequence[Model], captions: Mapping[str, str]) -> str:
    """Where each model looks, "" when no model shows it. captions: by a picture's path."""
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
        + plot(figures.bars("attention", _look_panels(models)))
        + "<p><small>Bars in grey are what no skill gives. For each model, where a picture has two "
        "things or more: another phrase's map, and the mean of all maps of the picture, the "
        "phrase's own among them, which lifts it with a model that looks well. At the end even "
        "attention over the picture (in the pointing game a random point) and the middle of it. "
        "Attention on the padding of a picture that is not square is on nothing: it counts "
        "against the model.</small></p>"
        + _heads(models)
        + _measures(models)
        + _cards(models, captions)
    )


def _look_panels(models: Sequence[Model]) -> list[figures.Panel]:
    panels = []
    for name, title in _LOOKS.items():
        items: list[Bar] = []
        for model in models:
            found = model.data["attention"]["measures"][name]
            items.append(Bar(model.name, number(found), model.n))
            if found["best_head"]:
                best = number(found["best_head"])
                items.append(Bar(f"{model.name}, best head", best, model.n))
            items += [
                Bar(text, number(found["baselines"][key]), None, shade)
                for shade, (key, text) in enumerate(_OWN.items(), 2)
            ]
        base = models[0].data["attention"]["measures"][name]["baselines"]
        items += [
            Bar(text, number(base[key]), None, shade)
            for shade, (key, text) in enumerate(_COMMON.items())
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
        + plot(figures.heat_maps("heads", titles, rows))
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
    return folded("All measures", table(head, rows))


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
    """What blanking a thing changes, "" when no model has this part."""
    models = [m for m in models if m.data.get("causal") and m.data["causal"]["objects"]]
    if not models:
        return ""
    first = models[0].data["causal"]
    room, unusable = first["skipped"]["no room"], first["skipped"]["unusable mask"]
    left = f" {room} more are too large for a control." if room else ""
    left += f" {unusable} masks were unusable." if unusable else ""
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
                own, other = (number(numbers[f"change_{p}"]) for p in ("object", "elsewhere"))
                items.append(Bar(f"{model.name}: thing blanked", own, model.n))
                items.append(Bar("elsewhere blanked", other, None, 1))
        if items:
            panels.append((title, items, (-1.05, 1.05) if name == "p_yes" else None))
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
    changed = first["pixel_change"]["mean colour"]
    return (
        "<h2>Does the answer hang on the thing?</h2>"
        f"<p>{first['objects']} things in {first['images']} pictures are blanked, with the "
        f"picture's mean colour or by blurring, and the model is asked for them again.{left} As a "
        "control an area of the same size and shape elsewhere is blanked instead. A model that "
        "uses the thing loses with it and not with the control; one that answers from habit loses "
        "nothing; for things that are not there nothing should change.</p>"
        + plot(figures.bars("causal", panels))
        + "<p><small>Blanked with the mean colour; the blurred ones are in the table. P(yes) is "
        "that of yes rather than no, at the first word. The control is of equal area, but erases "
        f"less: blanking the thing changes a picture by {changed['object']['value']:.2f} grey "
        f"levels a pixel, the control by {changed['elsewhere']['value']:.2f}, as it often lies on "
        "plain background.</small></p>" + folded("All numbers", table(head, rows))
    )
