"""Known nouns found in free text, with the plain rules of English plurals."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


class NounVocabulary:
    """Finds known nouns in free text: lower case, punctuation ignored, the longest noun first.

    A noun may have several words ("traffic light" is not also a "light"). Plurals are found by
    the simple English rules (-s, -es, -y to -ies, -f to -ves) and for the irregular nouns of
    `_IRREGULAR` ("women", "mice"); a verb or adjective of the same spelling is not told apart.
    """

    def __init__(
        self,
        nouns: Collection[str],
        synonyms: Mapping[str, str] | None = None,
        *,
        hyphens: bool = False,
    ) -> None:
        """`synonyms` maps further spellings to one of `nouns`. hyphens: "hot-dog" is "hot dog"
        too; as a word of its own ("dog-house" is no "dog"), as it is in either case."""
        self._hyphens = hyphens
        spellings = {noun: noun for noun in nouns} | dict(synonyms or {})
        said = {self._form(_words(spelling)): noun for spelling, noun in spellings.items()}
        said.pop((), None)  # a spelling without letters
        self._nouns = {form: noun for words, noun in said.items() for form in _with_plural(words)}
        # A plural rule may collide with a real noun (glass, glasses): the real one wins.
        self._nouns |= said
        #: First word -> words of the longest noun that begins with it.
        self._longest: dict[str, int] = {}
        for form in self._nouns:
            self._longest[form[0]] = max(len(form), self._longest.get(form[0], 0))

    def mentions(self, text: str) -> list[str]:
        """The nouns of `text` in order, a repeated one each time it is said."""
        return [noun for noun, _, _ in self.find(text)]

    def find(self, text: str) -> Iterator[tuple[str, int, int]]:
        """(noun, start, end) of its mentions in order, the span without a possessive 's."""
        words, at = list(_spans(text)), 0
        said = [word for word, _, _ in words]
        while at < len(words):
            longest = self._longest.get(self._form(said[at : at + 1])[0], 0)
            for length in range(min(longest, len(words) - at), 0, -1):
                noun = self._nouns.get(self._form(said[at : at + length]))
                if noun is not None:
                    yield noun, words[at][1], words[at + length - 1][2]
                    at += length
                    break
            else:
                at += 1

    def _form(self, words: Sequence[str]) -> tuple[str, ...]:
        """The words as they are looked up."""
        return tuple(" ".join(words).replace("-", " ").split()) if self._hyphens else tuple(words)


def _words(text: str) -> list[str]:
    return [word for word, _, _ in _spans(text)]


def _spans(text: str) -> Iterator[tuple[str, int, int]]:
    """(word in lower case, start, end), without a possessive 's."""
    for match in _WORD.finditer(text):
        word = match[0]
        if word[-2:-1] in ("'", "\u2019") and word[-1] in "sS":
            word = word[:-2]
        yield word.lower(), match.start(), match.start() + len(word)


#: Ends of nouns and of their plurals: "man" is also the end of "policewoman".
_IRREGULAR = {
    "man": "men",
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "tooth": "teeth",
    "foot": "feet",
    "ox": "oxen",
    "bus": "busses",
}


def _with_plural(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """A noun's forms. One that nobody says ("humen", "mans") does no harm among them."""
    *head, last = words
    if re.search(r"(s|x|z|ch|sh)$", last):
        plurals = {last + "es"}
    elif re.search(r"[^aeiou]y$", last):
        plurals = {last[:-1] + "ies"}
    elif last.endswith("o"):
        plurals = {last + "s", last + "es"}
    else:
        plurals = {last + "s"}
    if re.search(r"fe?$", last):
        plurals.add(re.sub(r"fe?$", "ves", last))
    plurals |= {last.removesuffix(e) + p for e, p in _IRREGULAR.items() if last.endswith(e)}
    return {words, *((*head, plural) for plural in plurals)}
