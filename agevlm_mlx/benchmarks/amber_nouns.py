"""The nouns of AMBER: which words of a description are objects, and which the picture shows.

AMBER-compatible: the authors' script finds nouns with NLTK and compares them with spaCy's vectors.
This module does without both, and differs in this:

- Nouns there are what NLTK tags as nouns, brought to the singular by WordNet. Here every word of
  the vocabulary counts as one, by its spelling in lower case: a verb as well (they "ski"). What is
  seldom a noun (`_SELDOM_NOUNS`) counts only after a determiner, as in "a can".
- Capitalised words are found here and not there, and so are annotations that are plurals
  themselves ("slippers", of which WordNet makes "slipper", which no list holds).
- There a noun that is no word of the picture's lists is still taken for one if the cosine of their
  vectors (en_core_web_lg) is above .8. Here only relation.json says what means the same, which
  makes CHAIR and Hal higher than theirs, Cover and Cog lower.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..config import read_json
from ..data.noun_vocabulary import NounVocabulary
from ..errors import UserError
from ..evaluation.source import Source

#: Nouns of AMBER's vocabulary that descriptions use as verbs ("can be seen", "people watch").
_SELDOM_NOUNS = ("can", "drink", "leave", "note", "support", "watch")
_DETERMINERS = ("a", "the", "his", "her", "their")
_NO_NOUN = "hot"  # in relation.json; of a hot dog the noun is the dog


@cache
def vocabulary(nouns: Sequence[str]) -> NounVocabulary:
    """What finds `nouns` (a tuple) in a description; see the module's docstring."""
    spellings = {f"{word} {n}": n for n in _SELDOM_NOUNS if n in nouns for word in _DETERMINERS}
    spellings |= {form: form[:-1] for form in ("cans", "leaves") if form[:-1] in nouns}
    return NounVocabulary(set(nouns) - {*_SELDOM_NOUNS, _NO_NOUN}, spellings)


@dataclass(frozen=True)
class Nouns:
    """What a description is judged by.

    known: the nouns that AMBER knows. relation: a noun to the words that may be said for it.
    safe: words that are never wrong.
    """

    known: Sequence[str]
    relation: Mapping[str, Sequence[str]]
    safe: Sequence[str]

    def about(self, truth: Sequence[str], hallu: Sequence[str]) -> dict[str, Any]:
        """All that `judge` needs for one picture, as JSON."""
        objects = (*truth, *hallu)
        return {
            "truth": truth,
            "hallu": hallu,
            "relation": {noun: self.relation.get(noun, []) for noun in objects},
            "safe": self.safe,
            "known": self.known,
        }


def read_nouns(source: Source, relation: Path, safe: Path, annotated: Collection[str]) -> Nouns:
    """The nouns of relation.json and safe_words.txt, and those `annotated`."""
    related = read_json(relation)
    if not isinstance(related, dict) or not all(map(is_words, (list(related), *related.values()))):
        raise UserError(f"{relation}: expected an object of lists of words; copy it from AMBER")
    known = {*annotated, *related, *(word for words in related.values() for word in words)}
    return Nouns(sorted(known), related, [line.strip() for _, line in source.lines(safe)])


def judge(said: str, about: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Nouns of a description, those that the picture does not show, and how many of ``truth`` and
    of ``hallu`` are named. about: of `Nouns.about`."""
    shown, expected = _places(about, "truth"), _places(about, "hallu")
    nouns = vocabulary(tuple(about["known"])).mentions(said)
    judged = [noun for noun in nouns if noun not in about["safe"]]
    wrong = [noun for noun in judged if noun not in shown]
    return (
        len(nouns),
        len(wrong),
        len({shown[noun] for noun in judged if noun in shown}),
        len({expected[noun] for noun in wrong if noun in expected}),
    )


def _places(about: Mapping[str, Any], name: str) -> dict[str, int]:
    """Every word that names one of the objects, and the number of the object that it names: the
    first, the words of relation.json before the objects themselves."""
    places: dict[str, int] = {}
    for number, noun in enumerate(about[name]):
        for word in about["relation"][noun]:
            places.setdefault(word, number)
    for number, noun in enumerate(about[name]):
        places.setdefault(noun, number)
    return places


def is_words(value: Any) -> bool:
    """Is this a list of words, each with a letter at least?"""
    return isinstance(value, list) and all(
        isinstance(word, str) and any(map(str.isalnum, word)) for word in value
    )
