"""How sure a model was of each noun of its captions, and hallucination at a chosen recall.

Two models that name different amounts cannot be compared by CHAIR_i alone: whoever says less errs
less. So the mentions of all captions are put in the order of the model's own confidence, and the
least sure ones are taken back until as much is recalled as is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data import chat
from ..data.noun_vocabulary import NounVocabulary
from ..data.records import Phrase, Turn
from .asking import Asker
from .metrics import Weights


@dataclass(frozen=True)
class Mention:
    """A noun that a caption names.

    image: the number of its picture. log_p: of the noun's first token where it was said, in nats.
    right: it is there; new: and the caption has not named it before.
    """

    image: int
    noun: str
    log_p: float
    right: bool
    new: bool


def find(
    asker: Asker,
    prompt: str,
    captions: Sequence[str],
    objects: Sequence[Sequence[str]],
    nouns: NounVocabulary,
) -> list[Mention]:
    """The mentions of one caption for each of the `asker`'s images, in order; `objects` are there.

    Each caption is read again with its picture, which gives the probabilities it was said with.
    """
    phrases = [[Phrase(text[a:b], 1, a, b) for _, a, b in nouns.find(text)] for text in captions]
    log_p = asker.token_log_p(prompt, captions)
    found = []
    for image, (text, spans, values) in enumerate(zip(captions, phrases, log_p, strict=True)):
        turns = (Turn("user", prompt), Turn("assistant", text))
        # A span begins with the position before the noun, which predicts its first token.
        chosen = [span[0] for span in chat.encode(asker.tokenizer, turns, spans).spans]
        said: set[str] = set()
        for (noun, _, _), at in zip(nouns.find(text), chosen, strict=True):
            right = noun in objects[image]
            found.append(Mention(image, noun, float(values[at]), right, right and noun not in said))
            said.add(noun)
    return found


def chair_at_recall(
    mentions: Sequence[Mention], present: Sequence[int], recall: float, draws: Weights | None = None
) -> np.ndarray:
    """CHAIR_i when the surest mentions are kept until `recall` of the objects are named.

    present: objects of each image. With `draws` f64[boots images] (how often each image counts)
    f64[boots], else f64[1]; nan where all mentions together recall less.
    """
    if draws is None:
        draws = np.ones((1, len(present)))
    surest = sorted(mentions, key=lambda m: -m.log_p)
    image = np.array([m.image for m in surest], int)
    right, new = (np.array([getattr(m, k) for m in surest], float) for k in ("right", "new"))
    if not len(surest):
        return np.full(len(draws), np.nan)
    out = []
    for part in np.array_split(draws, max(len(draws) // 100, 1)):
        counted = part[:, image]
        total = part @ np.asarray(present, float)
        recalled = np.cumsum(counted * new, axis=1) / np.maximum(total, 1e-9)[:, None]
        enough = recalled >= recall - 1e-12
        at = enough.argmax(axis=1)[:, None]
        said = np.take_along_axis(np.cumsum(counted, axis=1), at, 1)[:, 0]
        wrong = np.take_along_axis(np.cumsum(counted * (1 - right), axis=1), at, 1)[:, 0]
        out.append(np.where(enough.any(axis=1), wrong / np.maximum(said, 1e-9), np.nan))
    return np.concatenate(out)
