"""MME (Fu et al., 2023, arXiv 2306.13394): two questions about every picture, one yes, one no.

14 subtasks. Of each: ``accuracy``, of its questions; ``accuracy_plus``, of its pictures, both of
whose questions must be right; ``score``, 100 * (accuracy + accuracy_plus), at most 200, of which
answers at random get 75 and the same answer to everything gets 50. Sums of scores, where all of
their subtasks are there: ``perception`` (10, at most 2000), ``cognition`` (4, at most 800),
``total``, and ``hallucination`` (existence, count, position, color: at most 800).

Over all questions and pictures: ``accuracy``, ``accuracy_plus``, and ``unclear``, answers that are
neither yes nor no by MME's rule, which are wrong. Questions end in "Please answer yes or no."
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..evaluation import yes_no
from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.parsing import yes_no_start
from ..evaluation.source import Source

_HALLUCINATION = ("existence", "count", "position", "color")
_PERCEPTION = (*_HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
TASKS = (*_PERCEPTION, *_COGNITION)
_SUMS = {
    "perception": _PERCEPTION,
    "cognition": _COGNITION,
    "total": TASKS,
    "hallucination": _HALLUCINATION,
}
_ENDINGS = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")


def read(source: Source) -> list[Item]:
    """The questions in the authors' folders, or else of lmms-lab/MME on the hub."""
    found = [item for task in TASKS for item in _folder(source, task)]
    found = found or list(_mirrored(source))
    if not found and not source.problems:
        source.need("existence/*.txt", what="folders of the subtasks (existence/*.txt, ...)")
    return list(_pairs(source, found))


def _folder(source: Source, task: str) -> Iterator[Item]:
    """Of a subtask: texts of two lines, beside the pictures or in a folder of their own."""
    for path in source.find(f"{task}/questions_answers_YN/*.txt") or source.find(f"{task}/*.txt"):
        name = f"{task}/{path.stem}"
        image: Path | None = None
        for where, line in source.lines(path):
            text, _, label = (part.strip() for part in line.rpartition("\t"))
            if not text or label.lower() not in yes_no.OPTIONS:
                source.bad(where, f"expected a question, a tab, and Yes or No, got {line!r:.60}")
                continue
            image = image or source.image(where, _beside(source, path))
            if image is None:
                break
            yield _item(where, name, image, text, label.lower(), task)


def _beside(source: Source, path: Path) -> str:
    """The picture that a text is about."""
    home = path.parent
    if home.name == "questions_answers_YN":
        home = home.parent / "images"
    there = [home / (path.stem + ending) for ending in _ENDINGS]
    best = next((one for one in there if one.is_file()), there[0])
    return best.relative_to(source.folder).as_posix()


def _mirrored(source: Source) -> Iterator[Item]:
    beside_others = source.find("MME/data/test-*.parquet")
    for path in beside_others or source.find("test-*.parquet"):
        for question in yes_no.questions(source, path, text="question", label="answer"):
            task = question.row.get("category")
            if task not in TASKS:
                source.bad(question.where, f"expected a category of MME, got {task!r:.60}")
                continue
            name = f"{task}/{question.row.get('question_id')}"
            image = source.image(question.where, question.image)
            if image is not None:
                yield _item(question.where, name, image, question.text, question.label, task)


def _item(where: str, name: str, image: Path, text: str, label: str, task: str) -> Item:
    return Item(
        key=where,
        unit=name,
        image=image,
        prompt=text,
        label=label,
        options=yes_no.OPTIONS,
        about={"task": task},
    )


def _pairs(source: Source, items: Iterable[Item]) -> Iterator[Item]:
    """The items whose picture has its two questions."""
    by_image: dict[str, list[Item]] = {}
    for item in items:
        by_image.setdefault(item.unit, []).append(item)
    for members in by_image.values():
        if len(members) == 2:
            yield from members
        else:
            source.bad(members[0].key, f"expected 2 questions of a picture, got {len(members)}")


def score(given: Sequence[Given], scores: Scores) -> None:
    """The numbers of each subtask, and their sums; see the module's docstring."""
    if not given:
        return
    for task in TASKS:
        if mine := [one for one in given if one.item.about["task"] == task]:
            _score(f"{task}.", mine, scores)
            scores.derive(
                f"{task}.score",
                lambda accuracy, plus: 100 * (accuracy + plus),
                f"{task}.accuracy",
                f"{task}.accuracy_plus",
            )
    for name, tasks in _SUMS.items():
        parts = [f"{task}.score" for task in tasks]
        if all(part in scores for part in parts):
            scores.derive(name, lambda *each: sum(each), *parts)
    _score("", given, scores)
    scores.mean("unclear", given, [not one.answer for one in given])


def _score(prefix: str, given: Sequence[Given], scores: Scores) -> None:
    right = [one.answer == one.item.label for one in given]
    first: dict[str, Given] = {}
    both: dict[str, bool] = {}
    for one, is_right in zip(given, right, strict=True):
        first.setdefault(one.item.unit, one)
        both[one.item.unit] = both.get(one.item.unit, True) and is_right
    scores.mean(f"{prefix}accuracy", given, right)
    scores.mean(f"{prefix}accuracy_plus", list(first.values()), list(both.values()))


BENCHMARK = Benchmark(
    name="mme",
    about="two yes/no questions a picture in 14 subtasks, of perception and cognition",
    needs="the folders of MME_Benchmark (its authors send it: "
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation), or "
    "lmms-lab/MME from the hub",
    read=read,
    score=score,
    parse=lambda item, said: yes_no_start(said),
    headline=("perception", "cognition", "hallucination", "accuracy", "accuracy_plus"),
)
