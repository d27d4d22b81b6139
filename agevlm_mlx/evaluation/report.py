"""The comparison of the two arms as one JSON: concat, and cross-attention with guidance."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import metrics
from .benchmark import flatten

SCHEMA = 1
#: Order of the arms in tables; the difference is the last minus the first.
ARMS = ("concat", "guided")

#: What POPE reports of every split, in ``report.json``.
POPE_KEYS = ("accuracy", "f1", "yes_ratio", "shuffled_accuracy", "blind_accuracy")


def assemble(
    evaluations: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    train_seconds: Mapping[str, float],
    **about: Any,
) -> dict[str, Any]:
    """``report.json``: the metrics of each arm under ``arms``, and everything needed to redo them.

    evaluations: per arm what ``agevlm evaluate`` wrote as JSON, answers: its JSON lines;
    train_seconds: wall time of each arm's training. `about` (machine, versions, commands, steps)
    is added at the top level.
    """
    arms = {}
    for name in ARMS:
        one = evaluations[name]
        arms[name] = {
            **one["metrics"],
            "train_seconds": train_seconds[name],
            "evaluate_seconds": one["seconds"],
            "intervals": one["intervals"],
            "model": one["model"],
            "counts": one["counts"],
            "settings": one["settings"],
        }
    seed = int(evaluations[ARMS[0]]["settings"]["seed"])
    return {
        "schema": SCHEMA,
        "arms": arms,
        "difference": differences(answers[ARMS[1]], answers[ARMS[0]], seed),
        **about,
    }


def differences(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, list[float]]:
    """first - second with its 95 % interval [difference, low, high], paired by image.

    Both are the answers of one benchmark to the same questions (rows of the .jsonl). A measure
    that has no value for one of them (no object named at all) is left out.
    """
    out = {}
    measures = {
        f"pope.{split}.accuracy": (("pope", split), _correct)
        for split in dict.fromkeys(row["split"] for row in first if row["task"] == "pope")
    } | {
        "pointing_game": (("grounding", None), lambda row: float(row["hit"])),
        "energy_in_mask": (("grounding", None), lambda row: float(row["energy"])),
    }
    for name, ((task, split), value) in measures.items():
        a, b = _rows(first, task, split), _rows(second, task, split)
        shared = [key for key in a if key in b]
        if shared:
            out[name] = list(
                metrics.paired_difference(
                    [a[k]["image"] for k in shared],
                    [value(a[k]) for k in shared],
                    [value(b[k]) for k in shared],
                    seed=seed,
                )
            )
    out |= _caption_differences(first, second, seed)
    out |= _matching_differences(first, second, seed)
    return {name: gap for name, gap in out.items() if np.isfinite(gap).all()}


def _correct(row: Mapping[str, Any]) -> float:
    return float((row["margin"] > 0) == row["label"])


def _rows(
    answers: Iterable[Mapping[str, Any]], task: str, split: str | None = None
) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The rows of one task by what identifies them in both arms."""
    return {
        (row["image"], row.get("question_id"), row.get("question")): row
        for row in answers
        if row["task"] == task and row.get("split") == split
    }


def _paired(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], task: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    a, b = _rows(first, task), _rows(second, task)
    return [(a[key], b[key]) for key in a if key in b]


def _caption_differences(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, list[float]]:
    pairs = _paired(first, second, "caption")
    if not pairs:
        return {}
    parts = [
        metrics.caption_ratios(
            np.array([metrics.caption_counts(row["mentions"], row["objects"]) for row in arm])
        )
        for arm in zip(*pairs, strict=True)
    ]
    draws = metrics.image_draws(len(pairs), seed=seed)
    out = {}
    for name in ("chair_i", "recall", "caption_f1"):
        values = [
            metrics.divide(top.sum(), bottom.sum()) for top, bottom in (p[name] for p in parts)
        ]
        drawn = [metrics.ratio_draws(*p[name], draws) for p in parts]
        out[name] = [values[0] - values[1], *metrics.interval(drawn[0] - drawn[1])]
    return out


def _matching_differences(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, list[float]]:
    pairs = _paired(first, second, "matching")
    out = {}
    for name, column in (("matching_auroc", 1), ("matching_auroc_hard", 2)):
        used = [pair for pair in pairs if pair[0]["captions"][column]]
        if not used:
            continue
        p = np.array([[row["log_likelihood"] for row in pair] for pair in used], float)
        draws = metrics.image_draws(len(used), seed=seed)
        values = [metrics.auroc(p[:, arm, 0], p[:, arm, column]) for arm in (0, 1)]
        drawn = [metrics.auroc_draws(p[:, arm, 0], p[:, arm, column], draws) for arm in (0, 1)]
        out[name] = [values[0] - values[1], *metrics.interval(drawn[0] - drawn[1])]
    return out


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
