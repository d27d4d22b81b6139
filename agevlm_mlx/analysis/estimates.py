"""Means with 95 % intervals: a bootstrap over images, as what is asked of one image belongs
together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation import metrics

Values = Sequence[float] | Sequence[bool] | np.ndarray


class Estimates:
    """Every number under the same draws of the images, so that differences are paired.

    A number is ``{"value": float | None, "interval": [low, high] | None, "n": how many}``.
    """

    def __init__(self, images: int, boots: int = 1000, seed: int = 0) -> None:
        self._draws = metrics.image_draws(images, boots, seed) if images else np.zeros((boots, 0))

    def mean(self, images: Sequence[int], values: Values) -> dict[str, Any]:
        """The mean of `values`, each of the image numbered beside it."""
        return self.ratio(images, values, np.ones(len(images)))

    def ratio(self, images: Sequence[int], top: Values, bottom: Values) -> dict[str, Any]:
        """sum(top) / sum(bottom)."""
        return self._number(len(images), *self._ratio(images, top, bottom))

    def ahead(
        self, images: Sequence[int], top: Values, other: Values, bottom: Values | None = None
    ) -> dict[str, Any]:
        """The ratio of `top` less that of `other`, in pairs; without `bottom` their means."""
        bottom = np.ones(len(images)) if bottom is None else bottom
        (value, drawn), (less, less_drawn) = (
            self._ratio(images, part, bottom) for part in (top, other)
        )
        return self._number(len(images), value - less, drawn - less_drawn)

    def _ratio(
        self, images: Sequence[int], top: Values, bottom: Values
    ) -> tuple[float, np.ndarray]:
        count = self._draws.shape[1]
        tops, _ = metrics.per_image(images, np.asarray(top, np.float64), count)
        bottoms, _ = metrics.per_image(images, np.asarray(bottom, np.float64), count)
        value = tops.sum() / bottoms.sum() if bottoms.sum() else float("nan")
        return value, metrics.ratio_draws(tops, bottoms, self._draws)

    def _number(self, n: int, value: float, drawn: np.ndarray) -> dict[str, Any]:
        pair = metrics.interval(drawn)
        known = bool(np.isfinite(value))
        return {
            "value": float(value) if known else None,
            "interval": list(pair) if known and np.isfinite(pair).all() else None,
            "n": n,
        }
