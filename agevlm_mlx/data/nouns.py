"""The nouns of the embedded pictures and how often they appear, alone and together.

The sampling is biased on purpose: inside a theme some nouns are far more frequent, and
objects of one theme come together. A language model that only learns this prior answers
"yes" to what is likely instead of to what is there, which is what the benchmark measures.
"""

from functools import cache
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "val", "test", "uniform", "combos", "nouns", "balanced", "pairs"]
SPLITS: tuple[Split, ...] = get_args(Split)

#: Theme -> (noun, OpenMoji character), the most frequent first.
THEMES: dict[str, tuple[tuple[str, str], ...]] = {
    "farm": (("cow", "🐄"), ("pig", "🐖"), ("horse", "🐎"), ("sheep", "🐑"), ("tractor", "🚜")),
    "street": (("car", "🚗"), ("bus", "🚌"), ("bicycle", "🚲"), ("train", "🚂"), ("scooter", "🛵")),
    "cafe": (("pizza", "🍕"), ("burger", "🍔"), ("donut", "🍩"), ("cake", "🍰"), ("teapot", "🫖")),
    "fruit": (
        ("apple", "🍎"),
        ("banana", "🍌"),
        ("strawberry", "🍓"),
        ("pineapple", "🍍"),
        ("watermelon", "🍉"),
    ),
    "sea": (("fish", "🐟"), ("whale", "🐳"), ("boat", "⛵"), ("crab", "🦀"), ("turtle", "🐢")),
    "desk": (("phone", "📱"), ("laptop", "💻"), ("book", "📕"), ("clock", "⏰"), ("camera", "📷")),
    "home": (("dog", "🐕"), ("house", "🏠"), ("chair", "🪑"), ("sofa", "🛋"), ("key", "🔑")),
    "garden": (
        ("tree", "🌳"),
        ("flower", "🌻"),
        ("mushroom", "🍄"),
        ("butterfly", "🦋"),
        ("umbrella", "☂"),
    ),
}
#: Nouns of the `nouns` split only: nothing of the project is trained on them.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("airplane", "✈"), ("rocket", "🚀"), ("crown", "👑"), ("balloon", "🎈"),
    ("gift", "🎁"), ("elephant", "🐘"), ("snowman", "⛄"), ("robot", "🤖"),
    ("bell", "🔔"), ("guitar", "🎸"), ("penguin", "🐧"), ("frog", "🐸"),
)  # fmt: skip

CHARACTERS: dict[str, str] = dict([p for theme in THEMES.values() for p in theme] + [*HELD_OUT])
NOUNS: tuple[str, ...] = tuple(noun for theme in THEMES.values() for noun, _ in theme)
ALL_NOUNS: tuple[str, ...] = tuple(CHARACTERS)
_THEME_NAMES = {noun: theme for theme, members in THEMES.items() for noun, _ in members}
_THEME_OF = np.array([t for t, theme in enumerate(THEMES.values()) for _ in theme])
_FREQUENCY = np.array([1 / (1 + 0.6 * j) for theme in THEMES.values() for j in range(len(theme))])
_COUNTS, _COUNT_SHARES = (1, 2, 3, 4), (0.15, 0.35, 0.30, 0.20)
_SAME_THEME = 0.75


def theme_of(noun: str) -> str | None:
    """The theme of a training noun; None for a held-out one."""
    return _THEME_NAMES.get(noun)


def with_article(noun: str) -> str:
    """``a dog``, ``an apple``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def held_out_pair(a: int, b: int) -> bool:
    """Whether training nouns `a` and `b` (indices) never share a picture outside `combos`."""
    return bool(_THEME_OF[a] != _THEME_OF[b] and (a + b) % 9 == 0)


def sample_nouns(rng: np.random.Generator, split: Split) -> list[str]:
    """The different nouns of one picture, in random order."""
    n = int(rng.choice(_COUNTS, p=_COUNT_SHARES))
    if split == "nouns":
        return [HELD_OUT[i][0] for i in rng.choice(len(HELD_OUT), n, replace=False)]
    biased = split not in ("uniform", "balanced")
    while True:
        chosen = _sample(rng, max(n, 2) if split == "combos" else n, biased=biased)
        pairs = any(held_out_pair(a, b) for i, a in enumerate(chosen) for b in chosen[:i])
        if pairs == (split == "combos") or split == "uniform":
            return [NOUNS[i] for i in rng.permutation(chosen)]


def counterfactual(nouns: list[str], rng: np.random.Generator) -> list[str]:
    """The same with one noun, any, replaced by another, any that may stand there in training."""
    while True:
        chosen = [NOUNS.index(noun) for noun in nouns]
        spot, other = (int(rng.integers(n)) for n in (len(chosen), len(NOUNS)))
        if other in chosen:
            continue
        chosen[spot] = other
        if not any(held_out_pair(a, b) for i, a in enumerate(chosen) for b in chosen[:i]):
            return [NOUNS[i] for i in chosen]


def _sample(rng: np.random.Generator, n: int, *, biased: bool) -> list[int]:
    if not biased:
        return [int(i) for i in rng.choice(len(NOUNS), n, replace=False)]
    chosen = [int(rng.choice(len(NOUNS), p=_FREQUENCY / _FREQUENCY.sum()))]
    while len(chosen) < n:
        weight = _FREQUENCY.copy()
        if rng.random() < _SAME_THEME:
            weight[_THEME_OF[chosen[0]] != _THEME_OF] = 0
        weight[chosen] = 0
        if weight.any():
            chosen.append(int(rng.choice(len(NOUNS), p=weight / weight.sum())))
    return chosen


@cache
def co_occurrence() -> np.ndarray:
    """[nouns nouns] how often two nouns share a training picture, by simulation (fixed seed);
    the diagonal holds how often a noun appears."""
    rng = np.random.default_rng(20251121)
    together = np.zeros((len(NOUNS), len(NOUNS)))
    for _ in range(4000):
        present = [NOUNS.index(noun) for noun in sample_nouns(rng, "train")]
        together[np.ix_(present, present)] += 1
    return together


def absent_nouns(present: list[str]) -> list[str]:
    """The nouns that a picture could hold and does not: held-out ones for a picture of those,
    else training nouns. So no noun tells by itself whether it is there."""
    pool = NOUNS if present[0] in NOUNS else ALL_NOUNS[len(NOUNS) :]
    return [noun for noun in pool if noun not in present]


def popular_absent(present: list[str], n: int = 8) -> list[str]:
    """The `n` most frequent training nouns that are not in the picture."""
    frequency = np.diag(co_occurrence())
    order = [NOUNS[i] for i in np.argsort(-frequency, kind="stable")]
    return [noun for noun in order if noun not in present][:n]


def likely_absent(present: list[str]) -> list[str]:
    """Absent training nouns, those that most often come with the present ones first."""
    score = co_occurrence()[[NOUNS.index(noun) for noun in present]].sum(axis=0)
    order = [NOUNS[i] for i in np.argsort(-score, kind="stable")]
    return [noun for noun in order if noun not in present]
