"""The one interface behind which every benchmark lives: what is asked, and how it is scored.

A benchmark is one file in ``benchmarks/`` that makes a `Benchmark`: it reads the published files
into `Item` s and scores answers. It never sees a model: `run` asks, with an image, with another
one and with none, and scores all of these alike.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from . import metrics
from .source import Source

#: How an item is asked. choice: in words, and by the first token of each option; likelihood: how
#: likely each option is as the whole answer; text: in words alone; look: where a phrase looks.
Kind = Literal["choice", "likelihood", "text", "look"]


#: Units below which drawing them again says nothing: of one, all draws are the same.
FEWEST = 5


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to ask about an image (None: about no image).

    key: unique in the benchmark, the same in every run; file and row number are good ones, since
        published ids repeat. unit: what the bootstrap draws, the image unless answers are judged
        together (a pair, a figure's set). label: the right one of `options`, "" if there is none.
        options: in lower case for yes and no. phrase: for ``look``, words of the prompt. mask: for
        ``look``, called when it is needed: bool[h w], the pixels of the object; mask_key: changes
        when the mask does.
        about: what scoring and a reader need to know besides (JSON); kept with every answer.
    """

    key: str
    unit: str
    image: Path | None
    prompt: str
    kind: Kind = "choice"
    label: str = ""
    options: tuple[str, ...] = ()
    phrase: str = ""
    mask: Callable[[], np.ndarray] | None = field(default=None, compare=False)
    mask_key: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


def mask_key(outline: Any) -> str:
    """For `Item.mask_key`, of a mask as a file has it: RLE, polygons, a list of them."""
    told = json.dumps(outline, default=str, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Given:
    """An answer as a benchmark scores it.

    answer: one of the item's options, or "" for none of them; for ``text`` what was said.
    scores: of ``likelihood`` (and of ``choice`` asked by logits), one an option: log-probabilities,
        in nats (of ``likelihood`` the mean per token). blind: the same without an image.
    look: of ``look``, what `pointing.measures` found.
    log_p: of ``text``, how sure the model was of each of `Benchmark.mentions`; () if it cannot say.
    confirmed: of ``text``, for each of `Benchmark.confirm` log P(yes) - log P(no), in nats; of
        ``likelihood``, the least of these of each option.
    """

    item: Item
    answer: str = ""
    scores: tuple[float, ...] = ()
    blind: tuple[float, ...] = ()
    look: Mapping[str, Any] = field(default_factory=dict)
    log_p: tuple[float, ...] = ()
    confirmed: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """about: one line for ``--help``. needs: which files, and where their authors offer them.

    read: the items of a folder; it tells `Source` of every bad row and goes on.
    parse: the option that an answer in words means, by the benchmark's own rule; "" for none.
    score: numbers from answers. It is called for each way of asking and each control, with the
        items of some kinds only, and scores what is there.
    mentions: the (start, end) of the words in a ``text`` answer whose probability is asked for,
        where they were said and with its own image.
    confirm: the yes/no questions that ask the model about what a text says: an answer of its own
        to a ``text`` item, or an option of a ``likelihood`` item.
    headline: the numbers that are printed first, by their names in `Scores`.
    max_tokens: of an answer in words, text_tokens: of one to a ``text`` item, if that is another
        number. prompt: put around every question, as "{question}".
    """

    name: str
    about: str
    needs: str
    read: Callable[[Source], list[Item]]
    score: Callable[[Sequence[Given], "Scores"], None]
    parse: Callable[[Item, str], str] = lambda item, said: said
    mentions: Callable[[Item, str], Sequence[tuple[int, int]]] | None = None
    confirm: Callable[[Item, str], Sequence[str]] | None = None
    headline: tuple[str, ...] = ()
    max_tokens: int = 16
    text_tokens: int | None = None
    prompt: str = "{question}"


class Scores:
    """Numbers under dotted names, each with its value under every bootstrap draw of the units."""

    def __init__(self, units: Sequence[str], boots: int = 1000, seed: int = 0) -> None:
        """units: every unit of the benchmark, once. The same units, `boots` and `seed` give the
        same draws, so that two models, or a model and its control, can be compared in pairs."""
        self._place = {unit: n for n, unit in enumerate(units)}
        self._draws = metrics.image_draws(len(units), boots, seed)
        self._drawn: dict[str, np.ndarray] = {}
        self._from: dict[str, int] = {}  # units that a number is made of
        self._values: dict[str, float] = {}

    def mean(self, name: str, given: Sequence[Given], values: metrics.Numbers) -> None:
        """The mean of `values`, one for each of `given`."""
        self.ratio(name, given, values, np.ones(len(given)))

    def ratio(
        self,
        name: str,
        given: Sequence[Given],
        numerators: metrics.Numbers,
        denominators: metrics.Numbers,
    ) -> None:
        """sum(numerators) / sum(denominators), one of each for each of `given`; 0 without any."""
        if not len(given) == len(numerators) == len(denominators):
            raise ValueError(
                f"{name}: {len(given)} answers, {len(numerators)} and {len(denominators)} numbers"
            )
        at = [self._place[one.item.unit] for one in given]
        units = len(self._place)
        top = metrics.per_image(at, numerators, units)[0]
        bottom = metrics.per_image(at, denominators, units)[0]
        value = metrics.divide(top.sum(), bottom.sum())
        self.put(name, value, metrics.ratio_draws(top, bottom, self._draws))
        self._from[name] = int(np.count_nonzero(bottom))

    def auroc(
        self,
        name: str,
        positive: Sequence[Given],
        positive_scores: metrics.Numbers,
        negative: Sequence[Given],
        negative_scores: metrics.Numbers,
    ) -> None:
        """AUROC of the scores of some answers over those of others (the same ones, where each has
        one of both); nothing without any of either."""
        if not positive or not negative:
            return
        p, n = ([self._place[one.item.unit] for one in side] for side in (positive, negative))
        draws = metrics.auroc_draws(positive_scores, negative_scores, p, n, self._draws)
        self.put(name, metrics.auroc(positive_scores, negative_scores), draws)
        self._from[name] = min(len(set(p)), len(set(n)))

    def drawn_from(
        self, name: str, given: Sequence[Given], function: Callable[[metrics.Weights], np.ndarray]
    ) -> None:
        """A number that is no ratio of sums: `function` of how often each of `given` counts,
        f64[boots given] -> f64[boots]; nothing where it does not exist."""
        value = float(function(np.ones((1, len(given))))[0])
        if np.isfinite(value):
            at = [self._place[one.item.unit] for one in given]
            self.put(name, value, function(self._draws[:, at]))
            self._from[name] = len(set(at))

    def derive(self, name: str, function: Callable[..., Any], *names: str) -> None:
        """A number made from others, as 100 * (a + b): `function` of values and of draws alike."""
        value = float(function(*(self._values[key] for key in names)))
        drawn = [self._drawn[key] for key in names if key in self._drawn]
        self.put(name, value, function(*drawn) if len(drawn) == len(names) else None)
        self._from[name] = min(self._from.get(key, 0) for key in names)

    def put(self, name: str, value: float, draws: np.ndarray | None = None) -> None:
        """A number as it is, with its values f64[boots] under the draws if there are any."""
        self._values[name] = float(value)
        if draws is not None:
            self._drawn[name] = np.asarray(draws, np.float64)

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def drawn(self, name: str) -> np.ndarray | None:
        """f64[boots], or None for a number without draws, or of fewer than `FEWEST` units."""
        few = self._from.get(name, FEWEST) < FEWEST
        return None if few else self._drawn.get(name)

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval; None where there is none."""
        drawn = self.drawn(name)
        if drawn is None:
            return None
        pair = metrics.interval(drawn)
        return pair if np.isfinite(pair).all() else None

    def nested(self) -> dict[str, Any]:
        """Every number, as JSON."""
        return nest(self._values)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values under dotted names as tables in tables."""
    table: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inner = table
        for key in parents:
            # Some names come from data: one may be a table's and a value's.
            key = key if isinstance(inner.get(key, {}), dict) else f"{key}_"
            inner = inner.setdefault(key, {})
        inner[last if not isinstance(inner.get(last), dict) else f"{last}_"] = value
    return table


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under dotted names."""
    flat: dict[str, float] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
