"""The one interface behind which every benchmark lives, and what it hands back.

A benchmark is a function ``run(loaded, data, settings) -> Result`` in a file of its own, listed
in ``evaluate.BENCHMARKS``. It reads its data, asks the model, and returns numbers and answers;
printing and writing are the command's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..weights import Loaded
from . import metrics

Progress = Callable[[str, int, int], None]


def _silent(task: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark is run with. `seed` fixes samples, shuffles and bootstrap draws."""

    #: Use a random sample of this many images; None is all.
    limit: int | None = None
    seed: int = 0
    #: Images looked at together.
    batch_size: int = 50
    #: Longest greedy caption, in tokens.
    max_tokens: int = 48
    #: Draws of the bootstrap behind the 95 % intervals.
    boots: int = 1000
    progress: Progress = field(default=_silent, compare=False)


@dataclass(frozen=True, kw_only=True)
class Result:
    """`metrics`: nested numbers. `answers`: one row for every single answer.

    `intervals` maps the dotted name of a metric to its 95 % interval by bootstrap over images.
    """

    metrics: Mapping[str, Any]
    intervals: Mapping[str, tuple[float, float]]
    counts: Mapping[str, int]
    answers: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]


class Benchmark(Protocol):
    """`data` is a folder; ``UserError`` says which of its files are missing."""

    def __call__(self, loaded: Loaded, data: Path, settings: Settings) -> Result: ...


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics under dotted names."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Scores:
    """Collects numbers under dotted names, each with its interval over the bootstrap draws."""

    def __init__(self, draws: metrics.Weights) -> None:
        self.draws = draws
        self.values: dict[str, Any] = {}
        self.intervals: dict[str, tuple[float, float]] = {}

    def put(self, name: str, value: float, draws: np.ndarray | None = None) -> None:
        """Set the metric `name` (dotted), with its values under the bootstrap draws."""
        *parents, last = name.split(".")
        table = self.values
        for key in parents:
            table = table.setdefault(key, {})
        table[last] = value
        pair = metrics.interval(draws) if draws is not None else (np.nan, np.nan)
        if np.isfinite(pair).all():
            self.intervals[name] = pair

    def ratio(self, name: str, numerator: np.ndarray, denominator: np.ndarray) -> None:
        """A ratio of sums, from its two parts per image f[images]."""
        value = metrics.divide(numerator.sum(), denominator.sum())
        self.put(name, value, metrics.ratio_draws(numerator, denominator, self.draws))

    def mean(self, name: str, images: Sequence[int], values: metrics.Numbers) -> None:
        """The mean of `values`, each belonging to the image numbered beside it."""
        self.ratio(name, *metrics.per_image(images, values, self.draws.shape[1]))
