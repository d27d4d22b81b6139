"""Asking everything once, with controls; going on where a run was broken off."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import scoring
from agevlm_mlx.evaluation.answers import AnswerFile, read_rows
from agevlm_mlx.evaluation.benchmark import Benchmark, Given, Item, Scores, mask_key
from agevlm_mlx.evaluation.respondent import Request
from agevlm_mlx.evaluation.run import (
    Run,
    Settings,
    begin_row,
    chunks,
    digest,
    partners,
    sample,
    still_asked,
)
from tests.suite.fakes import Scripted

#: The right answer to "Is it red?" is in the name of the picture.
COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}


def score(given: Sequence[Given], scores: Scores) -> None:
    choices = [one for one in given if one.item.kind == "choice"]
    if choices:
        scores.mean("accuracy", choices, [one.answer == one.item.label for one in choices])
    if said := [one for one in given if one.item.kind == "text"]:
        scores.mean("named", said, [one.item.about["colour"] in one.answer for one in said])
    if ranked := [one for one in given if one.item.kind == "likelihood"]:
        scores.mean("won", ranked, [one.scores[0] > one.scores[1] for one in ranked])
        scores.mean("gained", ranked, [one.scores[0] - one.blind[0] for one in ranked])
    if looked := [one for one in given if one.item.kind == "look"]:
        scores.mean("hit", looked, [one.look["hit"] for one in looked])


def parse(item: Item, said: str) -> str:
    return {"yes": "yes", "no": "no"}.get(said.lower().strip(" ."), "")


BENCHMARK = Benchmark(
    name="red",
    about="pictures of one colour",
    needs="red.png and blue.png",
    read=lambda source: [],
    parse=parse,
    score=score,
    max_tokens=4,
    prompt="{question} Say yes or no.",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    names = [f"{colour}-{n}.png" for n in range(10) for colour in COLOURS]
    for name in names:
        Image.new("RGB", (32, 24), COLOURS[name.partition("-")[0]]).save(folder / name)
    return [folder / name for name in names]


def questions(pictures: Sequence[Path]) -> list[Item]:
    found = []
    for path in pictures:
        for colour in COLOURS:
            found.append(
                Item(
                    key=f"{path.stem}:{colour}",
                    unit=path.stem,
                    image=path,
                    prompt=f"Is it {colour}?",
                    label="yes" if path.name.startswith(colour) else "no",
                    options=("yes", "no"),
                )
            )
    return found


def everything(pictures: Sequence[Path]) -> list[Item]:
    found = questions(pictures)
    for path in pictures:
        colour = path.name.partition("-")[0]
        other = next(name for name in COLOURS if name != colour)
        rest = {"unit": path.stem, "image": path, "about": {"colour": colour}}
        found.append(Item(key=f"said:{path.stem}", prompt="Which colour?", kind="text", **rest))
        found.append(
            Item(
                key=f"ranked:{path.stem}",
                prompt="Which colour?",
                kind="likelihood",
                options=(colour, other),
                label=colour,
                **rest,
            )
        )
        mask = np.zeros((24, 32), bool)
        mask[:8, :8] = True
        found.append(
            Item(
                key=f"look:{path.stem}",
                prompt="Is it red?",
                phrase="red",
                kind="look",
                mask=lambda mask=mask: mask,
                **rest,
            )
        )
    found.append(
        Item(key="none", unit="none", image=None, prompt="Is it red?", label="no",
             options=("yes", "no"))
    )  # fmt: skip
    return found


def sees(request: Request) -> str:
    """One who sees: without a picture it says no."""
    colour = request.image.name.partition("-")[0] if request.image else "nothing"
    if request.prompt.startswith("Which colour?"):
        return colour
    return "Yes." if f"Is it {colour}?" in request.prompt else "No."


def ignores(request: Request) -> str:
    """One who knows only the question."""
    if request.prompt.startswith("Which colour?"):
        return "red"
    return "Yes" if "red" in request.prompt else "No"


def ask(
    items: Sequence[Item], script, folder: Path, broken: Sequence[str] = (), **settings
) -> tuple[dict[str, Scores], list[dict], Scripted, Run]:
    respondent = Scripted(script, broken)
    with AnswerFile(folder / "answers.jsonl") as answers:
        run = Run(respondent, BENCHMARK, Settings(**settings), answers)
        run.ask(items)
    rows = read_rows(folder / "answers.jsonl")
    return scoring.score(BENCHMARK, rows, scoring.units(rows), 200, 0), rows, respondent, run


def test_one_who_answers_from_the_label_gets_everything(pictures, tmp_path):
    scored, rows, _, _ = ask(everything(pictures), sees, tmp_path)
    assert len(rows) == len(everything(pictures))
    for way in ("text", "logits"):
        assert scored[way]["accuracy"] == 1.0
        assert scored[way].interval("accuracy") == (1.0, 1.0)
        assert scored[f"blind.{way}"]["accuracy"] == 0.5
    assert scored["text"]["named"] == 1.0
    assert scored["logits"]["won"] == 1.0
    assert scored["logits"]["gained"] == pytest.approx(4.9)
    assert scored["blind.logits"]["gained"] == 0.0
    assert scored["look"]["hit"] == 1.0
    # Half of the questions are answered by always yes; the one without a picture is a no.
    assert scored["constant.yes"]["accuracy"] == pytest.approx(20 / 41)
    assert scored["constant.no"]["accuracy"] == pytest.approx(21 / 41)
    assert scored["majority"]["accuracy"] == pytest.approx(21 / 41)


def test_one_who_ignores_the_picture_is_as_good_with_another_one(pictures, tmp_path):
    scored, *_ = ask(everything(pictures), ignores, tmp_path)
    seen = [one for one in questions(pictures)]
    for way in ("text", "logits"):
        same = scored[f"shuffled.{way}"]["accuracy"]
        assert same == scored[f"blind.{way}"]["accuracy"] == 0.5
        assert scored[way]["accuracy"] == pytest.approx((20 + 0) / (len(seen) + 1))
    assert scored["shuffled.text"]["named"] == scored["text"]["named"] == 0.5


def test_one_who_guesses_is_at_chance_within_its_interval(pictures, tmp_path):
    rng = np.random.default_rng(5)
    scored, *_ = ask(questions(pictures), lambda _: rng.choice(["Yes", "No"]), tmp_path)
    low, high = scored["text"].interval("accuracy") or (1, 0)
    assert low < 0.5 < high
    assert high - low < 0.5


def test_the_shuffled_picture_is_another_one_of_the_same_chunk(pictures, tmp_path):
    _, rows, respondent, _ = ask(questions(pictures), sees, tmp_path, batch_size=4)
    order = [path.name for path in pictures]
    for row in rows:
        assert row["shuffled_image"] != row["image"]
        assert order.index(row["image"]) // 4 == order.index(row["shuffled_image"]) // 4
        told = (
            "Yes."
            if f"Is it {row['shuffled_image'].partition('-')[0]}?" == row["prompt"]
            else "No."
        )
        assert row["shuffled_answer"] == told
    asked = [request for request in respondent.asked if request.image is None]
    assert len(asked) == 2 * len(COLOURS)  # each question once in words and once by its options
    assert {request.prompt for request in asked} == {f"Is it {c}? Say yes or no." for c in COLOURS}


def test_chunks_leave_no_unit_alone(pictures):
    def sizes(images: int, at_once: int) -> list[int]:
        made = chunks(questions(pictures[:images]), at_once)
        return [len({item.image for item in chunk}) for chunk in made]

    assert sizes(20, 7) == [7, 7, 6]
    assert sizes(15, 7) == [7, 8]
    assert sizes(3, 2) == [3]
    assert sizes(1, 7) == [1]
    assert sizes(0, 7) == []
    texts = [item for item in everything(pictures[:2]) if item.image is None]
    assert [len(chunk) for chunk in chunks(everything(pictures[:2]), 2)] == [10, len(texts)]


def paired(pictures: Sequence[Path]) -> list[Item]:
    """Two pictures a unit, with opposite answers to the same question."""
    return [
        Item(key=path.stem, unit=f"pair {n // 2}", image=path, prompt="Is it red?",
             label="yes" if path.name.startswith("red") else "no", options=("yes", "no"))
        for n, path in enumerate(pictures)
    ]  # fmt: skip


def test_the_pictures_of_a_unit_stay_together(pictures):
    made = list(chunks(paired(pictures), 3))
    assert [len(chunk) for chunk in made] == [4] * 5
    assert [len(chunk) for chunk in chunks(paired(pictures[:10]), 2)] == [4, 6]
    assert all(len({item.unit for item in chunk}) == 2 for chunk in made)


@pytest.mark.parametrize("batch_size", [2, 7, 50])
def test_another_picture_is_one_of_another_unit(pictures, tmp_path, batch_size):
    """The other one of the pair would be the counter-question: always wrong, not at chance."""
    _, rows, *_ = ask(paired(pictures), sees, tmp_path, batch_size=batch_size)
    unit = {row["image"]: row["unit"] for row in rows}
    assert all(unit[row["shuffled_image"]] != row["unit"] for row in rows)
    alone, *_ = ask(paired(pictures[:2]), sees, tmp_path)
    assert alone["text"]["accuracy"] == 1.0


def test_partners_are_others_and_all_are_used():
    units = {Path(f"{n}.png"): f"u{n // 3}" for n in range(11)}
    found = partners(units, (0, 0))
    assert set(found) == set(units) == set(found.values())
    assert all(units[image] != units[other] for image, other in found.items())
    assert found == partners(units, (0, 0)) != partners(units, (0, 1))
    lopsided = {Path(f"{n}.png"): "most" if n < 4 else "one" for n in range(5)}
    found = partners(lopsided, (0, 0))
    assert found
    assert all(lopsided[image] != lopsided[other] for image, other in found.items())
    two = {Path("a"): "u", Path("b"): "v"}
    assert partners(two, (3,)) == {Path("a"): Path("b"), Path("b"): Path("a")}
    assert partners({Path("a"): "u", Path("b"): "u"}, (0,)) == {}
    assert partners({}, (0,)) == {}


def test_the_place_in_a_pair_does_not_give_the_answer_away(tmp_path):
    """Where the first of each pair is a yes, shuffled answers have to be at chance."""
    units = {Path(f"{n}.png"): f"pair {n // 2}" for n in range(400)}
    found = partners(units, (0,))
    same_place = [int(i.stem) % 2 == int(o.stem) % 2 for i, o in found.items()]
    assert len(found) == 400
    assert 0.4 < np.mean(same_place) < 0.6
    both = np.reshape(same_place, (200, 2)).all(1)  # in the order of the pairs
    assert 0.15 < both.mean() < 0.35


class Killed(BaseException):
    pass


def test_a_run_that_was_broken_off_goes_on_and_ends_the_same(pictures, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    _, whole, *_ = ask(everything(pictures), sees, tmp_path / "whole", batch_size=4)
    said = 0

    def dies(request: Request) -> str:
        nonlocal said
        said += 1
        if said % 23 == 0:
            raise Killed
        return sees(request)

    ends = 0
    while True:
        done = len(read_rows(tmp_path / "broken" / "answers.jsonl")) if ends else 0
        try:
            _, rows, *_ = ask(everything(pictures), dies, tmp_path / "broken", batch_size=4)
            break
        except Killed:
            ends += 1
            kept = read_rows(tmp_path / "broken" / "answers.jsonl")
            assert len(kept) >= done  # nothing that was answered is lost
    assert ends > 3
    assert sorted(rows, key=lambda row: row["key"]) == sorted(whole, key=lambda row: row["key"])


def test_an_answer_is_in_the_file_as_soon_as_it_is_known(pictures, tmp_path):
    seen: list[int] = []

    class Watching(Scripted):
        def generate(self, requests, max_tokens) -> Iterator[tuple[int, str]]:
            for pair in super().generate(requests, max_tokens):
                yield pair
                seen.append(len(read_rows(tmp_path / "answers.jsonl")))

    with AnswerFile(tmp_path / "answers.jsonl") as answers:
        Run(Watching(sees), BENCHMARK, Settings(), answers).ask(questions(pictures[:4]))
    assert seen == sorted(seen)
    assert len(set(seen)) > 4


def test_a_broken_picture_stops_the_run_or_is_left_out(pictures, tmp_path):
    bad = pictures[2].name
    with pytest.raises(UserError, match=f"{bad}: expected an image; --skip-bad leaves its 2 items"):
        ask(questions(pictures), sees, tmp_path, broken=[bad], batch_size=2)
    assert len(read_rows(tmp_path / "answers.jsonl")) == 4  # those before it
    scored, rows, _, run = ask(
        questions(pictures), sees, tmp_path, broken=[bad], batch_size=2, skip_bad=True
    )
    assert run.problems == [f"{bad}: expected an image (2 items)"]
    assert len(rows) == 2 * 19
    assert scored["text"]["accuracy"] == 1.0
    assert bad not in {row["image"] for row in rows} | {row.get("shuffled_image") for row in rows}


def test_where_another_phrase_looks_is_the_control(pictures, tmp_path):
    class Looking(Scripted):
        """Looks at the first cell for "red", at the last one for others."""

        def look(self, requests, phrases):
            found = super().look(requests, phrases)
            for one, phrase in zip(found, phrases, strict=True):
                if phrase != "red":
                    one.attention[:] = one.attention[..., ::-1, ::-1].copy()
            return found

    first = next(item for item in everything(pictures) if item.kind == "look")
    second = replace(first, key="second", prompt="Is it blue?", phrase="blue")
    alone = replace(first, key="alone", unit="other", image=pictures[1])
    with AnswerFile(tmp_path / "answers.jsonl") as answers:
        Run(Looking(sees), BENCHMARK, Settings(), answers).ask([first, second, alone])
        rows = answers.rows
    assert (rows[first.key]["look"]["hit"], rows["second"]["look"]["hit"]) == (True, False)
    shuffled = rows[first.key]["shuffled_look"], rows["second"]["shuffled_look"]
    assert [look["hit"] for look in shuffled] == [False, True]
    assert rows[first.key]["shuffled_phrase"] == "blue"
    assert "shuffled_look" not in rows["alone"]
    scored = scoring.score(BENCHMARK, list(rows.values()), ["other", first.unit], 10, 0)
    assert scored["look"]["hit"] == pytest.approx(2 / 3)
    assert scored["shuffled.look"]["hit"] == 0.5
    # One of them asked again is measured against the other, which is asked along.
    kept = dict(rows[first.key])
    with AnswerFile(tmp_path / "answers.jsonl") as answers:
        answers.replace([rows["second"], rows["alone"]])
        Run(Looking(sees), BENCHMARK, Settings(), answers).ask([first, second, alone])
        assert answers.rows[first.key] == kept


def test_one_picture_has_no_other_one_beside_it(pictures, tmp_path):
    scored, *_ = ask(questions(pictures[:1]), sees, tmp_path)
    assert scored["text"]["accuracy"] == 1.0
    assert not any(name.startswith("shuffled") for name in scored)


def test_progress_ends_at_the_whole(pictures, tmp_path):
    told: list[tuple[int, int]] = []
    with AnswerFile(tmp_path / "answers.jsonl") as answers:
        Run(
            Scripted(sees, [pictures[0].name]), BENCHMARK, Settings(skip_bad=True), answers,
            progress=lambda *at: told.append(at),
        ).ask(questions(pictures))  # fmt: skip
    assert told[-1] == (40, 40)
    assert told == sorted(told)


def test_a_sample_is_of_units_and_the_same_for_a_seed(pictures):
    items = questions(pictures)
    some = sample(items, Settings(limit=5, seed=1))
    assert len({item.unit for item in some}) == 5
    assert len(some) == 10
    assert some == sample(items, Settings(limit=5, seed=1)) != sample(items, Settings(limit=5))
    assert sample(items, Settings(limit=99)) == items
    assert [item.key for item in some] == [item.key for item in items if item in some]


def test_the_digest_is_of_what_is_asked(pictures):
    items = questions(pictures)
    assert digest(items) == digest(questions(pictures))
    assert digest(items) != digest(items[1:])
    assert digest(items) != digest([replace(items[0], prompt="Is it green?"), *items[1:]])


def test_a_kept_answer_is_to_the_same_question_about_the_same_picture(pictures, tmp_path):
    item = questions(pictures)[0]
    folder = pictures[0].parent
    row = begin_row(item, folder)
    assert still_asked(row, item, folder)
    assert still_asked(row, replace(item, label="no", about={"new": 1}), folder)
    assert not still_asked(row, replace(item, prompt="Is it green?"), folder)
    assert not still_asked(row, replace(item, image=pictures[1]), folder)
    assert not still_asked(row, replace(item, image=tmp_path / item.image.name), folder)
    other = tmp_path / item.image.name
    other.write_bytes(item.image.read_bytes())
    assert still_asked(row, replace(item, image=other), tmp_path)
    other.write_bytes(item.image.read_bytes()[:-1] + b"?")  # of the same size
    assert not still_asked(row, replace(item, image=other), tmp_path)


def test_a_kept_look_is_at_the_same_mask(pictures):
    item = next(i for i in everything(pictures) if i.kind == "look")
    item = replace(item, mask_key=mask_key({"size": [2, 2], "counts": "x"}))
    row = begin_row(item, Path())
    assert still_asked(row, item, Path())
    assert not still_asked(row, replace(item, mask_key=mask_key([[0, 0, 1, 1]])), Path())


def test_a_model_whose_numbers_are_none_is_told(pictures, tmp_path):
    class Broken(Scripted):
        def options(self, requests, options):
            return [(float("nan"), -1.0)] * len(requests)

    with AnswerFile(tmp_path / "answers.jsonl") as answers:
        run = Run(Broken(sees), BENCHMARK, Settings(), answers)
        with pytest.raises(UserError, match="scripted: expected likelihoods, got"):
            run.ask(questions(pictures))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "--limit: expected at least 1, got 0"),
        ({"batch_size": 1}, "--batch-size: expected at least 2, got 1"),
        ({"max_tokens": 0}, "--max-tokens: expected at least 1"),
        ({"seed": -1}, "--seed: expected 0 to 2"),
        ({"prompt": "{question}\udcff"}, "--prompt: expected text"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError) as caught:
        Settings(**settings)
    assert message in str(caught.value)


def test_a_prompt_without_the_question_is_for_captions_alone(pictures):
    captions = [item for item in everything(pictures) if item.kind == "text"]
    instead = Settings(prompt="Describe it.")
    instead.check_prompt(captions)
    with pytest.raises(UserError, match=r"expected '\{question\}' in it, got 'Describe it\.'"):
        instead.check_prompt(questions(pictures))
    Settings(prompt="{question} Briefly.").check_prompt(questions(pictures))


# --- the file ---------------------------------------------------------------------------------


def row(key: str, **rest) -> dict:
    same = {"unit": "u", "image": None, "kind": "text", "prompt": "?", "label": "", "options": []}
    return {"key": key, **same, "about": {}, **rest}


def test_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as answers:
        answers.add(row("a", answer="\u00e9"))
        answers.add(row("b", answer="\u00e9"))
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2):  # in a character as well, and before the line's end
        path.write_bytes(whole[:-cut])
        with AnswerFile(path) as answers:
            assert list(answers.rows) == ["a"]
            answers.add(row("c", answer="\u00e4\n"))
        assert [one["key"] for one in read_rows(path)] == ["a", "c"]


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[1]",
        "{}",
        json.dumps(row("a") | {"unit": 3}),
        json.dumps(row("a") | {"kind": "song"}),
        json.dumps(row("a", answer=["yes"])),
        json.dumps(row("a", scores=["x"])),
        json.dumps(row("a") | {"options": ["yes", "no"], "blind_scores": [1.0]}),
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_answer_is_told(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(row("a")) + "\n" + line + "\n" + json.dumps(row("b")) + "\n")
    with pytest.raises(UserError, match=r"answers\.jsonl:2: expected an answer"):
        AnswerFile(path)
    with AnswerFile(path, fresh=True) as answers:
        assert answers.rows == {}
    assert path.read_text() == ""


def test_answers_are_replaced_as_a_whole_and_stay_locked(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as answers:
        answers.add(row("a"))
        answers.add(row("b"))
        answers.replace([row("b", answer="new")])
        with pytest.raises(UserError, match="another `agevlm evaluate` is writing it"):
            AnswerFile(path)
        answers.add(row("c"))
    assert [(one["key"], one.get("answer")) for one in read_rows(path)] == [
        ("b", "new"),
        ("c", None),
    ]
    assert [one.name for one in tmp_path.iterdir()] == ["answers.jsonl"]


def test_two_cannot_write_the_same_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as answers:
        answers.add(row("a"))
        with pytest.raises(UserError, match="another `agevlm evaluate` is writing it"):
            AnswerFile(path, fresh=True)
        assert len(read_rows(path)) == 1
