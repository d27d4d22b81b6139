"""How well a score tells matching pairs from mismatching ones: pure numbers.

A score is a table: `own` f[n], that of each image with its own caption, and `other` f[n K], those
with K captions of other images; nan where there is none. Every number comes with its 95 %
interval by bootstrap over images (`evaluation.metrics.image_draws`), whose pairs stay together.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..evaluation import metrics

#: Bins over the range of all scores together: of a distribution in a figure, and of `overlap`,
#: where few pairs would leave gaps in fine bins.
BINS, OVERLAP_BINS = 24, 10


def number(value: float, drawn: np.ndarray) -> dict[str, Any]:
    """A value and its interval from its values under the draws."""
    low, high = metrics.interval(drawn)
    return {
        "value": float(value),
        "interval": [low, high] if np.isfinite([low, high]).all() else None,
    }


def separation(own: np.ndarray, other: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    """Everything about one score; images without any other caption are left out.

    Returns JSON values: the numbers below, each as ``{"value", "interval"}``, and how many
    ``images`` and mismatching ``pairs`` there are.

    auroc: P(a matching pair scores above a mismatching one) over all pairs, ties one half.
    win_rate: the same among the pairs of one image. d_prime: distance of the means in standard
    deviations, sqrt of the mean variance. overlap: shared area of the two distributions in
    `OVERLAP_BINS` fixed bins. recall_at_1: how often the own caption scores
    highest of all of the image's, ties shared; its ``no_skill`` is what guessing gets. sanity:
    AUROC of one half of the mismatching pairs against the other, which has to be near 0.5.
    """
    other = np.asarray(other, np.float64).reshape(len(own), -1)
    own = np.where(np.isfinite(other).any(1), np.asarray(own, np.float64), np.nan)
    half = other.shape[1] // 2
    return {
        "auroc": auroc(own, other, draws),
        "win_rate": _win_rate(own, other, draws),
        "d_prime": d_prime(own, other, draws),
        "overlap": overlap(own, other, draws),
        "recall_at_1": _recall_at_1(own, other, draws),
        "sanity": auroc(other[:, :half], other[:, half:], draws) if half else None,
        "images": int(np.isfinite(own).sum()),
        "pairs": int(np.isfinite(other).sum()),
    }


def auroc(own: np.ndarray, other: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    """P(own > other) + P(own = other) / 2 over all own and all other, f[n] or f[n K]."""
    own, other = own.reshape(draws.shape[1], -1), other.reshape(draws.shape[1], -1)
    at_p, at_n = np.nonzero(np.isfinite(own)), np.nonzero(np.isfinite(other))
    p, n = own[at_p], other[at_n]
    drawn = metrics.auroc_draws(p, n, at_p[0].tolist(), at_n[0].tolist(), draws)
    return number(metrics.auroc(p, n), drawn)


def _win_rate(own: np.ndarray, other: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    valid = np.isfinite(other) & np.isfinite(own)[:, None]
    with np.errstate(invalid="ignore"):
        wins = ((own[:, None] > other) + 0.5 * (own[:, None] == other)) * valid
    return _ratio(wins.sum(1), valid.sum(1), draws)


def d_prime(own: np.ndarray, other: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    """(mean(own) - mean(other)) / sqrt((var(own) + var(other)) / 2); nan without any variance."""
    centre = np.nanmean(np.concatenate([own, other.ravel()])) if np.isfinite(own).any() else 0.0
    ones = np.ones((1, len(own)))

    def moments(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = values.reshape(len(own), -1) - centre
        valid = np.isfinite(values)
        kept = np.where(valid, values, 0)
        count = weights @ valid.sum(1)
        mean = _divide(weights @ kept.sum(1), count)
        return mean, np.maximum(_divide(weights @ (kept**2).sum(1), count) - mean**2, 0)

    def distance(weights: np.ndarray) -> np.ndarray:
        (m1, v1), (m2, v2) = moments(own, weights), moments(other, weights)
        spread = np.sqrt((v1 + v2) / 2)
        return _divide(m1 - m2, np.where(spread > 1e-12, spread, 0))

    return number(float(distance(ones)[0]), distance(draws))


def overlap(own: np.ndarray, other: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    """sum over the bins of min(share of own, share of other); 1 = no difference at all.

    Drawing images again makes two histograms less alike than they are: the interval is that of
    the draws moved by their mean's distance from the value.
    """
    edges = _edges(OVERLAP_BINS, own, other)
    parts = [_histograms(values.reshape(len(own), -1), edges) for values in (own, other)]

    def shared(weights: np.ndarray) -> np.ndarray:
        p, q = (_divide(c, c.sum(1, keepdims=True)) for c in (weights @ part for part in parts))
        return np.minimum(p, q).sum(1)

    value, drawn = float(shared(np.ones((1, len(own))))[0]), shared(draws)
    drawn = drawn[np.isfinite(drawn)]
    return number(value, np.clip(drawn + (value - drawn.mean()), 0, 1) if len(drawn) else drawn)


def _recall_at_1(own: np.ndarray, other: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    valid = np.isfinite(own)
    with np.errstate(invalid="ignore"):
        above, equal = (other > own[:, None]).sum(1), (other == own[:, None]).sum(1)
    hits = np.where(valid & (above == 0), 1 / (1 + equal), 0.0)
    no_skill = _divide((valid / (1 + np.isfinite(other).sum(1))).sum(), valid.sum())
    return _ratio(hits, valid, draws) | {"no_skill": float(no_skill)}


def distribution(kinds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """For a figure: ``edges`` f[BINS+1], and for each kind of pairs (f[n] or f[n K]) the share in
    each bin and its quantiles at 5, 25, 50, 75 and 95 %; a kind without pairs is left out."""
    edges = _edges(BINS, *kinds.values())
    table: dict[str, Any] = {"edges": edges.tolist(), "shares": {}, "quantiles": {}}
    for name, values in kinds.items():
        kept = values[np.isfinite(values)]
        if len(kept):
            shares = _histograms(kept[:, None], edges).sum(0) / len(kept)
            table["shares"][name] = shares.tolist()
            table["quantiles"][name] = np.quantile(kept, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
    return table


def mean(values: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    """The mean of f[n] or f[n K] without the nan."""
    values = np.asarray(values, np.float64).reshape(draws.shape[1], -1)
    valid = np.isfinite(values)
    return _ratio(np.where(valid, values, 0).sum(1), valid.sum(1), draws)


def _ratio(top: np.ndarray, bottom: np.ndarray, draws: metrics.Weights) -> dict[str, Any]:
    return number(float(_divide(top.sum(), bottom.sum())), metrics.ratio_draws(top, bottom, draws))


def _divide(top: Any, bottom: Any) -> np.ndarray:
    """The quotient, nan where there is nothing to divide by."""
    bottom = np.asarray(bottom, np.float64)
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)


def _edges(bins: int, *scores: np.ndarray) -> np.ndarray:
    values = np.concatenate([np.ravel(part) for part in scores])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    return np.linspace(low, high if high > low else low + 1, bins + 1)


def _histograms(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """f64[n bins]: of each row of f[n K], how many values lie in each bin; the last is closed."""
    bins = len(edges) - 1
    valid = np.isfinite(values)
    at = np.searchsorted(edges, np.where(valid, values, edges[0]), "right") - 1
    at = np.clip(at, 0, bins - 1)
    return np.stack([((at == b) & valid).sum(1) for b in range(bins)], 1).astype(np.float64)
