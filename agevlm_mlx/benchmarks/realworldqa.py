"""RealWorldQA (xAI, 2024): 765 questions about photographs, many from cars, with easily checked
answers.

``accuracy``, the headline: answers right / questions. Of these, ``letters``: questions that list
options and want a letter, read by `parsing.option`; ``words``: questions that want a word or a
number, right when equal (`parsing.same_words`, as in lmms-eval); ``unclear``: answers to the first
that name no option. Logits and the constant and majority controls answer letters alone, and have
no ``accuracy``. Guessing a letter gets 1 / options, mostly 2 to 4 of them.

Asked: the file's own question, with the options and the instruction that it ends with. The
photographs are large and some answers small: results depend on the resolution that a model sees.
"""

import re
from collections.abc import Sequence
from typing import Any

from ..evaluation import parsing
from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.source import Source

#: An option of a question, on its own line: "A. Left" or "(A) Left".
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.)][ \t]*(\S.*)$", re.MULTILINE)


def read(source: Source) -> list[Item]:
    """One item a row: ``choice`` where the answer is the letter of an option, else ``text``."""
    items = []
    tables = source.find(  # beside other benchmarks; xAI's folder, and lmms-lab's
        "RealworldQA/data/*.parquet", "RealWorldQA/data/*.parquet"
    ) or source.need("test-*.parquet", what="data/test-*.parquet")
    for path in tables:
        for where, row in source.rows(path, ("image", "question", "answer")):
            item = _item(source, where, row)
            if item is not None:
                items.append(item)
    return items


def _item(source: Source, where: str, row: dict[str, Any]) -> Item | None:
    question, answer = row["question"], row["answer"]
    if not (isinstance(question, str) and question.strip()):
        return source.bad(where, f"expected a question, got {str(question)[:40]!r}")
    if not (isinstance(answer, str) and answer.strip()):
        return source.bad(where, f"expected an answer, got {str(answer)[:40]!r}")
    image = source.image(where, row["image"])
    if image is None:
        return None
    choices, letter = _choices(question), answer.strip(" ().").upper()
    chosen = letter in choices
    return Item(
        key=where,
        unit=str(row.get("image_path") or image.name),
        image=image,
        prompt=question.strip(),
        kind="choice" if chosen else "text",
        label=letter if chosen else "",
        options=tuple(choices) if chosen else (),
        about={"choices": choices} if chosen else {"answer": answer.strip()},
    )


def _choices(question: str) -> dict[str, str]:
    """Letter to words of the options that a question lists, A first and none left out."""
    choices: dict[str, str] = {}
    for letter, words in _OPTION.findall(question):
        if ord(letter) == ord("A") + len(choices):
            choices[letter] = words.strip()
    return choices if len(choices) > 1 else {}


def score(given: Sequence[Given], scores: Scores) -> None:
    """Accuracy of letters and of words, and of both where words were asked."""
    letters = [one for one in given if one.item.kind == "choice"]
    words = [one for one in given if one.item.kind == "text"]
    right = [one.answer == one.item.label for one in letters]
    same = [parsing.same_words(one.answer, one.item.about["answer"]) for one in words]
    if words:
        scores.mean("accuracy", [*letters, *words], [*right, *same])
    if letters:
        scores.mean("letters", letters, right)
    if words:
        scores.mean("words", words, same)
    if letters:
        scores.mean("unclear", letters, [not one.answer for one in letters])


BENCHMARK = Benchmark(
    name="realworldqa",
    about="RealWorldQA: questions about photographs, answered by a letter, a word or a number",
    needs="the parquet files of https://huggingface.co/datasets/xai-org/RealworldQA",
    read=read,
    parse=parsing.chosen,
    score=score,
    headline=("accuracy", "letters", "words"),
)
