"""Where each word of a question and its answer looked."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import chat
from ..data.records import Phrase, Turn
from .overlay import WordMap

#: Words that name nothing to look at. Everything else gets a map.
_STOP_WORDS = (
    "a about above all also an and any are as at be been being below but by can could "
    "describe did do does down else for from had has have he her here him his how i if image "
    "images in into is it its just many may me might more most much my near no not of off on "
    "one only or other our out over photo photograph picture pictures please see shall she "
    "should show shown shows so some such tell than that the their them then there these they "
    "this those to too under up us very was we were what when where which while who whom "
    "whose why will with would yes you your"
)
_STOP = frozenset(_STOP_WORDS.split())


def content_words(text: str) -> Iterator[tuple[str, int, int]]:
    """The words of `text` that may name something to see: (word, start, end) in characters."""
    for match in re.finditer(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*", text):
        if match.group().lower() not in _STOP and len(match.group()) > 1:
            yield match.group(), match.start(), match.end()


def word_maps(
    model: Any, tokenizer: Any, cache: Sequence[Any], turns: Sequence[Turn], skip: int = 0
) -> list[WordMap]:
    """A map for each content word of the last question and its answer, from one pass over the
    conversation.

    cache: one in which the images are placed and nothing else is read but the first `skip`
    positions of the text (`prompts.begin`). turns: the conversation, with the answer at its end.
    A map is the mean over the looking layers, the heads and the tokens of the word; for a word of
    the answer the token before it counts too, the place where the word was chosen. A word said
    twice gets one map.
    """
    first = max(len(turns) - 2, 0)
    phrases = [phrase for phrase in _phrases(turns) if phrase.turn >= first]
    if not phrases:
        return []
    encoded = chat.encode(tokenizer, turns, tuple(phrases))
    prompt = len(chat.prompt_ids(tokenizer, turns[:-1]))
    columns, owner = [], []
    for n, (phrase, span) in enumerate(zip(phrases, encoded.spans, strict=True)):
        asked = turns[phrase.turn].role == "user"
        own = [c - skip for c in span if not (asked and c >= prompt - 1) and c >= skip]
        columns += own
        owner += [n] * len(own)
    if not columns:
        return []
    _, maps = model.attend(
        mx.array([encoded.ids[skip:]]),
        cache,
        mx.zeros(len(columns), mx.int32),
        mx.array(columns),
    )
    means = np.array(maps.mean((1, 2)), np.float32)
    words: dict[tuple[str, str], list[np.ndarray]] = {}
    for column, n in enumerate(owner):
        key = (phrases[n].text.lower(), turns[phrases[n].turn].role)
        words.setdefault(key, []).append(means[column])
    return [
        WordMap(word, tuple(np.mean(found, 0).reshape(-1, *model.grid)), role)
        for (word, role), found in words.items()
    ]


def _phrases(turns: Sequence[Turn]) -> Iterator[Phrase]:
    for number, turn in enumerate(turns):
        for word, start, end in content_words(turn.text):
            yield Phrase(word, number, start, end)
