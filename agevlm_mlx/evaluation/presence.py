"""Is it in the picture? A picture asked about some words, and how well a sentence fits it.

Each number has its control beside it: the same question without a picture, the same sentence
without one and with other pictures. A number that its control has too is habit, not sight.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.image import Geometry, ImageSource, load_image
from ..data.noun_vocabulary import NounVocabulary
from ..data.nouns import NOUNS
from ..data.painting import make_scene
from ..data.records import CAPTION_PROMPT
from ..data.scene_texts import caption, presence_question
from ..errors import UserError
from ..weights import Loaded
from .asking import Asker
from .grounding import grounding_score
from .words import content_words

#: Words of one text that are asked for; more are left out.
MOST_WORDS = 24
#: Characters: of a word or phrase that a question holds, and of a whole text.
LONGEST_WORD, LONGEST_TEXT = 40, 500
#: Content words of a phrase; what is longer is taken apart.
_PHRASE = 3
#: Words asked for in one pass.
_AT_ONCE = 8
#: Other pictures painted, and how many of them a sentence is compared on.
_PAINTED, CONTROLS = 12, 8


@dataclass(frozen=True)
class Wanted:
    """What a person's text asks for: words (or phrases), a sentence, and how many more words
    there were than are asked for."""

    words: tuple[str, ...]
    sentence: str
    left_out: int = 0


@dataclass(frozen=True, eq=False)
class Presence:
    """One word and one picture.

    p_yes: of `question`, 0..1; blind: the same without a picture. look: f32[Gh Gw], where the
    word looked, the mean over its tokens, the looking layers and the heads.
    """

    word: str
    question: str
    p_yes: float
    blind: float
    look: np.ndarray
    geometry: Geometry

    @property
    def grounding(self) -> float:
        """How definite that look was, 0..1; see `grounding_score`."""
        return grounding_score(self.look)


@dataclass(frozen=True)
class Match:
    """How likely a sentence is as the description of a picture: nats per token (<= 0).

    log_p: with the picture; blind: without one; shuffled: with each control picture.
    """

    sentence: str
    log_p: float
    blind: float
    shuffled: tuple[float, ...]

    @property
    def over_blind(self) -> float:
        """What the picture adds: pointwise mutual information per token, in nats."""
        return self.log_p - self.blind

    @property
    def over_shuffled(self) -> float:
        """What it adds over the mean of the control pictures."""
        return self.log_p - sum(self.shuffled) / len(self.shuffled)

    @property
    def beaten(self) -> int:
        """Control pictures that the sentence fits worse; a tie is not beaten."""
        return sum(self.log_p > other for other in self.shuffled)

    @property
    def rank(self) -> int:
        """1 when the sentence fits no control picture as well."""
        return 1 + len(self.shuffled) - self.beaten


@dataclass(frozen=True)
class Examined:
    """How far `examine` is: the rows so far, and at the end the match of the sentence."""

    wanted: Wanted
    rows: tuple[Presence, ...] = ()
    match: Match | None = None


def wanted(text: str) -> Wanted:
    """Read words or a sentence.

    Commas, semicolons and line ends part words and phrases of up to three words ("dog, red car;
    house"), which are kept, and a list's sentence is the caption that names them. Of any other
    part the content words are taken. Each is asked for once, in lower case, the first
    `MOST_WORDS` of them. ``UserError`` for a text that names nothing, is too long or no text.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError("text: expected text, got bytes that are not UTF-8")
    if len(text) > LONGEST_TEXT:
        raise UserError(
            f"text: expected at most {LONGEST_TEXT} characters, got {len(text)}; ask in parts"
        )
    words: list[str] = []
    all_listed = True
    for part in re.split(r"[,;\n]", text):
        found = [word for word, _, _ in content_words(part)]
        bare = re.sub(r"^(an?|the)\s", "", part.strip(), flags=re.IGNORECASE)
        if found and len(found) <= _PHRASE and bare.split() == found:
            words.append(" ".join(found))
        else:
            words += found
            all_listed &= not part.strip()
    words = list(dict.fromkeys(word.lower() for word in words))
    if not words:
        got = " ".join(text.split())
        raise UserError(
            'text: expected words for things that can be seen, as "dog, red car", got '
            + (repr(got) if got else "nothing")
        )
    kept = words[:MOST_WORDS]
    for word in kept:
        _check(word)
    sentence = caption(kept) if all_listed else " ".join(text.split())
    return Wanted(tuple(kept), sentence, len(words) - len(kept))


def _check(word: str) -> None:
    """``UserError`` for what "Is there a ...?" cannot hold, or could not be found in again."""
    if len(word) > LONGEST_WORD:
        raise UserError(
            f"word: expected at most {LONGEST_WORD} characters, got {len(word)}: {word[:16]!r} ..."
        )
    if word != " ".join(word.split()) or not any(content_words(word)):
        raise UserError(f"word: expected a word for something that can be seen, got {word!r}")


def ask_about(asker: Asker, words: Sequence[str]) -> list[Presence]:
    """Is each of the words in the first picture of `asker`? All of them in one pass.

    P(yes) is the softmax over two tokens alone, the first of "Yes" and the first of "No", after
    "Is there a dog?"; what else the model might say does not count. ``UserError`` for words that
    the question cannot hold.
    """
    for word in words:
        _check(word)
    if not words:
        return []
    questions = [presence_question(word, False) for word in words]
    (seen,) = asker.margins([[asker.prompt(question) for question in questions]])
    blind = asker.blind_margins(questions)
    (maps,) = asker.phrase_maps([list(zip(questions, words, strict=True))])
    return [
        Presence(
            word=word,
            question=question,
            p_yes=_p_yes(margin),
            blind=_p_yes(blind[question]),
            look=look.mean((0, 1)).reshape(asker.model.grid),
            geometry=asker.geometries[0],
        )
        for word, question, margin, look in zip(words, questions, seen, maps, strict=True)
    ]


def _p_yes(margin: float) -> float:
    """The softmax over the logits of Yes and No, from their difference."""
    return 0.5 * (1 + math.tanh(margin / 2))  # never overflows


class Controls:
    """Painted scenes that a sentence is compared on: the same ones for every sentence and model.

    They are encoded once for a model; keep them for as long as it is in use.
    """

    def __init__(self, loaded: Loaded) -> None:
        scenes = [make_scene(7, "uniform", number) for number in range(_PAINTED)]
        images = [Image.fromarray(scene.image) for scene in scenes]
        self.asker = Asker(loaded, images, load_image, batch_size=CONTROLS // 2)
        self._nouns = [set(scene.nouns) for scene in scenes]

    def unlike(self, sentence: str) -> np.ndarray:
        """The numbers i[CONTROLS] of the scenes that show the fewest nouns of the sentence:
        with one that it fits, a match would be compared with a match."""
        said = set(NounVocabulary(NOUNS).mentions(sentence))
        shared = np.array([len(nouns & said) for nouns in self._nouns])
        return np.sort(np.argsort(shared, kind="stable")[:CONTROLS])


def match(asker: Asker, controls: Controls, sentence: str) -> Match:
    """How well a sentence fits the first picture of `asker`: the mean log-probability of its
    tokens, and of the one that ends it, as an answer to "Describe the image.".

    ``UserError`` for an empty sentence.
    """
    if not sentence.strip():
        raise UserError("sentence: expected one to compare with the picture, got nothing")
    others = controls.unlike(sentence)
    shuffled = controls.asker.log_likelihood(CAPTION_PROMPT, [[sentence]] * len(others), others)
    return Match(
        sentence=sentence,
        log_p=asker.log_likelihood(CAPTION_PROMPT, [[sentence]])[0][0],
        blind=float(asker.blind_log_likelihood(CAPTION_PROMPT, [sentence])[0]),
        shuffled=tuple(row[0] for row in shuffled),
    )


def examine(
    loaded: Loaded, image: ImageSource, text: str, controls: Controls
) -> Iterator[Examined]:
    """All of it, as it comes: first nothing but what is wanted, then some rows more each time,
    and last the match. Closing the iterator stops it.

    ``UserError``, before anything is yielded, for text or an image that cannot be used, and for
    a tokenizer in which Yes and No begin with the same token.
    """
    asked = wanted(text)
    asker = Asker(loaded, [image], load_image)
    rows: tuple[Presence, ...] = ()
    yield Examined(asked)
    for start in range(0, len(asked.words), _AT_ONCE):
        rows += tuple(ask_about(asker, asked.words[start : start + _AT_ONCE]))
        yield Examined(asked, rows)
    yield Examined(asked, rows, match(asker, controls, asked.sentence))
