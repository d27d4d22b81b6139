"""``report.html``: one self-contained page of what `agevlm analyze` found, light and dark.

Every model has a column and a colour of its own. The numbers are those of report.json.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from ..evaluation import files
from . import attention_section, matching_section
from .page import Model, chip, percent, span

Result = Mapping[str, Any]
#: Pictures below which intervals are said to mean little.
_FEW = 30


def render(result: Result, captions: Mapping[str, str]) -> str:
    """The page. result: as written to report.json; captions: of the pictures, by their path."""
    result = _printable(files.plain(result))
    captions = _printable(captions)
    models = _models(result)
    page = resources.files("agevlm_mlx") / "assets" / "analysis.html"
    template = page.read_text(encoding="utf-8")
    parts = {
        "LEAD": _lead(result),
        "MODELS": "".join(f"<li>{_who(model)}</li>" for model in models),
        "TILES": _tiles(models),
        "WORDS": "".join(map(_said, models)),
        "MATCHING": matching_section.section(models),
        "LOOKING": attention_section.looking(models, captions),
        "CAUSAL": attention_section.causal(models),
        "LIMITS": "".join(f"<li>{line}</li>" for line in _limits(models, result["data"]["images"])),
        "ABOUT": _about(result, models),
    }
    for name, html in parts.items():
        template = template.replace(f"<!--{name}-->", html)
    return template


def _printable(value: Any) -> Any:
    """Without control characters, which a page cannot hold, and those that turn a line round."""
    if isinstance(value, Mapping):
        return {key: _printable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_printable(one) for one in value]
    if isinstance(value, str):
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", value)
    return value


def sentences(result: Result) -> list[str]:
    """What was found, in words made from the numbers; for a terminal and the page."""
    models = _models(files.plain(result))
    return [f"{model.name}: {line}" for model in models for line in _of_model(model)]


def _models(result: Result) -> list[Model]:
    """Named by their folders, with as much of the path as tells them apart."""
    paths = [str(one["about"]["path"]).rstrip("/").split("/") for one in result["models"]]
    size = 1
    while size < max(map(len, paths)) and len({tuple(p[-size:]) for p in paths}) < len(paths):
        size += 1
    names = ["/".join(path[-size:]) for path in paths]
    return [
        Model(n, name, one)
        for n, (name, one) in enumerate(zip(names, result["models"], strict=True))
    ]


def _lead(result: Result) -> str:
    count, names = result["data"]["images"], result["settings"]["only"]
    found = [part["images"] for m in result["models"] if (part := m.get("matching"))]
    unread = f" ({count - min(found)} could not be read)" if found and min(found) < count else ""
    asked = {
        "matching": "whether a model tells the caption of a picture from another one, and at "
        "which layer",
        "attention": "where its attention goes when it is asked about a thing",
        "causal": "whether its answer changes when the thing is blanked out",
    }
    questions = [text for name, text in asked.items() if name in names]
    listed = " and ".join(
        [", ".join(questions[:-1]), questions[-1]] if questions[1:] else questions
    )
    return (
        f"{count} pictures{unread} of <b>{escape(result['data']['path'])}</b>. What was asked: "
        f"{listed}. The tables and figures have each number's 95 % interval, by bootstrap over "
        "pictures, and beside it what no skill gives."
    )


def _who(model: Model) -> str:
    about = model.data["about"]
    kinds = {
        "cross": "cross-attention to the image",
        "concat": "image tokens in front of the text",
    }
    facts = [kinds.get(str(about.get("fusion")), str(about.get("fusion", "")))]
    if about.get("parameters"):
        facts.append(f"{about['parameters']:,} parameters")
    if about.get("grid"):
        facts.append("image seen as " + " x ".join(map(str, about["grid"])) + " tokens")
    return f"{chip(model)} <small>{escape(', '.join(f for f in facts if f))}</small>"


# --- what it comes to ------------------------------------------------------------------------


def _tiles(models: Sequence[Model]) -> str:
    """The headline numbers: (text, number of a model or None if it has none)."""
    hit = next((found for model in models if (found := model.looked("hit"))), None)
    chance = f" (a random point {percent(hit['baselines']['uniform'])})" if hit else ""
    tiles = (
        (
            "times out of 100 a picture's own caption is more likely to it than another picture's "
            "(chance 50)",
            lambda m: m.separated("log_p", "random", "win_rate"),
        ),
        (
            "times out of 100 it is more likely than itself with one noun exchanged (chance 50)",
            lambda m: m.separated("log_p", "hard", "win_rate"),
        ),
        (
            f"times out of 100 its attention peaks on the thing it is asked about{chance}",
            lambda m: m.looked("hit"),
        ),
        (
            "points of P(yes) lost when the thing is blanked, beyond those lost when as much is "
            "blanked elsewhere",
            lambda m: m.effect("p_yes", -1),
        ),
    )
    parts = []
    for text, of in tiles:
        known = [(model, number) for model in models if (number := of(model))]
        numbers = "".join(
            f'<span class="big m{model.n}">{percent(number)}<small>{escape(model.name)}'
            f"{span(number)}</small></span>"
            for model, number in known
        )
        if known:
            parts.append(f'<div class="tile"><div class="pair">{numbers}</div><p>{text}</p></div>')
    return "".join(parts)


def _said(model: Model) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in _of_model(model))
    return f"<div><h3>{chip(model)}</h3><ul>{lines}</ul></div>"


def _of_model(model: Model) -> list[str]:
    lines = []
    easy, hard = (model.separated("log_p", kind, "win_rate") for kind in ("random", "hard"))
    if easy:
        line = (
            "It finds a picture's own caption more likely than another picture's in "
            f"{percent(easy)} of 100 pairs{span(easy)}"
        )
        if hard:
            line += (
                ", and than the same caption with one noun exchanged in "
                f"{percent(hard)}{span(hard)}"
            )
        lines.append(line + "; chance 50.")
    p_yes = (model.data.get("matching") or {}).get("p_yes")
    if p_yes:
        said = "Asked whether the caption describes the picture, it says yes rather than no with "
        said += "probability "
        said += (
            f"{percent(p_yes['matching'])} % for its own, {percent(p_yes['mismatching'])} % for "
        )
        said += "another picture's"
        if p_yes["hard"]["value"] is not None:
            said += f" and {percent(p_yes['hard'])} % for one with a noun exchanged"
        lines.append(said + ".")
    layers = (model.data.get("matching") or {}).get("layers")
    if layers:
        last = layers[-1]["centred"]["random"]["auroc"]
        lines.append(
            "Its last layer writes nothing of the image into the text's stream."
            if last["value"] is None
            else "After its last layer the cosine between text and image states puts a matching "
            f"pair above a mismatching one in {percent(last)} of 100 comparisons{span(last)}; "
            "chance 50."
        )
    hit, energy = model.looked("hit"), model.looked("energy")
    if hit and energy:
        base = hit["baselines"]
        lines.append(
            f"Its attention peaks on the thing it is asked about in {percent(hit)} of 100 "
            f"cases{span(hit)}; a random point in {percent(base['uniform'])}, the middle of the "
            f"picture in {percent(base['centre'])}. {percent(energy)} % of its attention on the "
            f"image lies on the thing, which covers {percent(energy['baselines']['uniform'])} %."
        )
    elif model.data.get("attention"):
        part = model.data["attention"]
        unseen = sum(part["skipped"].values())
        lines.append(
            "It does not show where it looks."
            if not unseen
            else f"None of {unseen} things could be compared with where it looks: their masks are "
            "unusable or out of its view."
        )
    effect = model.effect("p_yes", 1)
    if effect:
        change = model.data["causal"]["present"]["p_yes"]["mean colour"]
        lines.append(
            "Blanking the thing it is asked about changes its P(yes) by "
            f"{percent(change['change_object'], sign=True)} points, blanking as much elsewhere by "
            f"{percent(change['change_elsewhere'], sign=True)}: the thing itself counts for "
            f"{percent(effect, sign=True)}{span(effect, sign=True)}."
        )
    return lines


def _limits(models: Sequence[Model], pictures: int) -> list[str]:
    lines = [
        "One training run of each model: the intervals cover the choice of pictures, not that of "
        "the random seed.",
        "An independent implementation after the idea of AGE-VLM (arXiv 2511.17793), whose exact "
        "similarity is not public: these are not the paper's numbers.",
    ]
    if pictures < _FEW:
        lines.append(
            f"With {pictures} pictures an interval says little, and one at 0 or 100 has no width "
            "at all: a hundred are better."
        )
    if any(model.data.get("matching") for model in models):
        lines.append(
            "Captions are not complete: another picture's caption may by chance be true of a "
            "picture, which lowers what can be reached."
        )
    if any(model.data.get("attention") for model in models):
        lines.append(
            "Attention maps show where a model looks, not what it uses; the causal test is the "
            "stronger evidence. Heads and layers that look best here were picked on these "
            "pictures; only the column <i>best head</i> is scored on others."
        )
    fusions = {str(m.data["about"].get("fusion")) for m in models if m.data.get("matching")}
    if len(fusions) > 1:
        lines.append(
            "The state of an image is not the same thing in the two fusions (see <i>Layer by "
            "layer</i>), nor is attention: it is self-attention of all layers where the image is a "
            "part of the sequence, else cross-attention only."
        )
    return lines


def _about(result: Result, models: Sequence[Model]) -> str:
    settings = {k: v for k, v in result["settings"].items() if v is not None}
    facts = [
        ("pictures", f"{result['data']['images']} of {result['data']['path']}"),
        ("data", _listed({k: v for k, v in result["data"].items() if k not in ("path", "images")})),
        ("settings", _listed(settings)),
        ("machine", _listed(result["machine"])),
        ("versions", _listed(result["versions"])),
        ("finished", f"{result['finished']}, after {result['seconds']:.0f} s"),
    ]
    for model in models:
        about = model.data["about"]
        facts.append((f"model {model.name}", f"{about['path']} ({about.get('fingerprint', '')})"))
    facts += [("left out", line) for line in problems(result["models"])]
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>"
        for name, text in facts
    )
    return f"<table><tbody>{rows}</tbody></table><pre>{escape(result['command'])}</pre>"


def problems(models: Sequence[Result]) -> list[str]:
    """What could not be measured, each thing once."""
    lines = [
        line
        for model in models
        for part in ("matching", "attention", "causal")
        for line in (model.get(part) or {}).get("problems", ())
    ]
    return list(dict.fromkeys(lines))


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in facts.items()
    )
