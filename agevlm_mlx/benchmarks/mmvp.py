"""MMVP (Tong et al., 2024, arXiv 2401.06209): 150 pairs of pictures that CLIP takes for alike, the
same question about both, with opposite answers.

``pair_accuracy``, the headline: pairs with both answers right / pairs (guessing: 25 %, one answer
to everything: 0); ``item_accuracy``: answers right / questions (guessing: 50 %); ``unclear``:
answers that name no option / questions. A pair is rows 1 and 2, 3 and 4, ... by their index; one of
which only one row was asked has no part in the pair accuracy.

Read: the authors' folder (Questions.csv, "MMVP Images"/1.jpg...) or the parquet files of
lmms-lab-eval/MMVP, which correct four answers: rows 99 and 100 (tusks), 279 and 280 (standing or
sitting). The answers of the files are used as they are; ``corrected_answers`` says how many of
those four were asked with the corrected one: 0 for the authors' files, 4 for the others.

Where this differs: the authors sample and let GPT-4 judge. Here the options stand below the
question with letters, as in lmms-eval, and `parsing.option` reads the answer.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..evaluation import parsing
from ..evaluation.benchmark import Benchmark, Given, Item, Scores
from ..evaluation.source import Source

#: Rows whose published answer is wrong, and the right one.
CORRECTED = {99: "B", 100: "A", 279: "B", 280: "A"}


def read(source: Source) -> list[Item]:
    """Two items a pair; rows that lack something are told to `source`."""
    tables = (
        source.find("Questions.csv")[:1]
        or source.find("MMVP/data/*.parquet")  # beside other benchmarks
        or source.need("train-*.parquet", what='Questions.csv with the folder "MMVP Images"')
    )
    items: dict[int, Item] = {}
    for path in tables:
        for where, row in source.rows(path):
            # "lndex" is how the authors' file spells it.
            fields = {name.strip().lower().replace("lndex", "index"): row[name] for name in row}
            item = _item(source, where, fields)
            if item is None:
                continue
            index = item.about["index"]
            if index in items:
                source.bad(where, f"the index {index} is there twice")
                continue
            items[index] = item
    return list(items.values())


def _item(source: Source, where: str, fields: dict[str, Any]) -> Item | None:
    index, question, said = (fields.get(name) for name in ("index", "question", "options"))
    answer = fields.get("correct answer", fields.get("answer"))
    if not re.fullmatch(r"[1-9]\d{0,5}", str(index)):
        return source.bad(where, f"expected an index from 1, got {str(index)[:40]!r}")
    if not (isinstance(question, str) and question.strip()):
        return source.bad(where, f"expected a question, got {str(question)[:40]!r}")
    choices = _choices(str(said))
    if not choices:
        return source.bad(where, f'expected options "(a) ... (b) ...", got {str(said)[:40]!r}')
    label = str(answer).strip(" ().").upper()
    if label not in choices:
        return source.bad(where, f'expected the answer "(a)" or "(b)", got {str(answer)[:40]!r}')
    number = int(str(index))
    image = source.image(where, fields.get("image") or f"{number}.jpg", "MMVP Images")
    if image is None:
        return None
    listed = "".join(f"\n{letter}. {words}" for letter, words in choices.items())
    return Item(
        key=str(number),
        unit=str((number + 1) // 2),
        image=image,
        prompt=question.strip() + listed,
        label=label,
        options=tuple(choices),
        about={"index": number, "choices": choices},
    )


def _choices(said: str) -> dict[str, str]:
    """Letter to words of "(a) left (b) right"; {} unless there are two."""
    parts = re.split(r"\(([ab])\)", said.strip(), flags=re.IGNORECASE)
    if parts[0] or [letter.upper() for letter in parts[1::2]] != ["A", "B"]:
        return {}
    words = [part.strip() for part in parts[2::2]]
    return dict(zip("AB", words, strict=True)) if all(words) else {}


def score(given: Sequence[Given], scores: Scores) -> None:
    """Pair and item accuracy of the choice items."""
    asked = [one for one in given if one.item.kind == "choice"]
    if not asked:
        return
    pairs: dict[str, list[Given]] = defaultdict(list)
    for one in asked:
        pairs[one.item.unit].append(one)
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    if whole:
        both = [all(one.answer == one.item.label for one in pair) for pair in whole]
        scores.mean("pair_accuracy", [pair[0] for pair in whole], both)
    scores.mean("item_accuracy", asked, [one.answer == one.item.label for one in asked])
    scores.mean("unclear", asked, [not one.answer for one in asked])
    known = [one.item for one in asked if one.item.about["index"] in CORRECTED]
    if known:
        corrected = [item.label == CORRECTED[item.about["index"]] for item in known]
        scores.put("corrected_answers", sum(corrected))


BENCHMARK = Benchmark(
    name="mmvp",
    about="MMVP: 150 pairs of pictures that CLIP takes for alike (pair accuracy, chance 25 %)",
    needs='Questions.csv and the folder "MMVP Images" of https://huggingface.co/datasets/MMVP/MMVP,'
    " or the parquet files of https://huggingface.co/datasets/lmms-lab-eval/MMVP",
    read=read,
    parse=parsing.chosen,
    score=score,
    headline=("pair_accuracy", "item_accuracy"),
    prompt="{question}\nAnswer with the option's letter from the given choices directly.",
)
