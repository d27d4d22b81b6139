"""What can be said about an embedded picture beyond `scene_texts`, for a model to talk with.

The ``rich`` texts of a scenes folder: questions in many wordings and conversations of several
turns with short answers (kinds ``describe``, ``ask``, ``ask_hard``, ``dialogue``), and the same
matters in whole sentences (kinds ``sentence_...``), as a pretrained language model says them.
"""

from collections.abc import Sequence

import numpy as np

from .nouns import absent_nouns, likely_absent, with_article
from .painting import Scene
from .scene_texts import NUMBERS, Exchange, Writer, caption, corner, ranked

#: How a caption is asked for; the first ones as `scene_texts` and the benchmarks ask.
DESCRIBE = (
    "Describe the image.",
    "Please describe this image in detail.",
    "Describe this image.",
    "Provide a brief description of the given image.",
    "What is in the picture?",
    "What do you see?",
    "What can you see in the image?",
    "List all objects.",
    "Which objects are there?",
    "Describe the picture.",
)
#: How to ask for an object with its article.
ASK = (
    "Is there {} in the image?",
    "Is there {}?",
    "Is there {} in the picture?",
    "Do you see {}?",
    "Can you see {} in the image?",
    "Does the image show {}?",
    "Is there {} in the image? Answer with yes or no.",
    "Is there {} in the image?\nAnswer the question using a single word or phrase.",
    "Look closely: is there {}?",
)
#: Those that a whole sentence answers.
_SENTENCE_ASK = ASK[:6]
COUNT = ("How many objects are there?", "How many things do you see?", "Count the objects.")
SIZE = ("Is the {} big or small?", "What size is the {}?", "How big is the {}?")
PLACE = ("Where is the {}?", "Where in the image is the {}?", "In which corner is the {}?")
#: About the object of the turn before.
_IT = {"size": ("Is it big or small?", "How big is it?"), "place": ("Where is it?", "And where?")}
_OTHER = ("And {}?", "What about {}?", "Is there also {}?")
#: The most of its kind a picture brings.
_DESCRIBED, _ASKED, _DIALOGUES = 3, 8, 3


def rich_records(scene: Scene, stem: str, image: str, rng: np.random.Generator) -> list[dict]:
    """The rich texts of one picture, to follow those of `scene_texts.scene_records`."""
    teller = _Teller(Writer(scene, f"{stem}-r", image, rng), rng)
    teller.describe()
    teller.ask()
    for _ in range(_DIALOGUES):
        teller.dialogue()
    teller.sentences()
    return teller.writer.records


class _Teller:
    def __init__(self, writer: Writer, rng: np.random.Generator) -> None:
        self.writer, self.scene, self.rng = writer, writer.scene, rng
        self.nouns, self.order = list(self.scene.nouns), self.scene.left_to_right()
        self.absent = absent_nouns(self.nouns)
        self.likely = ranked(likely_absent, self.nouns, rng)

    def _pick(self, wordings: Sequence[str]) -> str:
        return wordings[int(self.rng.integers(len(wordings)))]

    def _coin(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def _missing(self, *, hard: bool) -> str:
        """An absent noun, a likely one if `hard`."""
        pool = self.likely[:4] if hard else self.absent
        return pool[int(self.rng.integers(len(pool)))]

    # --- short answers ---

    def _caption(self) -> str:
        return caption([self.nouns[i] for i in self.order])

    def describe(self) -> None:
        for n in self.rng.choice(len(DESCRIBE), _DESCRIBED, replace=False):
            self.writer.talk("describe", Exchange(DESCRIBE[n], self._caption(), said=self.order))

    def ask(self) -> None:
        """As many present as absent nouns of each kind."""
        for n in range(_ASKED):
            present = int(self.rng.integers(len(self.nouns)))
            self.writer.talk("ask", self._asked(present, ASK))
            missing = self._missing(hard=False)
            self.writer.talk("ask", self._asked(missing, ASK))
            if n < 3:
                self.writer.talk("ask_hard", self._asked(present, ASK))
                self.writer.talk("ask_hard", self._asked(self.likely[n], ASK))

    def _asked(self, noun: int | str, wordings: Sequence[str]) -> Exchange:
        """Is an object (its number), or an absent noun, there?"""
        if isinstance(noun, str):
            return Exchange(self._pick(wordings).format(with_article(noun)), "No")
        question = self._pick(wordings).format(with_article(self.nouns[noun]))
        return Exchange(question, "Yes", asked=[noun])

    def dialogue(self) -> None:
        """Two to four questions, some of which only the ones before explain."""
        turns: list[Exchange] = []
        wanted, about = int(self.rng.integers(2, 5)), -1
        while len(turns) < wanted:
            follow = about >= 0 and self.rng.random() < 0.45
            kind = self._pick(("describe", "there", "there", "missing", "size", "place", "count"))
            if kind == "describe" and not turns:
                turns.append(Exchange(self._pick(DESCRIBE), self._caption(), said=self.order))
            elif kind in ("there", "missing"):
                asked_before = bool(turns) and turns[-1].answer in ("Yes", "No")
                wordings = _OTHER if asked_before and self._coin() else ASK
                here = kind == "there"
                noun = int(self.rng.integers(len(self.nouns))) if here else None
                about = -1 if noun is None else noun
                missing = self._missing(hard=self._coin())
                turns.append(self._asked(missing if noun is None else noun, wordings))
            elif kind in ("size", "place"):
                index = about if follow else int(self.rng.integers(len(self.nouns)))
                place = corner(self.scene, index)
                answer = self.scene.sizes[index].capitalize() if kind == "size" else place
                if answer is None:
                    continue
                if follow:
                    turns.append(Exchange(self._pick(_IT[kind]), answer))
                else:
                    wordings = SIZE if kind == "size" else PLACE
                    question = self._pick(wordings).format(self.nouns[index])
                    turns.append(Exchange(question, answer, asked=[index]))
                about = index
            elif kind == "count":
                turns.append(Exchange(self._pick(COUNT), NUMBERS[len(self.nouns) - 1]))
                about = -1
        self.writer.talk("dialogue", *turns)

    # --- whole sentences ---

    def sentences(self) -> None:
        talk, nouns = self.writer.talk, self.nouns
        listed = caption([nouns[i] for i in self.order])
        listed = f"{listed[0].lower()}{listed[1:-1]}"
        shown = f"The image shows {listed}."
        talk("sentence_caption", Exchange(self._pick(DESCRIBE), shown, said=self.order))
        for _ in range(6):
            here = int(self.rng.integers(len(nouns)))
            talk("sentence_presence", self._there(here))
            talk("sentence_presence", self._there(self._missing(hard=False)))
        for n in range(3):
            talk("sentence_hard", self._there(int(self.rng.integers(len(nouns)))))
            talk("sentence_hard", self._there(self.likely[n]))
        for i in map(int, self.rng.permutation(len(nouns))[:2]):
            answer = f"The {nouns[i]} is {self.scene.sizes[i]}."
            question = self._pick(SIZE).format(nouns[i])
            talk("sentence_attribute", Exchange(question, answer, asked=[i], said=[i]))
            place = corner(self.scene, i)
            if place:
                answer = f"The {nouns[i]} is at the {place.lower()}."
                question = self._pick(PLACE).format(nouns[i])
                talk("sentence_position", Exchange(question, answer, asked=[i], said=[i]))
        number = NUMBERS[len(nouns) - 1].lower()
        verb, plural = ("is", "") if len(nouns) == 1 else ("are", "s")
        counted = f"There {verb} {number} object{plural} in the image."
        talk("sentence_count", Exchange(self._pick(COUNT), counted))

    def _there(self, noun: int | str) -> Exchange:
        if isinstance(noun, str):
            question = self._pick(_SENTENCE_ASK).format(with_article(noun))
            return Exchange(question, f"No, there is no {noun} in the image.")
        question = self._pick(_SENTENCE_ASK).format(with_article(self.nouns[noun]))
        answer = f"Yes, there is {with_article(self.nouns[noun])} in the image."
        return Exchange(question, answer, asked=[noun], said=[noun])
