"""MME: both layouts as published, its parse rule, and its numbers against tables made by hand."""

from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.benchmarks import benchmark
from agevlm_mlx.benchmarks.mme import BENCHMARK, TASKS
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import yes_no
from agevlm_mlx.evaluation.benchmark import Given, Item, Scores
from tests.suite import fakes

ASK = "Please answer yes or no."


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A subtask of each layout, one picture each, as the authors send them."""
    root = tmp_path / "MME_Benchmark_release_version" / "MME_Benchmark"
    picture(root / "OCR" / "0001.jpg")
    text(
        root / "OCR" / "0001.txt",
        f'Is the word in the logo "angie\'s"? {ASK}\tYes\n'
        f'Is the word in the logo "angle\'s"? {ASK}\tNo\n\n',
    )
    picture(root / "artwork" / "images" / "10002.png")
    text(
        root / "artwork" / "questions_answers_YN" / "10002.txt",
        f"Is this a painting? {ASK}\tYes\r\nIs this glassware? {ASK}\tNo",
    )
    text(tmp_path / "eval_tool" / "Your_Results" / "OCR.txt", "0001.jpg\tQ\tYes\tNo\n")
    return tmp_path


read = partial(fakes.read, BENCHMARK)


def test_it_is_listed():
    assert benchmark("mme") is BENCHMARK


def test_the_authors_folders(published: Path):
    items, _ = read(published)
    assert [(item.unit, item.label, item.about["task"]) for item in items] == [
        ("artwork/10002", "yes", "artwork"),
        ("artwork/10002", "no", "artwork"),
        ("OCR/0001", "yes", "OCR"),
        ("OCR/0001", "no", "OCR"),
    ]
    assert items[1].prompt == f"Is this glassware? {ASK}"
    root = published / "MME_Benchmark_release_version" / "MME_Benchmark"
    assert items[0].image == root / "artwork" / "images" / "10002.png"
    assert items[2].image == root / "OCR" / "0001.jpg"
    assert items[3].key == "MME_Benchmark_release_version/MME_Benchmark/OCR/0001.txt:2"
    assert {item.options for item in items} == {("yes", "no")}


def test_the_hubs_parquet(tmp_path: Path):
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    image = {"bytes": file.getvalue(), "path": None}
    rows = [
        {"question_id": name, "image": image, "question": q, "answer": a, "category": task}
        for task, name in (("code_reasoning", "code_reasoning/0020.png"), ("count", "count/1.jpg"))
        for q, a in ((f"Is it? {ASK}", "Yes"), (f"Is it not? {ASK}", "No"))
    ]
    features = {n: datasets.Value("string") for n in rows[0] if n != "image"}
    features["image"] = datasets.Image()
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    (tmp_path / "MME" / "data").mkdir(parents=True)
    made.to_parquet(tmp_path / "MME" / "data" / "test-00000-of-00001.parquet")
    made.save_to_disk(tmp_path / "saved")
    for folder in (tmp_path / "MME", tmp_path / "saved"):
        items, _ = read(folder)
        assert [(item.unit, item.label) for item in items] == [
            ("code_reasoning/code_reasoning/0020.png", "yes"),
            ("code_reasoning/code_reasoning/0020.png", "no"),
            ("count/count/1.jpg", "yes"),
            ("count/count/1.jpg", "no"),
        ]
        assert len({item.key for item in items}) == 4
    rows[0]["category"] = "colour"
    other = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    (tmp_path / "other").mkdir()
    other.to_parquet(tmp_path / "other" / "test-0.parquet")
    items, problems = read(tmp_path / "other", skip_bad=True)
    assert [item.about["task"] for item in items] == ["count", "count"]
    assert problems == [
        "test-0.parquet:1: expected a category of MME, got 'colour'",
        "test-0.parquet:2: expected 2 questions of a picture, got 1",
    ]


def test_bad_rows(published: Path):
    folder = published / "MME_Benchmark_release_version" / "MME_Benchmark" / "count"
    two = f"Is it? {ASK}\tYes\nIs it not? {ASK}\tNo\n"
    for name in ("good", "one", "three", "label", "tab", "broken", "bytes"):
        picture(folder / f"{name}.png")
        text(folder / f"{name}.txt", two)
    text(folder / "gone.txt", two)
    text(folder / "one.txt", f"Is it? {ASK}\tYes\n")
    text(folder / "three.txt", two + f"Is it? {ASK}\tYes\n")
    text(folder / "label.txt", two.replace("No", "Maybe"))
    text(folder / "tab.txt", two.replace("\tNo", " No"))
    text(folder / "empty.txt", "\n")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "bytes.txt").write_bytes(b"\xff\tYes\nIs it not?\tNo\n")
    with pytest.raises(UserError, match="rows cannot be used; --skip-bad leaves them out"):
        read(published)
    items, problems = read(published, skip_bad=True)
    assert {item.unit for item in items} == {"artwork/10002", "OCR/0001", "count/good"}
    start = "MME_Benchmark_release_version/MME_Benchmark/count/"
    assert sorted(problem.removeprefix(start)[:45] for problem in problems) == [
        "broken.txt:1: the image MME_Benchmark_release",
        "bytes.txt:1: expected UTF-8 text, got other b",
        "bytes.txt:2: expected 2 questions of a pictur",
        "gone.txt:1: no image 'MME_Benchmark_release_v",
        "label.txt:1: expected 2 questions of a pictur",
        "label.txt:2: expected a question, a tab, and ",
        "one.txt:1: expected 2 questions of a picture,",
        "tab.txt:1: expected 2 questions of a picture,",
        "tab.txt:2: expected a question, a tab, and Ye",
        "three.txt:1: expected 2 questions of a pictur",
    ]


def test_nothing_there(tmp_path: Path):
    with pytest.raises(UserError, match="lmms-lab/MME from the hub\n  missing: folders of the sub"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("Yes.", "yes"),
        ("NO", "no"),
        ("yes, it is", "yes"),
        ("No, it is not", "no"),
        (" no", "no"),
        ("It is not", ""),
        ("", ""),
        ("Unsure", ""),
    ],
)
def test_the_parse_rule(said: str, means: str):
    item = Item(key="1", unit="1", image=None, prompt="", options=yes_no.OPTIONS, label="no")
    assert BENCHMARK.parse(item, said) == means


# --- the numbers -----------------------------------------------------------------------------


def pairs(task: str, right: list[tuple[bool, bool]], said: str = "") -> list[Given]:
    """Both questions of some pictures, answered right or wrong, or all the same."""
    return [
        Given(
            Item(
                key=f"{task}:{n}:{label}",
                unit=f"{task}/{n}",
                image=None,
                prompt="",
                label=label,
                options=yes_no.OPTIONS,
                about={"task": task},
            ),
            said or (label if is_right else {"yes": "no", "no": "yes"}[label]),
        )
        for n, both in enumerate(right)
        for label, is_right in zip(("yes", "no"), both, strict=True)
    ]


def scored(given: list[Given]) -> Scores:
    scores = Scores(sorted({one.item.unit for one in given}))
    BENCHMARK.score(given, scores)
    return scores


def test_scores_by_hand(few):
    """existence: 5 of 8 questions, 2 of 4 pictures; OCR: 3 of 4 questions, 1 of 2 pictures."""
    existence = pairs("existence", [(True, True), (True, False), (False, False), (True, True)])
    ocr = pairs("OCR", [(True, True), (False, True)])
    found = scored(existence + ocr)
    assert found["existence.accuracy"] == pytest.approx(5 / 8)
    assert found["existence.accuracy_plus"] == pytest.approx(2 / 4)
    assert found["existence.score"] == pytest.approx(112.5)
    assert found["OCR.score"] == pytest.approx(125)
    assert found["accuracy"] == pytest.approx(8 / 12)
    assert found["accuracy_plus"] == pytest.approx(3 / 6)
    assert found["unclear"] == 0
    for name in ("perception", "cognition", "hallucination", "total"):
        assert name not in found
    low, high = found.interval("existence.score") or (1, 0)
    assert low < 112.5 < high


def test_sums():
    perfect = [(True, True)] * 2
    half = [(True, True), (False, False)]  # 100 of 200
    cognition = TASKS[10:]
    given = [one for task in TASKS for one in pairs(task, half if task in cognition else perfect)]
    found = scored(given)
    assert found["perception"] == pytest.approx(2000)
    assert found["cognition"] == pytest.approx(400)
    assert found["hallucination"] == pytest.approx(800)
    assert found["total"] == pytest.approx(2400)
    assert set(BENCHMARK.headline) <= set(found.names)
    only = scored([one for one in given if one.item.about["task"] in ("existence", "count")])
    assert "hallucination" not in only
    assert set(cognition) == {
        "commonsense_reasoning",
        "numerical_calculation",
        "text_translation",
        "code_reasoning",
    }


def test_the_same_answer_to_everything_gets_50_of_200():
    for answer in ("yes", "no"):
        found = scored([one for task in TASKS for one in pairs(task, [(True, True)] * 3, answer)])
        assert found["color.score"] == pytest.approx(50)
        assert found["perception"] == pytest.approx(500)
        assert found["cognition"] == pytest.approx(200)


def test_answers_at_random_get_75_of_200():
    rng = np.random.default_rng(0)
    found = scored(pairs("count", [(bool(a), bool(b)) for a, b in rng.random((4000, 2)) < 0.5]))
    assert found["count.score"] == pytest.approx(75, abs=4)


def test_answers_that_are_neither_are_wrong():
    given = [Given(one.item, "") for one in pairs("count", [(True, True)])]
    found = scored(given + pairs("color", [(True, True)]))
    assert found["count.score"] == 0
    assert found["unclear"] == pytest.approx(1 / 2)


def test_no_answers():
    scores = Scores(["a picture"])
    BENCHMARK.score([], scores)
    assert not scores.names
