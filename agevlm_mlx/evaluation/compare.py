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
from .benchmark import Benchmark


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
    return result, read_rows(answers)


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
        if (a["label"], a["prompt"], a["unit"]) != (b["label"], b["prompt"], b["unit"]):
            raise UserError(
                f"--compare: expected the same question behind {a['key']}, got {a['prompt']!r} "
                f"({a['label']!r}) and {b['prompt']!r} ({b['label']!r})"
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


def table(names: tuple[str, str], found: Mapping[str, Difference], items: int) -> str:
    """The differences for a terminal; a star marks those whose interval leaves out zero."""
    width = max(map(len, found), default=0) + 2
    lines = [f"{items} items answered by both; difference = first - second, * = beyond chance"]
    lines.append(f"  first:  {names[0]}\n  second: {names[1]}")
    lines.append(f"  {'':<{width}}{'first':>10}{'second':>10}{'difference':>13}")
    for name, one in found.items():
        line = f"  {name:<{width}}{one.first:>10.3f}{one.second:>10.3f}{one.value:>+13.3f}"
        if one.interval is not None:
            low, high = one.interval
            mark = " *" if low > 0 or high < 0 else ""
            line += f"   [{low:+.3f}, {high:+.3f}]{mark}"
        lines.append(line)
    return "\n".join(lines)
