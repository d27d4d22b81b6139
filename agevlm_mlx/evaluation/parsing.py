"""Answers in words as yes, no or an option: each rule named, with what it mistakes.

POPE's own rule is `metrics.parse_yes_no`. No rule calls a model. "" is an answer that means no
option, and is wrong. The published rules for letters all take words for letters, so `option` is
ours:

=====================  ===============================  =======================================
published rule         reads                            mistakes
=====================  ===============================  =======================================
Cambrian (CV-Bench)    first character, after the last  "the cat" as T, "a bed" as A
                       "answer is"
lmms-eval (CV-Bench)   first letter                     "The answer is B" as T, "a bed" as A
lmms-eval (MMVP)       patterns; last, a letter that    "the sofa" as A, "A or B" as A
                       ends a word
lmms-eval              marks by rank; last, any         "USA" as A, "A or B" as A; "b" as none
(RealWorldQA)          capital
VLMEvalKit             the only capital that stands     "A bed" as A, "not B" as B; "b" as none
                       alone, or an option's words
=====================  ===============================  =======================================

`option` agrees with all of them on "B", "B.", "(B)" and "B. left", with most on "The answer is B",
and with VLMEvalKit and Cambrian's MMVP on an option's own words.
"""

import re
from collections.abc import Mapping

from .benchmark import Item

#: A letter that stands alone, in brackets or not: no part of a word, an initial or "e.g.".
_LETTER = re.compile(
    r"(?<![\w.-])(?<!\w['\u2019])(?:\(([A-Za-z])\)|([A-Za-z])(?![\w-]|['\u2019.]\w))"
)
#: What a model says before its answer.
_ANNOUNCED = re.compile(r"answer(?:\s+is\b|\s*:)(?:\s*:)?", re.IGNORECASE)
#: Said before a letter, these mean it as one; "not" means another.
_NAMED = re.compile(r"\b(option|choice|answer|is)\W*$", re.IGNORECASE)
_NOT = re.compile(r"(\bnot|n['\u2019]t)\W*$", re.IGNORECASE)
#: After "A", what makes it the article.
_WORD = re.compile(r"[ \t]+(?!(or|and|is|because)\b)\w")


def chosen(item: Item, said: str) -> str:
    """The letter of an item's choices (`Item.about`) that an answer names; see `option`."""
    return option(said, item.about["choices"])


def option(said: str, options: Mapping[str, str]) -> str:
    """The option that an answer names: a key of `options`, or "".

    options: letter to the option's own words ("" where they are unknown), as {"A": "left"}.
    The whole answer may be one option's words. Otherwise it must name one letter and no other,
    after the last "answer is" if that is said. A letter counts in brackets, before ``.``, ``)`` or
    ``:``, as a capital, alone, and before its own option's words. "A" before another word is the
    article, other small letters are words, and a letter after "not" is not meant.
    """
    said = said.replace("*", "").strip()
    whole = [letter for letter, words in options.items() if words and plain(words) == plain(said)]
    if len(whole) == 1 and not re.fullmatch("[a-z]", plain(said)):
        return whole[0]
    announced = list(_ANNOUNCED.finditer(said))
    after = _letters(said[announced[-1].end() :], options) if announced else set()
    found = after or _letters(said, options)
    return found.pop() if len(found) == 1 else ""


def _letters(said: str, options: Mapping[str, str]) -> set[str]:
    """The options that are named by their letters."""
    keys = {key.upper(): key for key in options}
    found = set()
    for match in _LETTER.finditer(said):
        letter = match[1] or match[2]
        key, before, after = keys.get(letter.upper()), said[: match.start()], said[match.end() :]
        if key is None or _NOT.search(before):
            continue
        words = plain(options[key])
        if (
            match[1]  # in brackets
            or re.match(r"[.):](\s|$)", after)
            or (words and not before.strip() and plain(after) == words)
            or (letter.isupper() and not _is_article(letter, before, after))
            or (not re.search(r"\w", after) and (_NAMED.search(before) or not before.strip()))
        ):
            found.add(key)
    return found


def _is_article(letter: str, before: str, after: str) -> bool:
    """Is this capital "A", or the pronoun "I", a word?"""
    named = re.search(r"\b(option|choice|answer)\W*$", before, re.IGNORECASE)
    return letter in "AI" and not named and _WORD.match(after) is not None


def plain(words: str) -> str:
    """Lower case, without space and full stops around."""
    return words.strip().rstrip(".").strip().lower()


def same_words(said: str, answer: str) -> bool:
    """Is a short answer right? lmms-eval's rule for RealWorldQA: equal in lower case, without
    space around and full stops behind. Digits and numerals differ: "two" is not "2"."""
    return said.lower().strip().rstrip(".") == answer.strip().lower()


def yes_no_words(said: str) -> str:
    """VLMEvalKit's rule: "yes" or "no" if exactly one of them is among the words, else "".

    In lower case and without punctuation. "not" is no "no": "It is not" means neither.
    """
    words = set(re.sub(r"[^\w\s'\u2019]", " ", said.lower()).split())
    return next(iter(words & {"yes", "no"})) if len(words & {"yes", "no"}) == 1 else ""


def yes_no_start(said: str) -> str:
    """MME's own rule: "yes" or "no" if the first four characters hold it, "yes" first, else "".

    In lower case and without full stops; "y" and "n" alone count. It mistakes "Not", "Now" and
    "None" for no, "Eyes" for yes, and finds nothing in "The answer is yes".
    """
    said = said.lower().strip().replace(".", "")
    start = {"y": "yes", "n": "no"}.get(said, said[:4])
    return next((word for word in ("yes", "no") if word in start), "")
