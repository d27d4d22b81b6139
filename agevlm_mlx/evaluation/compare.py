"""Two finished evaluations of the same benchmark: what differs, and how surely."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import config
from ..errors import UserError
from . import metrics, scoring
from .answers import Row, read_rows
from .benchmark import Benchmark, flatten

#: What two rows have to share to be answers to the same.
_SAME = ("kind", "prompt", "label", "options", "unit", "about")


@dataclass(frozen=True)
class Difference:
    """A number of two models on the same items: ``first``, ``second``, first - second, and its
    95 % interval by paired bootstrap (both models under the same draws of the units)."""

    first: float
    second: float
    interval: tuple[float, float] | None

    @property
    def value(self) -> float:
        return self.first - self.second


def read_result(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A result file of ``agevlm evaluate`` and the answers beside it."""
    if path.suffix != ".json":
        path = path.with_name(path.name + ".json")
    result = config.read_json(path)
    wrong = not isinstance(result, dict) or not isinstance(result.get("benchmark"), str)
    if wrong or not isinstance(result.get("settings"), dict) or "metrics" not in result:
        raise UserError(f"{path}: expected a finished result of `agevlm evaluate`")
    answers = path.with_suffix(".jsonl")
    if not answers.is_file():
        raise UserError(f"{path}: expected its answers beside it, in {answers.name}")
    others = result.get("not_asked")
    others = set(map(str, others)) if isinstance(others, list) else set()
    rows = [row for row in read_rows(answers) if row["key"] not in others]
    counts = result.get("counts")
    items = counts.get("items") if isinstance(counts, dict) else None
    if items != len(rows):
        raise UserError(
            f"{answers}: expected {items} answers, as {path.name} says, got {len(rows)}"
        )
    return result, rows


def check(benchmark: Benchmark, result: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """``UserError`` unless the answers have the numbers of the result."""
    told = flatten(result["metrics"])
    scored = scoring.score(benchmark, rows, scoring.units(rows), 1, 0)
    found = flatten(scoring.report(scored)["metrics"])
    for name, value in told.items():
        now = found.get(name, np.nan)
        if value is not None and not np.isclose(now, value, atol=1e-5, equal_nan=True):
            raise UserError(
                f"{path}: expected answers with {name} {value:.4f}, as it says, got {now:.4f}; "
                "they are of another run, or were scored by another version"
            )


def unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The settings that two results do not share, for a person."""
    a, b = first["settings"], second["settings"]
    return [
        f"{name}: {a.get(name)!r} and {b.get(name)!r}"
        for name in dict.fromkeys((*a, *b))
        if a.get(name) != b.get(name)
    ]


def differences(
    benchmark: Benchmark,
    first: Sequence[Row],
    second: Sequence[Row],
    boots: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Every number that both have ("logits.accuracy"), on the items that both have answered.

    ``UserError`` if they have none in common, or another right answer to the same one.
    """
    of_second = {row["key"]: row for row in second}
    pairs = [(row, of_second[row["key"]]) for row in first if row["key"] in of_second]
    if not pairs:
        raise UserError("--compare: expected answers to the same items, got none in common")
    for a, b in pairs:
        other = next((name for name in _SAME if a[name] != b[name]), None)
        if other is not None:
            raise UserError(
                f"--compare: expected the same {other} of {a['key']}, got {str(a[other])[:60]!r} "
                f"and {str(b[other])[:60]!r}; the data differ"
            )
    sides = [list(side) for side in zip(*pairs, strict=True)]
    units = scoring.units(sides[0])
    scored = [scoring.score(benchmark, side, units, boots, seed) for side in sides]
    found = {}
    for way in scoring.WAYS:
        if way not in scored[0] or way not in scored[1]:
            continue
        a, b = scored[0][way], scored[1][way]
        for name in a.names:
            if name in b and np.isfinite([a[name], b[name]]).all():
                drawn = a.drawn(name), b.drawn(name)
                pair = None
                if drawn[0] is not None and drawn[1] is not None:
                    pair = metrics.interval(drawn[0] - drawn[1])
                known = pair is not None and np.isfinite(pair).all()
                found[f"{way}.{name}"] = Difference(a[name], b[name], pair if known else None)
    return found


def table(names: tuple[str, str], found: Mapping[str, Difference]) -> str:
    """The differences for a terminal; a star marks those whose interval leaves out zero."""
    width = max(map(len, found), default=0) + 2
    lines = ["difference = first - second; * its interval leaves out zero"]
    lines += [f"  first:  {names[0]}", f"  second: {names[1]}"]
    lines.append(f"  {'':<{width}}{'first':>10}{'second':>10}{'difference':>13}")
    for name, one in found.items():
        line = f"  {name:<{width}}{one.first:>10.3f}{one.second:>10.3f}{one.value:>+13.3f}"
        if one.interval is not None:
            low, high = one.interval
            mark = " *" if low > 0 or high < 0 else ""
            line += f"   [{low:+.3f}, {high:+.3f}]{mark}"
        lines.append(line)
    return "\n".join(lines)
