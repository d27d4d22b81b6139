"""HallusionBench: its numbers on a table worked out by hand, and its files as published."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from agevlm_mlx.benchmarks import benchmark
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from tests.suite import fakes

BENCHMARK = benchmark("hallusionbench")

#: category, subcategory, visual_input, set, figure, question, gt_answer. Two figures with two
#: questions each; a chart not shown, shown, and edited; the same figure number in another folder.
TABLE = """
VD illusion 1 0 0 0 1
VD illusion 1 0 0 1 0
VD illusion 2 0 1 0 0
VD illusion 2 0 1 1 0
VS chart    0 0 0 0 0
VS chart    0 0 0 1 1
VS chart    1 0 1 0 0
VS chart    1 0 1 1 1
VS chart    2 0 2 0 1
VD ocr      1 0 0 0 0
"""


def published() -> list[dict[str, Any]]:
    """The table in the published format: every value a string, no file name without a picture."""
    rows = []
    for line in TABLE.split("\n")[1:-1]:
        category, subcategory, visual, number, figure, question, answer = line.split()
        name = f"./{category}/{subcategory}/{number}_{figure}.png"
        rows.append(
            {
                "category": category,
                "subcategory": subcategory,
                "visual_input": visual,
                "set_id": number,
                "figure_id": figure,
                "sample_note": "circle",
                "question_id": question,
                "question": f"Is it {question}?",
                "gt_answer_details": "It is as it is.",
                "gt_answer": answer,
                "filename": None if visual == "0" else name,
            }
        )
    return rows


def picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 3)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, rows: Sequence[Any], pictures: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "HallusionBench.json").write_text(json.dumps(list(rows)))
    for row in rows if pictures else []:
        if isinstance(row, dict) and row.get("filename"):
            path = folder / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture())
    return folder


read = partial(fakes.read, BENCHMARK, skip_bad=True)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    items, problems = read(put(tmp_path, published()))
    assert not problems
    return items


def scored(items: Sequence[Item], answer: Callable[[Item], str]) -> Scores:
    scores = Scores(sorted({item.unit for item in items}), boots=50)
    BENCHMARK.score([Given(item, answer(item)) for item in items], scores)
    return scores


def three(scores: Scores, name: str) -> list[float]:
    return [scores[f"{name}.{metric}"] for metric in ("aAcc", "fAcc", "qAcc")]


# --- numbers ---------------------------------------------------------------------------------


def test_always_no(items):
    scores = scored(items, lambda item: "no")
    # 8 questions with a picture: 5 are no. Of 5 figures illusion 1 and ocr 0 have no "yes". Of 5
    # questions over all their figures illusion 1 and ocr 0 have none.
    assert three(scores, "image") == [5 / 8, 2 / 5, 2 / 5]
    assert scores["image.mean"] == pytest.approx((5 / 8 + 2 / 5 + 2 / 5) / 3)
    # Chart 0 is not shown: two more questions, no further figure, and no further group.
    assert three(scores, "all") == [6 / 10, 2 / 5, 2 / 5]
    assert scores["image.unclear"] == 0


def test_always_yes(items):
    scores = scored(items, lambda item: "yes")
    assert three(scores, "image") == [3 / 8, 1 / 5, 1 / 5]  # chart 2; question 1 of the chart
    assert three(scores, "all") == [4 / 10, 1 / 5, 1 / 5]


def test_groups(items):
    scores = scored(items, lambda item: "no")
    assert three(scores, "image.easy") == [3 / 5, 1 / 3, 3 / 5]
    assert three(scores, "image.hard") == [2 / 3, 1 / 2, 2 / 3]
    assert three(scores, "image.VD") == [4 / 5, 2 / 3, 2 / 3]
    assert three(scores, "image.VS") == [1 / 3, 0, 0]
    assert three(scores, "image.VD.illusion") == [3 / 4, 1 / 2, 1 / 2]
    assert three(scores, "image.VD.ocr") == [1, 1, 1]
    assert three(scores, "all.easy") == [4 / 7, 1 / 3, 3 / 5]
    assert three(scores, "all.VS.chart") == [2 / 5, 0, 0]


def test_figures_and_questions_of_the_same_numbers_in_other_folders_are_others(tmp_path):
    row = published()[-1]
    other = {**row, "category": "VS", "figure_id": "1", "filename": "./VS/ocr/0_1.png"}
    rows = [
        {**row, "figure_id": "1", "filename": "./VD/ocr/0_1.png"},
        {**other, "gt_answer": "1"},
        {**other, "subcategory": "map", "filename": "./VS/map/0_1.png"},
    ]
    items, _ = read(put(tmp_path, rows))
    assert three(scored(items, lambda item: "no"), "image") == [2 / 3, 2 / 3, 2 / 3]


def test_an_unclear_answer_is_right_only_where_there_is_no_chart_to_see(items):
    scores = scored(items, lambda item: "")
    assert three(scores, "image") == [0, 0, 0]
    assert three(scores, "all") == [2 / 10, 0, 0]
    assert scores["all.unclear"] == 1
    # A figure 0 that is a picture (VD) is not excused.
    assert three(scores, "all.VD") == [0, 0, 0]


def test_one_wrong_answer_costs_its_figure_and_its_question(items):
    wrong = next(i for i in items if i.key == "VS/chart/0/1/0")
    scores = scored(items, lambda item: "" if item is wrong else item.label)
    assert three(scores, "all") == [9 / 10, 4 / 5, 4 / 5]
    assert scores["all.unclear"] == 1 / 10


def test_a_wrong_answer_without_the_chart_costs_its_question_but_no_figure(items):
    wrong = next(i for i in items if i.key == "VS/chart/0/0/0")
    scores = scored(items, lambda item: "yes" if item is wrong else item.label)
    assert three(scores, "all") == [9 / 10, 1, 4 / 5]
    assert three(scores, "image") == [1, 1, 1]


def test_the_labels_are_all_right_and_sets_are_drawn(items, few):
    scores = scored(items, lambda item: item.label)
    assert three(scores, "image") == three(scores, "all") == [1, 1, 1]
    assert {item.unit for item in items} == {"VD/illusion/0", "VS/chart/0", "VD/ocr/0"}
    drawn = scored(items, lambda item: "no").drawn("image.fAcc")
    assert drawn is not None
    # illusion 1 of 2, chart 0 of 2, ocr 1 of 1: every draw is a mix of these.
    assert {round(v, 3) for v in drawn} <= {
        round((a + c) / (2 * a + 2 * b + c), 3)
        for a in range(4)
        for b in range(4)
        for c in range(4)
        if a + b + c == 3
    }


def test_answers_about_pictures_alone_have_no_all(items):
    scores = scored([i for i in items if i.image is not None], lambda item: "no")
    assert scores["image.aAcc"] == 5 / 8
    assert not [name for name in scores.names if name.startswith("all")]
    scores = Scores(["VD/illusion/0"])
    BENCHMARK.score([], scores)
    assert not scores.names


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("Yes.", "yes"),
        ("NO", "no"),
        ("No, the left one is larger.", "no"),
        ("The answer is yes", "yes"),
        ("", ""),
        ("I cannot know that.", ""),
        ("Yes and no.", ""),
    ],
)
def test_what_an_answer_means(items, said, means):
    assert BENCHMARK.parse(items[0], said) == means


# --- files -----------------------------------------------------------------------------------


def test_published_file(items, tmp_path):
    assert len(items) == len({item.key for item in items}) == 10
    first, unseen = items[0], items[4]
    assert first.image == tmp_path / "VD/illusion/0_0.png"
    assert (first.prompt, first.label, first.options) == ("Is it 0?", "yes", ("yes", "no"))
    assert (unseen.image, unseen.label, unseen.kind) == (None, "no", "choice")
    assert json.loads(json.dumps(first.about)) == first.about
    assert items[9].image == tmp_path / "VD/ocr/0_0.png"  # not the illusion of the same name


def test_pictures_in_a_folder_of_the_zip(tmp_path):
    put(tmp_path / "hallusion_bench", published())
    (tmp_path / "hallusion_bench/HallusionBench.json").rename(tmp_path / "HallusionBench.json")
    items, problems = read(tmp_path)
    assert (len(items), problems) == (10, [])
    assert items[0].image == tmp_path / "hallusion_bench/VD/illusion/0_0.png"


def test_parquet_with_pictures_and_integers(tmp_path):
    rows = published()
    for row in rows:
        row |= {key: int(row[key]) for key in ("visual_input", "set_id", "gt_answer")}
    shown = [{**r, "image": {"bytes": picture(), "path": None}} for r in rows if r["filename"]]
    unseen = [row for row in rows if not row["filename"]]
    for name, table in (("image", shown), ("non_image", unseen)):
        path = tmp_path / f"data/{name}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(table), path)
    items, problems = read(tmp_path)
    assert not problems
    assert (len(items), sum(item.image is None for item in items)) == (10, 2)
    assert {item.key for item in items} == {i.key for i in read(put(tmp_path / "x", rows))[0]}
    assert scored(items, lambda item: "no")["image.aAcc"] == 5 / 8


def test_bad_rows_are_told_and_left_out(tmp_path):
    def changed(**values: Any) -> dict[str, Any]:
        return {**published()[0], "question_id": "7", **values}

    bad = {
        "category VD or VS, got 'VX'": changed(category="VX"),
        "visual_input 0, 1 or 2, got '3'": changed(visual_input="3"),
        "gt_answer 0 or 1, got '2'": changed(gt_answer="2"),
        "a question, got ' '": changed(question=" "),
        "a question, got None": changed(question=None),
        "VD/illusion/0/0/0: expected each question once": published()[0],
        "'None'": changed(filename=None),
        "missing.png": changed(filename="./VD/illusion/missing.png"),
        "../secret.png": changed(filename="../secret.png"),
        "not an image": changed(filename="./VD/illusion/corrupt.png"),
        "expected category": {"category": "VD"},
        "object": "a row",
    }
    put(tmp_path, published())
    (tmp_path / "VD/illusion/corrupt.png").write_bytes(b"no picture")
    put(tmp_path, [*published(), *bad.values()], pictures=False)
    items, problems = read(tmp_path)
    assert len(items) == 10
    assert len(problems) == len(bad), problems
    for problem, expected in zip(problems, bad, strict=True):
        assert expected in problem
        assert problem.startswith("HallusionBench.json:")


def test_the_picture_of_another_folder_is_not_taken(tmp_path):
    put(tmp_path, [published()[0]], pictures=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/0_0.png").write_bytes(picture())
    items, problems = read(tmp_path)
    assert not items
    assert "expected the picture ./VD/illusion/0_0.png" in problems[0]


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"(?s)hallusion_bench\.zip.*missing: HallusionBench\.json"):
        read(tmp_path)
