"""Means over seeds, and paired differences with intervals over scenes and seeds: pure numbers."""

from collections.abc import Sequence

import numpy as np

from ..evaluation import metrics
from ..evaluation.compare import Difference

Table = Sequence[np.ndarray] | np.ndarray


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation of a sample) over seeds; no deviation of one seed."""
    data = np.asarray(values, np.float64)
    return float(data.mean()), float(data.std(ddof=1)) if len(data) > 1 else None


def paired(
    first: Sequence[float],
    second: Sequence[float],
    drawn_first: Table,
    drawn_second: Table,
    seed: int = 0,
) -> Difference:
    """The difference of two means over seeds, and its 95 % interval over scenes and seeds.

    first, second: f64[S], a number of each seed. drawn: f64[S B], the same under B draws of the
    scenes. All rows of both are under the same draws; a draw's seeds are drawn with replacement,
    the same for both sides, as row s of both shares its data, its order and what it can of its
    initial weights. Draws in which the number does not exist (nan) are left out.
    """
    a, b = (np.asarray(drawn, np.float64) for drawn in (drawn_first, drawn_second))
    if not len(first) == len(second) == len(a) == len(b) or a.shape != b.shape:
        raise ValueError(f"{len(first)} and {len(second)} seeds, draws {a.shape} and {b.shape}")
    count, boots = a.shape
    picks = np.random.default_rng(seed).integers(count, size=(boots, count))
    gaps = (a - b)[picks, np.arange(boots)[:, None]].mean(1)
    pair = metrics.interval(gaps)
    known = bool(np.isfinite(pair).all())
    return Difference(float(np.mean(first)), float(np.mean(second)), pair if known else None)


def sure(difference: Difference, better: int = 1) -> bool:
    """Whether the interval says that the first is better: more (1) or less (-1)."""
    if difference.interval is None or not better:
        return False
    low, high = difference.interval
    return low > 0 if better > 0 else high < 0
