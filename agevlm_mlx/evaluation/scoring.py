"""From kept answers to numbers: of the model, and of what has not seen the image."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .answers import Row
from .benchmark import Benchmark, Given, Item, Scores

#: The ways of asking that are reported apart, and the name of what they read from a row.
WAYS = {"text": "answer", "logits": "scores", "look": "look"}
#: Controls that were asked of the model.
CONTROLS = ("blind", "shuffled")


def as_item(row: Row) -> Item:
    """The item of a row, without its mask."""
    return Item(
        key=row["key"],
        unit=row["unit"],
        image=None if row["image"] is None else Path(row["image"]),
        prompt=row["prompt"],
        kind=row["kind"],
        label=row["label"],
        options=tuple(row["options"]),
        phrase=row.get("phrase", ""),
        about=row["about"],
    )


def given(
    benchmark: Benchmark, rows: Sequence[Row], way: str, control: str = ""
) -> Iterator[Given]:
    """The answers of one way of asking ("text", "logits", "look") as they are scored.

    control: "blind" or "shuffled" for those to the control's question.
    """
    for row in rows:
        if control and row["image"] is None:
            continue  # it has no image that could be taken away
        name = f"{control}_{WAYS[way]}" if control else WAYS[way]
        value = row.get(name)
        if value is None or value == {}:
            continue
        item = as_item(row)
        if way == "look":
            yield Given(item, look=value)
        elif way == "logits":
            best = max(range(len(value)), key=value.__getitem__)
            blind = row.get("blind_scores") or value
            confirmed = () if control else tuple(row.get("scores_confirmed") or ())
            yield Given(item, item.options[best], tuple(value), tuple(blind), confirmed=confirmed)
        elif item.kind == "choice":
            yield Given(item, benchmark.parse(item, value))
        else:
            sure, confirmed = (
                () if control else tuple(row.get(f"answer_{name}") or ())
                for name in ("log_p", "confirmed")
            )
            yield Given(item, value, log_p=sure, confirmed=confirmed)


def constants(rows: Sequence[Row]) -> dict[str, list[Given]]:
    """For each option: every question that has it answered by it, the others not at all."""
    items = [as_item(row) for row in rows if row["kind"] == "choice" and row["options"]]
    options = dict.fromkeys(option for item in items for option in item.options)
    return {
        option: [Given(item, option if option in item.options else "") for item in items]
        for option in options
    }


def majority(rows: Sequence[Row]) -> list[Given]:
    """Every question answered by the commonest label among those in the same words, of the same
    source and split; one that is asked about a single unit, by the commonest of its split.

    The most that can be known without any image, by one who knows the labels.
    """
    items = [as_item(row) for row in rows if row["kind"] == "choice" and row["options"]]
    labels: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    asked: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for item in items:
        for key in _alike(item):
            labels[key][item.label] += 1
            asked[key].add(item.unit)
    found = []
    for item in items:
        words, split = _alike(item)
        same = labels[words] if len(asked[words]) > 1 else labels[split]
        best = next((label for label, _ in same.most_common() if label in item.options), "")
        found.append(Given(item, best))
    return found


def _alike(item: Item) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What questions have in common: source, split and words, or only the first two."""
    split = (str(item.about.get("source")), str(item.about.get("split")))
    return (*split, item.prompt), split


def score(
    benchmark: Benchmark, rows: Sequence[Row], units: Sequence[str], boots: int, seed: int
) -> dict[str, Scores]:
    """The numbers of each way of asking and each control, by their dotted names: "text",
    "logits", "look", "blind.text", "shuffled.logits", "constant.yes", "majority"; those that
    have any."""
    answers = {
        ".".join(filter(None, (control, way))): list(given(benchmark, rows, way, control))
        for control in ("", *CONTROLS)
        for way in WAYS
        if (control, way) != ("blind", "look")
    }
    answers |= {f"constant.{option}": found for option, found in constants(rows).items()}
    answers["majority"] = majority(rows)
    scored = {}
    for name, found in answers.items():
        if found:
            scores = Scores(units, boots, seed)
            benchmark.score(found, scores)
            if scores.names:
                scored[name] = scores
    return scored


def units(rows: Sequence[Row]) -> list[str]:
    """What the bootstrap draws, in a fixed order."""
    return sorted({row["unit"] for row in rows})


def report(scored: Mapping[str, Scores]) -> dict[str, Any]:
    """ "metrics", "intervals" (of the controls too, by "shuffled.logits.NAME") and "controls" of
    a result file."""
    nested = {name: scores.nested() for name, scores in scored.items()}
    controls: dict[str, Any] = {}
    for name, numbers in nested.items():
        control, _, rest = name.partition(".")
        if rest:
            controls.setdefault(control, {})[rest] = numbers
        elif name not in WAYS:
            controls[name] = numbers
    intervals = {
        f"{part}.{name}": list(pair)
        for part, scores in scored.items()
        for name in scores.names
        if (pair := scores.interval(name)) is not None
    }
    return {
        "metrics": {way: nested[way] for way in WAYS if way in nested},
        "intervals": intervals,
        "controls": controls,
    }
