"""Scores as pure functions on numbers and strings: no model, no files, no MLX.

Each is checked against a table worked out by hand in ``tests/evaluation/test_metrics.py``.
Where a published benchmark fixes a rule, the rule is followed to the letter and named.
"""

from collections.abc import Collection, Sequence

import numpy as np

Weights = np.ndarray  # f64[boots images]: how often each image was drawn
Numbers = Sequence[float] | Sequence[bool] | np.ndarray


def divide(numerator: float, denominator: float) -> float:
    """The quotient, or 0 when there is nothing to divide by (no answer, no mention)."""
    return float(numerator) / float(denominator) if denominator else 0.0


# --- yes or no -------------------------------------------------------------------------------


def parse_yes_no(answer: str) -> bool:
    """True for "yes", by the rule of POPE's own evaluate.py.

    Text before the first full stop, commas removed, split at spaces: "no" if any word is
    exactly ``No``, ``not`` or ``no``. Everything else is "yes", an empty answer included.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "not", "no") for word in words)


# --- matching --------------------------------------------------------------------------------


def auroc(positive: Numbers, negative: Numbers) -> float:
    """P(a positive scores above a negative) over all pairs, a tie counting one half."""
    p, n = np.asarray(positive, np.float64), np.sort(np.asarray(negative, np.float64))
    if not len(p) or not len(n):
        return float("nan")
    below = np.searchsorted(n, p, side="left") + np.searchsorted(n, p, side="right")
    return float(below.sum() / (2 * len(p) * len(n)))


# --- objects in captions ---------------------------------------------------------------------


def caption_counts(said: Sequence[str], true: Collection[str]) -> tuple[int, int, int, int, int]:
    """What one caption mentions against the objects of its picture.

    Mentions of absent objects, all mentions, objects recalled, objects present, and different
    nouns mentioned.
    """
    present, different = set(true), set(said)
    absent = sum(noun not in present for noun in said)
    return absent, len(said), len(present & different), len(present), len(different)


def caption_ratios(counts: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores of captions as numerator and denominator f64[captions], to be summed first.

    ``chair_i`` (Rohrbach et al., 2018): mentions of absent objects / mentions; ``chair_s``:
    captions with at least one / captions. Both are lowered by saying little or the same thing
    twice, hence ``recall``: objects mentioned / objects present, ``repeated_mentions`` /
    mentions, and ``caption_f1``, of the different nouns mentioned against the objects present.
    counts: rows of `caption_counts`.
    """
    absent, said, recalled, present, different = np.asarray(counts, np.float64).reshape(-1, 5).T
    return {
        "chair_i": (absent, said),
        "chair_s": ((absent > 0).astype(np.float64), np.ones_like(said)),
        "recall": (recalled, present),
        "caption_f1": (2 * recalled, different + present),
        "repeated_mentions": (said - different, said),
        "mentions_per_caption": (said, np.ones_like(said)),
    }


# --- where the attention lies ----------------------------------------------------------------


def pointing_hit(x: float, y: float, mask: np.ndarray, radius: float = 0.0) -> bool:
    """Pointing game: is the point inside the mask, or nearer than `radius` pixels to it?

    `x`, `y` in pixels of `mask` bool[h w], a pixel (i, j) being the square [j, j+1) x [i, i+1).
    A point outside the picture (in the padding) is a miss. The distance with a radius is
    strict and between pixel centres, as in TorchRay's benchmark.
    """
    column, row = int(np.floor(x)), int(np.floor(y))
    height, width = mask.shape
    if not (0 <= row < height and 0 <= column < width):
        return False
    if mask[row, column] or radius <= 0:
        return bool(mask[row, column])
    rows, columns = np.nonzero(mask)
    return bool(len(rows) and np.min((rows - row) ** 2 + (columns - column) ** 2) < radius**2)


def peak_cell(attention: np.ndarray, grid: tuple[int, int]) -> tuple[float, float]:
    """Centre (x, y) of the cell with the most attention, in cells; the first one of a tie.

    `attention` f[Gh*Gw] or f[Gh Gw].
    """
    row, column = divmod(int(np.argmax(np.asarray(attention).reshape(-1))), grid[1])
    return column + 0.5, row + 0.5


def energy_in_mask(attention: np.ndarray, coverage: np.ndarray) -> float:
    """sum(a * m) / sum(a): the share of the attention that lies in the mask (f[S], f[S])."""
    a, m = np.asarray(attention, np.float64).ravel(), np.asarray(coverage, np.float64).ravel()
    return divide((a * m).sum(), a.sum())


def uniform_energy(coverage: np.ndarray) -> float:
    """What `energy_in_mask` gives to attention spread evenly: the share of the area."""
    return float(np.mean(coverage)) if np.size(coverage) else 0.0


# --- intervals -------------------------------------------------------------------------------


def image_draws(images: int, boots: int = 1000, seed: int = 0) -> Weights:
    """Bootstrap over images: f64[boots images], how often each image is drawn.

    Questions about one image are not independent, so images are drawn, not questions. The same
    seed gives two models the same draws, which makes their difference a paired one.
    """
    rng = np.random.default_rng(seed)
    even = np.full(images, 1 / max(images, 1))
    return rng.multinomial(images, even, size=boots).astype(np.float64)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central interval of bootstrap values; draws without any item (nan) are left out."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio_draws(numerator: np.ndarray, denominator: np.ndarray, draws: Weights) -> np.ndarray:
    """A ratio of sums under each draw, from its two parts per image (f[images])."""
    bottom = draws @ np.asarray(denominator, np.float64)
    top = draws @ np.asarray(numerator, np.float64)
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)


def auroc_draws(
    positive: Numbers,
    negative: Numbers,
    positive_units: Sequence[int],
    negative_units: Sequence[int],
    draws: Weights,
) -> np.ndarray:
    """AUROC under each draw of the units, f64[boots]; nan where one side is not drawn at all.

    A unit that is drawn w times has w pairs with itself, not w squared: it does not meet its own
    copies, which would move every draw towards the AUROC within units.
    """
    p, n = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    at_p, at_n = np.asarray(positive_units, int), np.asarray(negative_units, int)
    order = np.argsort(n, kind="stable")
    low, high = (np.searchsorted(n[order], p, side=side) for side in ("left", "right"))
    inside = np.zeros((2, draws.shape[1]))  # wins and pairs within each unit
    for unit in np.intersect1d(at_p, at_n):
        a, b = p[at_p == unit][:, None], n[at_n == unit]
        inside[:, unit] = ((a > b) + 0.5 * (a == b)).sum(), a.size * b.size
    found = []
    for start in range(0, len(draws), 100):  # thousands of scores in little memory
        part = draws[start : start + 100]
        below = np.cumsum(part[:, at_n[order]], axis=1)
        below = np.concatenate([np.zeros((len(below), 1)), below], axis=1)
        weights, copies = part[:, at_p], part**2 - part
        wins = (weights * (below[:, low] + below[:, high])).sum(1) / 2 - copies @ inside[0]
        pairs = weights.sum(1) * below[:, -1] - copies @ inside[1]
        found.append(np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan))
    return np.concatenate(found)


def per_image(images: Sequence[int], values: Numbers, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of `values` for each of `count` images (the parts of a mean)."""
    index = np.asarray(images, int)
    total = np.bincount(index, weights=np.asarray(values, np.float64), minlength=count)
    return total, np.bincount(index, minlength=count).astype(np.float64)


def mean_interval(images: Sequence[int], values: Numbers, draws: Weights) -> tuple[float, float]:
    """95 % interval of the mean of `values`, each belonging to the image numbered beside it."""
    return interval(ratio_draws(*per_image(images, values, draws.shape[1]), draws))


def derangement(count: int, seed: int) -> np.ndarray:
    """A random permutation i[count] that leaves nothing in its place (Sattolo's algorithm)."""
    if count < 2:
        raise ValueError("a derangement needs at least two items")
    order, rng = np.arange(count), np.random.default_rng(seed)
    for i in range(count - 1, 0, -1):
        j = int(rng.integers(i))
        order[i], order[j] = order[j], order[i]
    return order
