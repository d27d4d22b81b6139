"""Where each word of a question and its answer looked."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import chat
from ..data.records import Phrase, Turn
from .grounding import grounding_score
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
        word = match.group()
        # A single letter names nothing; a single Chinese or Japanese character does.
        if word.lower() not in _STOP and (len(word) > 1 or word > "\u2e7f"):
            yield match.group(), match.start(), match.end()


@dataclass(frozen=True)
class Look:
    """Where one occurrence of one word looked.

    role: whose word it is. start, end: its place in the text of that turn, in characters. names:
    whether it may name something to see. values: f16 [L N M Gh Gw], for each looking layer and
    head the attention on each of M images; what a map lacks to 1 went elsewhere.
    """

    word: str
    role: str
    start: int
    end: int
    names: bool
    values: np.ndarray

    def attention(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """f32 [M Gh Gw] of one looking layer and head, counted from 0; None: the mean over them."""
        values = self.values if layer is None else self.values[layer : layer + 1]
        values = values if head is None else values[:, head : head + 1]
        return values.astype(np.float32).mean((0, 1))

    @property
    def on_image(self) -> float:
        """The share of the attention that went to the images, 0..1."""
        return float(self.attention().sum())

    @property
    def grounding(self) -> float:
        """How definite the look was, 0..1; see `grounding_score`."""
        return grounding_score(self.attention())


def looks(
    model: Any, tokenizer: Any, cache: Sequence[Any], turns: Sequence[Turn], skip: int = 0
) -> list[Look]:
    """A look for every word of the last question and its answer, in the order of reading.

    Arguments and what counts as a word's look: as for `word_maps`, where a word said twice
    has one map; here it has two looks.
    """
    phrases = [*_last_exchange(turns, _words)]
    named = {(phrase.turn, phrase.start) for phrase in _last_exchange(turns, content_words)}
    found = []
    for phrase, rows in _attend(model, tokenizer, cache, turns, phrases, skip):
        L, N = rows.shape[1:3]
        values = rows.mean(0).reshape(L, N, -1, *model.grid).astype(np.float16)
        role, names = turns[phrase.turn].role, (phrase.turn, phrase.start) in named
        found.append(Look(phrase.text, role, phrase.start, phrase.end, names, values))
    return found


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
    words: dict[tuple[str, str], list[np.ndarray]] = {}
    phrases = [*_last_exchange(turns, content_words)]
    for phrase, rows in _attend(model, tokenizer, cache, turns, phrases, skip):
        key = (phrase.text.lower(), turns[phrase.turn].role)
        words.setdefault(key, []).append(rows.mean((1, 2)))
    return [
        WordMap(word, tuple(np.concatenate(found).mean(0).reshape(-1, *model.grid)), role)
        for (word, role), found in words.items()
    ]


def _attend(
    model: Any,
    tokenizer: Any,
    cache: Sequence[Any],
    turns: Sequence[Turn],
    phrases: Sequence[Phrase],
    skip: int,
) -> Iterator[tuple[Phrase, np.ndarray]]:
    """Each phrase that has tokens of its own, and where each of them looks: f32 [n L N S']."""
    encoded = chat.encode(tokenizer, turns, tuple(phrases)) if phrases else None
    if encoded is None:
        return
    prompt = len(chat.prompt_ids(tokenizer, turns[:-1]))
    columns, owned = [], []
    for phrase, span in zip(phrases, encoded.spans, strict=True):
        asked = turns[phrase.turn].role == "user"
        own = [c - skip for c in span if not (asked and c >= prompt - 1) and c >= skip]
        owned.append(len(own))
        columns += own
    if not columns:
        return
    _, maps = model.attend(
        mx.array([encoded.ids[skip:]]),
        cache,
        mx.zeros(len(columns), mx.int32),
        mx.array(columns),
    )
    parts = np.split(np.array(maps, np.float32), np.cumsum(owned)[:-1])
    for phrase, part in zip(phrases, parts, strict=True):
        if len(part):
            yield phrase, part


Words = Iterator[tuple[str, int, int]]


def _last_exchange(turns: Sequence[Turn], words: Callable[[str], Words]) -> Iterator[Phrase]:
    for number in range(max(len(turns) - 2, 0), len(turns)):
        for word, start, end in words(turns[number].text):
            yield Phrase(word, number, start, end)


def _words(text: str) -> Words:
    """Every word and number of `text`: (word, start, end) in characters."""
    for match in re.finditer(r"\w+(?:['\u2019-]\w+)*", text):
        yield match.group(), match.start(), match.end()
