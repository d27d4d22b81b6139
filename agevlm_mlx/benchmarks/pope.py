"""POPE (Li et al., EMNLP 2023, arXiv 2305.10355): is an object in the picture?

Three sources of pictures, COCO val2014, GQA and A-OKVQA (which has COCO's), and of each three
files of 3000 questions about 500 pictures, half of them yes. The objects that are absent are drawn
at random, from the most popular ones, or from those that most often come with what is there
(adversarial). LLaVA's bundle has another random file, of 2910 questions.

Each file by itself: ``accuracy``, ``precision``, ``recall`` and ``f1`` of the answer "yes",
``yes_ratio`` of the answers; ``mean``, over the three files of a source where all three are there
(LLaVA reports the mean F1). Answers are parsed by POPE's own rule, by which garbage means yes.

"Yes" to everything has accuracy .5, F1 .667 and yes_ratio 1. The popular file can nearly be solved
without the pictures, as it asks for ten absent objects only: read the adversarial one.

A question is asked as it is published; LLaVA's results are with
``--prompt "{question}\\nAnswer the question using a single word or phrase."``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..evaluation import yes_no
from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.source import Source

SPLITS = ("random", "popular", "adversarial")
#: What the files are called before their split.
_FILES = {"coco": "coco_pope_", "gqa": "gqa_pope_seem_", "aokvqa": "aokvqa_pope_seem_"}
_METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def read(source: Source) -> list[Item]:
    """The questions of every file that is there; of COCO's also as lmms-lab/POPE on the hub."""
    items: list[Item] = []
    for name, start in _FILES.items():
        for split in SPLITS:
            found = source.find(f"{start}{split}.json", f"{start}{split}.jsonl")
            for other in found[1:]:
                other_name = other.relative_to(source.folder).as_posix()
                source.bad(other_name, f"expected {start}{split} once in the folder, got another")
            for path in found[:1]:
                items += _published(source, path, name, split)
    if not any(item.about["source"] == "coco" for item in items):
        items += _mirrored(source)
    if not items and not source.problems:
        source.need(
            "*_pope_*.json",
            what="any of " + ", ".join(f"{start}{SPLITS[-1]}.json" for start in _FILES.values()),
        )
    return items


def _published(source: Source, path: Path, name: str, split: str) -> Iterator[Item]:
    for question in yes_no.questions(source, path):
        image = source.image(question.where, question.image, "val2014", "images")
        if image is not None:
            yield _item(question, image, str(question.image), name, split)


def _mirrored(source: Source) -> Iterator[Item]:
    """All splits in one table, or each in files of its own: the same questions, so one of them."""
    parts = [f"{split}-*.parquet" for split in SPLITS]
    for path in (
        source.find("POPE/data/test-*.parquet")  # beside other benchmarks
        or source.find("test-*.parquet")
        or source.find(*parts)
    ):
        for question in yes_no.questions(source, path, text="question", label="answer"):
            split = str(question.row.get("category") or path.name.partition("-")[0])
            if split not in SPLITS:
                source.bad(question.where, f"expected a category of POPE, got {split!r:.60}")
                continue
            image = source.image(question.where, question.image)
            if image is not None:
                unit = str(question.row.get("image_source") or image.name)
                yield _item(question, image, unit, "coco", split)


def _item(question: yes_no.Question, image: Path, unit: str, name: str, split: str) -> Item:
    return Item(
        key=question.where,
        unit=unit,
        image=image,
        prompt=question.text,
        label=question.label,
        options=yes_no.OPTIONS,
        about={"source": name, "split": split},
    )


def score(given: Sequence[Given], scores: Scores) -> None:
    """The numbers of each file, and their means; see the module's docstring."""
    for name in _FILES:
        for split in SPLITS:
            about = {"source": name, "split": split}
            if mine := [one for one in given if one.item.about == about]:
                yes_no.score(f"{name}.{split}", mine, scores)
        for metric in _METRICS:
            names = [f"{name}.{split}.{metric}" for split in SPLITS]
            if all(one in scores for one in names):
                scores.derive(f"{name}.mean.{metric}", lambda *of: sum(of) / len(of), *names)


BENCHMARK = Benchmark(
    name="pope",
    about="is an object in the picture? (COCO, GQA, A-OKVQA; random, popular, adversarial)",
    needs="the .json files below the folder output of https://github.com/AoiDragon/POPE and, in "
    "the same folder, the pictures they name (COCO val2014 from https://cocodataset.org; GQA from "
    "https://cs.stanford.edu/people/dorarad/gqa), or COCO's part with its pictures from the hub: "
    "lmms-lab/POPE",
    read=read,
    score=score,
    parse=yes_no.parse,
    headline=tuple(
        f"{name}.{part}"
        for name in _FILES
        for part in ("adversarial.accuracy", "adversarial.f1", "mean.accuracy", "mean.f1")
    ),
    max_tokens=32,
)
