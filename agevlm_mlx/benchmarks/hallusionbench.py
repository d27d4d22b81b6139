"""HallusionBench (Guan et al., 2023, arXiv 2310.14566): yes/no questions on charts, maps, edited
pictures and illusions, scored by rule.

Asked: the 1129 questions of HallusionBench.json, 178 of them without a picture, as their authors
word them. Two sets are scored apart: ``image``, the 951 questions that have a picture, which other
toolkits report, and ``all`` 1129, which the authors report. In each:

- ``aAcc``: questions answered rightly / questions;
- ``fAcc``: figures all of whose questions are answered rightly / figures. "VS figure 0" (a question
  of category VS without its picture) is no figure;
- ``qAcc``: the same question about every figure of its set answered rightly / such questions;
- ``mean``: of the three; ``unclear``: answers that are neither yes nor no / questions.

The same for categories (VD, VS), subcategories, ``easy`` (visual_input 0 or 1) and ``hard`` (2, an
edited picture); the leaderboard's "easy" and "hard" are the ``qAcc`` of these. Answers to none of
the 178, as of a control that takes pictures away, have no ``all``.

Where this differs from the authors' script: that asks GPT-4 whether an answer is right, wrong or
unclear. Here the words of an answer decide: yes or no, and an answer with neither or both of them
is unclear. As theirs, an unclear answer is right for VS figure 0 and wrong everywhere else; so a
model that says nothing has 178/1129 of ``all.aAcc`` and nothing of ``image``.

On the 951 of the published file "no" to everything has aAcc .578, fAcc .121, qAcc .200, and "yes"
.422, .072, .046: small models are often no better. The controls stand beside every result.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.parsing import yes_no_words
from ..evaluation.source import Source
from ..evaluation.yes_no import OPTIONS

_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
_COLUMNS = (*_KEYS, "visual_input", "question", "gt_answer", "filename")
_LABELS = {"0": "no", "1": "yes"}


def read(source: Source) -> list[Item]:
    """The questions of HallusionBench.json, or of parquet files with the same columns and the
    pictures in a column ``image``; numbers may be strings, as published, or integers."""
    items: dict[str, Item] = {}
    tables = source.find("HallusionBench.json") or source.need(
        "*image*.parquet", what="HallusionBench.json"
    )
    for path in tables:
        for where, row in source.rows(path, _COLUMNS):
            key = "/".join(str(row[name]) for name in _KEYS)
            where = f"{where}: {key:.80}"  # the published file is one line
            if key in items:
                source.bad(where, "expected each question once")
                continue
            item = _item(source, where, key, row)
            if item is not None:
                items[key] = item
    return list(items.values())


def _item(source: Source, where: str, key: str, row: dict[str, Any]) -> Item | None:
    about = {name: str(row[name]) for name in (*_KEYS, "visual_input")}
    label, question = _LABELS.get(str(row["gt_answer"])), row["question"]
    problem = ""
    if about["category"] not in ("VD", "VS"):
        problem = f"expected the category VD or VS, got {about['category']!r:.40}"
    elif about["visual_input"] not in ("0", "1", "2"):
        problem = f"expected visual_input 0, 1 or 2, got {about['visual_input']!r:.40}"
    elif label is None:
        problem = f"expected gt_answer 0 or 1, got {row['gt_answer']!r:.40}"
    elif not isinstance(question, str) or not question.strip():
        problem = f"expected a question, got {question!r:.40}"
    if problem or label is None:
        source.bad(where, problem)
        return None
    image = None
    if about["visual_input"] != "0":
        image = _image(source, where, row)
        if image is None:
            return None
    return Item(
        key=key,
        unit="/".join(about[name] for name in _KEYS[:3]),
        image=image,
        prompt=question,
        label=label,
        options=OPTIONS,
        about=about,
    )


def _image(source: Source, where: str, row: dict[str, Any]) -> Path | None:
    name = row["filename"]
    if row.get("image") is not None:
        return source.image(where, row["image"])
    image = source.image(where, name, "hallusion_bench")
    # Every subcategory has a 0_1.png: one of the same name from another folder is not meant.
    if image is not None and image.parts[-3:] != PurePosixPath(name).parts[-3:]:
        source.bad(where, f"expected the picture {name}, got only {image}; unpack the whole zip")
        return None
    return image


def score(given: Sequence[Given], scores: Scores) -> None:
    """The numbers of both sets; see the module's docstring."""
    shown = [one for one in given if one.item.image is not None]
    sets = {"image": shown, "all": list(given) if len(given) > len(shown) else []}
    for name, members in sets.items():
        for group, some in _groups(members).items():
            _accuracies(name + group, some, scores)


def _groups(given: list[Given]) -> dict[str, list[Given]]:
    groups: dict[str, list[Given]] = {}
    for one in given:
        about = one.item.about
        level = ".hard" if about["visual_input"] == "2" else ".easy"
        category = f".{about['category']}"
        for group in ("", level, category, f"{category}.{about['subcategory']}"):
            groups.setdefault(group, []).append(one)
    return groups


def _accuracies(name: str, given: list[Given], scores: Scores) -> None:
    def key(*names: str) -> Callable[[Given], Hashable]:
        return lambda one: tuple(one.item.about[name] for name in names)

    scores.mean(f"{name}.aAcc", given, [_right(one) for one in given])
    shown = [one for one in given if not _unseen(one)]
    _all_right(f"{name}.fAcc", shown, key(*_KEYS[:4]), scores)
    _all_right(f"{name}.qAcc", given, key(*_KEYS[:3], "question_id"), scores)
    scores.derive(
        f"{name}.mean",
        lambda *three: sum(three) / 3,
        *(f"{name}.{metric}" for metric in ("aAcc", "fAcc", "qAcc")),
    )
    scores.mean(f"{name}.unclear", given, [not one.answer for one in given])


def _all_right(
    name: str, given: list[Given], key: Callable[[Given], Hashable], scores: Scores
) -> None:
    """The share of groups, by `key`, all of whose answers are right."""
    first: dict[Hashable, Given] = {}
    right: dict[Hashable, bool] = {}
    for one in given:
        first.setdefault(key(one), one)
        right[key(one)] = right.get(key(one), True) and _right(one)
    scores.mean(name, list(first.values()), list(right.values()))


def _right(one: Given) -> bool:
    return one.answer == one.item.label if one.answer else _unseen(one)


def _unseen(one: Given) -> bool:
    """VS figure 0: a question that its picture would have helped, without it."""
    return one.item.about["category"] == "VS" and one.item.about["figure_id"] == "0"


BENCHMARK = Benchmark(
    name="hallusionbench",
    about="yes/no on charts, maps, edited pictures, illusions (951 of 1129 with a picture)",
    needs="HallusionBench.json of https://github.com/tianyi-lab/HallusionBench and, below the same "
    "folder, the pictures of its hallusion_bench.zip (folders VD and VS)",
    read=read,
    score=score,
    parse=lambda item, said: yes_no_words(said),
    headline=("image.aAcc", "image.fAcc", "image.qAcc", "image.mean"),
    max_tokens=16,
)
