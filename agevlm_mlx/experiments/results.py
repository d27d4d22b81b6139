"""What the runs of an experiment have come to, read from what the commands have written."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import config
from ..atomic import write_file
from ..benchmarks import benchmark
from ..errors import UserError
from ..evaluation import compare, scoring
from ..evaluation.answers import Row
from ..evaluation.benchmark import Scores, flatten
from ..evaluation.compare import Difference
from .plan import Plan, Run
from .state import cost, marked


@dataclass(frozen=True)
class Metric:
    """A number of a result: its dotted name, how a table calls it, and which way is better."""

    name: str
    label: str
    #: 1: more is better, -1: less; 0: neither.
    better: int = 1
    digits: int = 3


#: Of every run and test, in the order of the table. POPE by what the model says in words.
METRICS = (
    *(
        Metric(f"text.pope.{split}.{key}", f"POPE {split}: {label}", better)
        for split in ("random", "popular", "adversarial")
        for key, label, better in (
            ("accuracy", "accuracy", 1), ("f1", "F1", 1), ("yes_ratio", "says yes", 0),
        )
    ),
    Metric("logits.pope.adversarial.auroc", "POPE adversarial: AUROC of yes"),
    Metric("shuffled.text.pope.adversarial.accuracy", "adversarial, another picture", 0),
    Metric("blind.text.pope.adversarial.accuracy", "adversarial, no picture", 0),
    Metric("text.chair_i", "CHAIR_i", -1),
    Metric("text.chair_s", "CHAIR_s", -1),
    Metric("text.recall", "objects recalled"),
    *(
        Metric(f"text.chair_i_{how}at_recall.{recall}", f"CHAIR_i, {label}, recall .{recall}", -1)
        for how, label in (("", "surest"), ("confirmed_", "best confirmed"))
        for recall in (30, 40, 50, 60, 70, 80, 90)
    ),
    Metric("text.caption_f1", "caption F1"),
    Metric("text.mentions_per_caption", "nouns a caption", 0, 2),
    Metric("logits.matching_auroc", "matching AUROC, random"),
    Metric("logits.matching_auroc_hard", "matching AUROC, hard"),
    Metric("logits.matching_confirmed_auroc", "matching by confirmed nouns, random"),
    Metric("logits.matching_confirmed_auroc_hard", "matching by confirmed nouns, hard"),
    Metric("logits.matching_win_rate", "matching, pairs won, random"),
    Metric("logits.matching_win_rate_hard", "matching, pairs won, hard"),
    Metric("look.pointing_game", "pointing game, all heads"),
    Metric("look.pointing_game_tolerance", "the same within 15/224 of the picture"),
    Metric("look.pointing_game_half_heads", "pointing game, half of the heads"),
    Metric("look.energy_in_mask", "attention in the mask"),
    Metric("look.energy_gain", "the same / even attention", 1, 2),
)  # fmt: skip
#: Of the analysis; the layers' come from the report itself.
ANALYSIS = (
    Metric("specificity", "specificity of the attention"),
    Metric("log_p.random", "separation by log p, random"),
    Metric("log_p.hard", "separation by log p, hard"),
)
#: What a reader looks at first.
HEADLINE = (
    "text.pope.adversarial.accuracy",
    "logits.matching_auroc_hard",
    "look.pointing_game",
    "logits.matching_confirmed_auroc_hard",
    "text.chair_i_at_recall",
    "text.chair_i_confirmed_at_recall",
    "text.recall",
)
#: Of a pair: at the highest recall that both reach; see `headline`.
_PAIRED = (
    Metric("text.chair_i_at_recall", "CHAIR_i, surest, at equal recall", -1),
    Metric("text.chair_i_confirmed_at_recall", "CHAIR_i, best confirmed, at equal recall", -1),
)
BY_NAME = {metric.name: metric for metric in (*METRICS, *ANALYSIS, *_PAIRED)}
#: Numbers that are compared, under draws of the scenes.
_WAYS = ("text", "logits", "look")
BOOTS, SEED = 1000, 0


def headline(found: Mapping[str, Difference], name: str) -> tuple[Difference, str] | None:
    """A number of `HEADLINE` of a pair, and " at .70" where it is one at a recall: the highest
    that both reach in all seeds. None where the pair does not have it."""
    if name in found:
        return found[name], ""
    levels = [n for n in found if n.startswith(f"{name}.") and found[n].interval]
    if not levels:
        return None
    best = max(levels)
    return found[best], f" at .{best.rpartition('.')[2]}"


class Results:
    """Reads each file once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._items: dict[str, tuple[str, Path]] = {}
        self.values = lru_cache(None)(self._values)
        self.drawn = lru_cache(None)(self._drawn)
        self.analysis = lru_cache(None)(self._analysis)

    def _values(self, run: str, test: str) -> dict[str, float]:
        """Every number of a run on a test and of its controls, by dotted names; {} if not judged.

        ``UserError`` if it was asked something else than the other runs.
        """
        path = self.plan.result(test, run)
        if not path.is_file():
            return {}
        result = config.read_json(path)
        if result.get("finished") is None:
            return {}
        items, first = self._items.setdefault(test, (str(result.get("items")), path))
        if items != str(result.get("items")):
            raise UserError(
                f"{path}: expected answers to what {first} was asked, got others; delete both "
                "results of this test and run the experiment again"
            )
        numbers = flatten({**result["metrics"], **result["controls"]})
        return {name: value for name, value in numbers.items() if value is not None}

    def _drawn(self, run: str, test: str) -> dict[str, np.ndarray]:
        """The same numbers under `BOOTS` draws of the scenes, the same draws for every run."""
        path = self.plan.result(test, run)
        kept = self.plan.out / "cache" / test / f"{run}.npz"
        stat = path.with_suffix(".jsonl").stat()
        names = zlib.crc32(" ".join(metric.name for metric in METRICS).encode())
        key = np.array([stat.st_mtime_ns, stat.st_size, BOOTS, SEED, names])
        if kept.is_file():
            with open(kept, "rb") as file, np.load(file, allow_pickle=False) as stored:
                if np.array_equal(stored["key"], key):
                    return {name: stored[name] for name in stored.files if name != "key"}
        found = draws(compare.read_result(path)[1])
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, lambda to: np.savez_compressed(to, **{**found, "key": key}))  # pyright: ignore[reportArgumentType]
        return found

    def _analysis(self, run: str) -> dict[str, float]:
        """Numbers of the analysis: `ANALYSIS`, and "layer.N.random" and "layer.N.hard"."""
        path = self.plan.analysis(run)
        if not path.is_file():
            return {}
        model = config.read_json(path)["models"][0]
        measures = (model.get("attention") or {}).get("measures") or {}
        matching = model.get("matching") or {}
        found = {"specificity": measures.get("specificity")}
        for kind in ("random", "hard"):
            score = matching.get("scores", {}).get("log_p", {}).get(kind) or {}
            found[f"log_p.{kind}"] = score.get("auroc")
            for n, layer in enumerate(matching.get("layers") or ()):
                found[f"layer.{n}.{kind}"] = (layer["centred"].get(kind) or {}).get("auroc")
        return {
            name: one["value"] for name, one in found.items() if one and one["value"] is not None
        }

    def training(self, run: str) -> tuple[int, float]:
        """(steps, seconds) of the training alone; (0, 0) where there is none yet."""
        folder = self.plan.run_folder(run)
        return marked(folder) or cost(folder)

    def judged(self, runs: Sequence[Run], test: str) -> list[Run]:
        """Those of `runs` that have a result on `test`."""
        return [run for run in runs if self.values(run.name, test)]


def draws(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """f64[BOOTS] of every number under draws of the scenes ("text.chair_i"), from answers."""
    one, units = benchmark("scenes"), scoring.units(rows)
    found = {}
    for way in _WAYS:
        given = list(scoring.given(one, rows, way))
        if not given:
            continue
        scores = Scores(units, BOOTS, SEED)
        one.score(given, scores)
        for name in scores.names:
            drawn = scores.drawn(name)
            if drawn is not None:
                found[f"{way}.{name}"] = drawn
    return found


def numbers(results: Results, run: Run) -> Mapping[str, Any]:
    """Everything about a run, for results.json."""
    steps, seconds = results.training(run.name)
    return {
        "arm": run.arm,
        "vary": run.vary,
        "length": run.length,
        "seed": run.seed,
        "trial": run.trial,
        "overrides": run.overrides,
        "steps": steps,
        "train_seconds": seconds,
        "tests": {test: results.values(run.name, test) for test in run.tests},
        "analysis": results.analysis(run.name) if run.analysed else {},
    }
