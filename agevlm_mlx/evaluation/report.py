"""The comparison of the two arms as one JSON: concat, and cross-attention with guidance."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import compare
from .answers import Row
from .benchmark import Benchmark, flatten, nest
from .scoring import WAYS

SCHEMA = 1
#: Order of the arms in tables; the difference is the last minus the first.
ARMS = ("concat", "guided")

#: What POPE reports of every split, in ``report.json``.
POPE_KEYS = ("accuracy", "f1", "yes_ratio", "shuffled_accuracy", "blind_accuracy")


#: Where a result has a number -> what its name in ``report.json`` begins with.
_PREFIXES = {
    "logits": "",
    "look": "",
    "text": "text_",
    "shuffled.logits": "shuffled_",
    "blind.logits": "blind_",
}


def assemble(
    benchmark: Benchmark,
    evaluations: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Sequence[Row]],
    train_seconds: Mapping[str, float],
    **about: Any,
) -> dict[str, Any]:
    """``report.json``: the metrics of each arm under ``arms``, and everything needed to redo them.

    benchmark: the scenes; evaluations: per arm what ``agevlm evaluate`` wrote as JSON, answers:
    its JSON lines; train_seconds: wall time of each arm's training. `about` (machine, versions,
    commands, steps) is added at the top level.
    """
    arms = {}
    for name in ARMS:
        one = evaluations[name]
        arms[name] = {
            **_numbers(one),
            "train_seconds": train_seconds[name],
            "evaluate_seconds": one["seconds"],
            "intervals": _plain(one["intervals"]),
            "model": one["model"],
            "counts": one["counts"],
            "settings": one["settings"],
        }
    settings = evaluations[ARMS[0]]["settings"]
    gaps = compare.differences(
        benchmark, answers[ARMS[1]], answers[ARMS[0]], settings["boots"], settings["seed"]
    )
    known = {name: [gap.value, *gap.interval] for name, gap in gaps.items() if gap.interval}
    return {"schema": SCHEMA, "arms": arms, "difference": _plain(known), **about}


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one result with their controls beside them. POPE's are by logits."""
    numbers = nest(_plain(flatten({**result["metrics"], **result["controls"]})))
    for split, beside in numbers["pope"].items():
        always = (one["pope"][split] for one in result["controls"]["constant"].values())
        beside["constant_accuracy"] = max(one["accuracy"] for one in always)
    return numbers


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a result's dotted names under those of ``report.json``."""
    plain = {}
    for full, value in values.items():
        for way, prefix in _PREFIXES.items():
            stem, _, last = full.removeprefix(f"{way}.").rpartition(".")
            if full.startswith(f"{way}.") and stem:
                plain[f"{stem}.{prefix}{last}"] = value
            elif full.startswith(f"{way}.") and way in WAYS:
                plain[last] = value
    return plain


def summary(report: Mapping[str, Any]) -> str:
    """The headline numbers for a terminal, the two arms side by side."""
    shown = [
        "pope.adversarial.accuracy",
        "pope.adversarial.shuffled_accuracy",
        "pope.adversarial.blind_accuracy",
        "pope.random.accuracy",
        "pope.popular.accuracy",
        "matching_auroc",
        "matching_auroc_hard",
        "pointing_game",
        "energy_in_mask",
        "uniform_energy",
        "chair_i",
        "recall",
        "caption_f1",
        "train_seconds",
    ]
    lines = [f"{'':<36}" + "".join(f"{name:>10}" for name in ARMS)]
    flat = {name: flatten(report["arms"][name]) for name in ARMS}
    for key in shown:
        digits = 0 if key == "train_seconds" else 3
        values = [flat[name].get(key) for name in ARMS]
        cells = "".join(f"{'-' if v is None else f'{v:.{digits}f}':>10}" for v in values)
        gap = report["difference"].get(key)
        note = f"   {gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}]" if gap else ""
        lines.append(f"{key:<36}{cells}{note}")
    return "\n".join(lines)
