"""Questions in POPE's format, answered yes or no: how they are read, parsed and scored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import metrics
from .benchmark import Given, Item, Scores
from .source import Source

OPTIONS = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A row of a table of questions. where: file and row, which are unique; published ids are
    not. image: as the row names or holds it. label: one of `OPTIONS`."""

    where: str
    row: dict[str, Any]
    image: Any
    text: str
    label: str


def questions(
    source: Source, path: Path, image: str = "image", text: str = "text", label: str = "label"
) -> Iterator[Question]:
    """The questions of a table with these columns (by default POPE's); those that lack a text or
    a label are told to the source. An image is not looked for."""
    for where, row in source.rows(path, (image, text, label)):
        words, answer = row[text], str(row[label]).strip().lower()
        if not isinstance(words, str) or not words.strip():
            source.bad(where, f"expected a question in '{text}', got {words!r:.60}")
        elif answer not in OPTIONS:
            source.bad(where, f"expected yes or no in '{label}', got {row[label]!r:.60}")
        else:
            yield Question(where, row, row[image], words.strip(), answer)


def parse(item: Item, said: str) -> str:
    """POPE's own rule, by which every answer means yes or no; see `metrics.parse_yes_no`."""
    return "yes" if metrics.parse_yes_no(said) else "no"


def score(name: str, given: Sequence[Given], scores: Scores, positive: str = "yes") -> None:
    """Under `name`: accuracy; precision, recall and f1 of the answer `positive`; its share of the
    answers, as "yes_ratio"; and where answers have scores "auroc", of log P(yes) - log P(no).

    An answer that is no option is wrong, and not `positive`.
    """
    true = np.array([one.item.label == positive for one in given], float)
    said = np.array([one.answer == positive for one in given], float)
    scores.mean(f"{name}.accuracy", given, [one.answer == one.item.label for one in given])
    scores.ratio(f"{name}.precision", given, said * true, said)
    scores.ratio(f"{name}.recall", given, said * true, true)
    scores.ratio(f"{name}.f1", given, 2 * said * true, said + true)
    scores.mean(f"{name}.{positive}_ratio", given, said)
    if given and all(one.scores for one in given):
        yes, no = (OPTIONS.index(option) for option in OPTIONS)
        sides = [[one for one in given if one.item.label == label] for label in OPTIONS]
        margins = [[one.scores[yes] - one.scores[no] for one in side] for side in sides]
        scores.auroc(f"{name}.auroc", sides[0], margins[0], sides[1], margins[1])
