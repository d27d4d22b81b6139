"""Hallucination at a chosen recall.

Two models that name different amounts cannot be compared by CHAIR_i alone: whoever says less errs
less. So the mentions of all captions are put in the order of the model's own confidence, and the
least sure ones are taken back until as much is recalled as is asked for. Confidence is either the
noun's probability where it was said, or the model's answer when it is asked for the noun.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .metrics import Weights


@dataclass(frozen=True)
class Mention:
    """A noun that a caption names.

    caption: its number. sure: the model's confidence, in nats: the log-probability of the noun's
    first token where it was said, or log P(yes) - log P(no) of the answer when asked for it.
    right: what it names is there. new: and this caption has not named it before.
    """

    caption: int
    sure: float
    right: bool
    new: bool


def mentions(
    said: Sequence[Sequence[str]],
    sure: Sequence[Sequence[float]],
    present: Sequence[Sequence[str]],
) -> list[Mention]:
    """Those of all captions: the nouns of each in order, how sure they were, what is there."""
    found = []
    for caption, (nouns, values, there) in enumerate(zip(said, sure, present, strict=True)):
        for n, (noun, value) in enumerate(zip(nouns, values, strict=True)):
            right = noun in there
            found.append(Mention(caption, value, right, right and noun not in nouns[:n]))
    return found


def chair_at_recall(
    found: Sequence[Mention], present: Sequence[int], recall: float, draws: Weights
) -> np.ndarray:
    """CHAIR_i f64[boots] of the surest mentions, as many as name a share `recall` of what is there.

    present: objects of each caption's picture. draws: f64[boots captions], how often each caption
    counts. nan where all mentions together recall less.
    """
    surest = sorted(found, key=lambda mention: -mention.sure)
    if not surest:
        return np.full(len(draws), np.nan)
    caption = np.array([mention.caption for mention in surest])
    right = np.array([mention.right for mention in surest], float)
    new = np.array([mention.new for mention in surest], float)
    out = []
    for part in np.array_split(draws, -(-len(draws) // 100)):  # thousands of mentions
        counted = part[:, caption]
        total = np.maximum(part @ np.asarray(present, float), 1e-9)
        enough = np.cumsum(counted * new, axis=1) >= (recall - 1e-9) * total[:, None]
        last = enough.argmax(axis=1)[:, None]
        said = np.take_along_axis(np.cumsum(counted, axis=1), last, 1)[:, 0]
        wrong = np.take_along_axis(np.cumsum(counted * (1 - right), axis=1), last, 1)[:, 0]
        out.append(np.where(enough.any(axis=1), wrong / np.maximum(said, 1e-9), np.nan))
    return np.concatenate(out)
