"""Two results of the same benchmark: differences in pairs."""

import json

import numpy as np
import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import compare
from agevlm_mlx.evaluation.benchmark import Benchmark
from agevlm_mlx.evaluation.compare import Difference

ACCURACY = Benchmark(
    name="accuracy",
    about="",
    needs="",
    read=lambda source: [],
    score=lambda given, scores: scores.mean(
        "accuracy", given, [g.answer == g.item.label for g in given]
    ),
)


def rows(answers: list[str], labels: list[str] | None = None) -> list[dict]:
    labels = labels or ["yes"] * len(answers)
    return [
        {
            "key": str(n),
            "unit": f"u{n // 2}",
            "image": "a.png",
            "kind": "choice",
            "prompt": "?",
            "label": label,
            "options": ["yes", "no"],
            "about": {},
            "answer": answer,
        }
        for n, (answer, label) in enumerate(zip(answers, labels, strict=True))
    ]


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.5  # the same ones are hard for both
    first = rows(["yes" if h or rng.random() < 0.2 else "no" for h in hard])
    second = rows(["yes" if h else "no" for h in hard])
    found = compare.differences(ACCURACY, first, second, boots=500)["text.accuracy"]
    gained = sum(a["answer"] != b["answer"] for a, b in zip(first, second, strict=True))
    assert found.value == pytest.approx(gained / 200)
    low, high = found.interval or (1, 0)
    assert 0 < low < found.value < high
    # Unpaired, two accuracies of 200 items differ by +-0.1 from chance alone.
    assert high - low < 0.12


def test_one_result_beside_itself():
    same = rows(["yes", "no", "yes", "yes"] * 3)
    found = compare.differences(ACCURACY, same, same)["text.accuracy"]
    assert found == Difference(0.75, 0.75, (0.0, 0.0))


def test_only_what_both_have_answered_counts():
    first, second = rows(["yes"] * 6), rows(["no", "no", "yes", "yes", "no", "no"])
    found = compare.differences(ACCURACY, first[2:], second[:4])["text.accuracy"]
    assert (found.first, found.second) == (1.0, 1.0)
    with pytest.raises(UserError, match="got none in common"):
        compare.differences(ACCURACY, first[:2], second[4:])


def test_another_question_behind_the_same_key_is_refused():
    first, second = rows(["yes"]), rows(["yes"], ["no"])
    with pytest.raises(UserError, match="expected the same label of 0, got 'yes' and 'no'"):
        compare.differences(ACCURACY, first, second)


def test_the_table_marks_what_is_beyond_chance():
    found = {
        "text.a": Difference(0.9, 0.5, (0.3, 0.5)),
        "text.b": Difference(0.5, 0.6, (-0.2, 0.1)),
        "text.c": Difference(1.0, 1.0, None),
    }
    lines = compare.table(("one", "two"), found).splitlines()
    assert lines[-3].endswith("+0.400   [+0.300, +0.500] *")
    assert lines[-2].endswith("-0.100   [-0.200, +0.100]")
    assert lines[-1].endswith("+0.000")


def test_what_is_no_result_is_told(tmp_path):
    result = tmp_path / "pope-mine.json"
    with pytest.raises(UserError, match=r"pope-mine\.json"):
        compare.read_result(tmp_path / "pope-mine")
    for value in ([], {"benchmark": "pope", "settings": {}, "finished": None}):
        result.write_text(json.dumps(value))
        with pytest.raises(UserError, match="expected a finished result"):
            compare.read_result(result)
    kept, answers = rows(["yes", "no"]), result.with_suffix(".jsonl")
    told = {"benchmark": "pope", "settings": {}, "metrics": {"text": {"accuracy": 0.5}}}
    result.write_text(json.dumps(told | {"counts": {"items": 2}}))
    with pytest.raises(UserError, match=r"answers beside it, in pope-mine\.jsonl"):
        compare.read_result(result)
    answers.write_text(json.dumps(kept[0]) + "\n")
    with pytest.raises(UserError, match=r"expected 2 answers, as pope-mine\.json says, got 1"):
        compare.read_result(result)
    answers.write_text("".join(json.dumps(row) + "\n" for row in kept))
    found, read = compare.read_result(tmp_path / "pope-mine")
    assert read == kept
    compare.check(ACCURACY, found, read, result)
    found["metrics"]["text"]["accuracy"] = 0.6
    with pytest.raises(UserError, match=r"expected answers with text.accuracy 0\.6000, .* 0\.5000"):
        compare.check(ACCURACY, found, read, result)


def test_settings_that_differ_are_told():
    first = {"settings": {"prompt": "{question}", "max_tokens": 16}}
    second = {"settings": {"prompt": "{question}!", "max_tokens": 16}}
    assert compare.unlike(first, second) == ["prompt: '{question}' and '{question}!'"]
