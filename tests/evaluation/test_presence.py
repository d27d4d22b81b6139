"""The numbers of "Is it in the picture?" against the same computed by hand, one pass each."""

from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx import load
from agevlm_mlx.data import chat
from agevlm_mlx.data.image import load_image
from agevlm_mlx.data.nouns import NOUNS
from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.data.records import Turn
from agevlm_mlx.data.scene_texts import caption, likely_absent
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import presence
from agevlm_mlx.evaluation.asking import Asker
from agevlm_mlx.evaluation.grounding import grounding_score
from agevlm_mlx.evaluation.presence import (
    CONTROLS,
    LONGEST_TEXT,
    LONGEST_WORD,
    MOST_WORDS,
    Controls,
    Match,
    Presence,
    ask_about,
    examine,
    match,
    wanted,
)
from agevlm_mlx.weights import shipped


def cache(it: Any, image: Image.Image | None) -> list[Any]:
    if image is None:
        return it.model.make_cache()
    return it.model.see(mx.array(it.preprocessor(load_image(image))[0])[None])


def logits(it: Any, image: Image.Image | None, ids: list[int]) -> np.ndarray:
    """After the last of `ids`, in a pass of its own."""
    out = it.model(mx.array([ids]), cache=cache(it, image))[0, -1]
    return np.array(out.astype(mx.float32), np.float64)


def p_yes(it: Any, image: Image.Image | None, question: str) -> float:
    asked = Turn("user", question)
    ids = chat.prompt_ids(it.tokenizer, (asked,))
    after = logits(it, image, ids)
    first = {}
    for word in ("Yes", "No"):
        whole = chat.encode(it.tokenizer, (asked, Turn("assistant", word)), ()).ids
        first[word] = np.exp(after[whole[len(ids)]])
    return first["Yes"] / (first["Yes"] + first["No"])


def log_p(it: Any, image: Image.Image | None, sentence: str) -> float:
    turns = (Turn("user", "Describe the image."), Turn("assistant", sentence))
    ids = list(chat.encode(it.tokenizer, turns, ()).ids)
    start = len(chat.prompt_ids(it.tokenizer, turns[:1]))
    total = 0.0
    for k in range(start, len(ids)):
        after = logits(it, image, ids[:k])
        total += after[ids[k]] - np.log(np.exp(after - after.max()).sum()) - after.max()
    return total / (len(ids) - start)


def one(it: Any, image: Image.Image) -> Asker:
    return Asker(it, [image], load_image)


def test_a_word_by_hand(talker, noise):
    picture, words = noise(1), ["dog", "red car", "apple"]
    rows = ask_about(one(talker, picture), words)
    questions = ["Is there a dog?", "Is there a red car?", "Is there an apple?"]
    assert [row.word for row in rows] == words
    assert [row.question for row in rows] == questions
    for row, last in zip(rows, ("dog", "car", "apple"), strict=True):
        assert row.p_yes == pytest.approx(p_yes(talker, picture, row.question), abs=1e-4)
        assert row.blind == pytest.approx(p_yes(talker, None, row.question), abs=1e-4)
        assert abs(row.p_yes - row.blind) > 1e-3  # the control is another number
        ids = chat.prompt_ids(talker.tokenizer, (Turn("user", row.question),))
        # The word's own tokens: all from the first word's last one to the question mark.
        spelled = [talker.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
        end = next(n for n, text in enumerate(spelled) if text.rstrip("?").endswith(last))
        head = row.word.split()[0]
        start = next(n for n, text in enumerate(spelled) if text.endswith(head))
        columns = list(range(start, end + 1))
        _, maps = talker.model.attend(
            mx.array([ids]),
            cache(talker, picture),
            mx.zeros(len(columns), mx.int32),
            mx.array(columns),
        )
        by_hand = np.array(maps.mean((0, 1, 2))).reshape(talker.model.grid)
        assert row.look.shape == by_hand.shape
        assert row.look == pytest.approx(by_hand, abs=1e-5)
        assert row.grounding == pytest.approx(grounding_score(by_hand), abs=1e-4)
        assert (row.geometry.width, row.geometry.height) == picture.size


def test_a_sentence_by_hand(talker, noise):
    picture, controls = noise(1), Controls(talker)
    found = match(one(talker, picture), controls, "A turtle, cake")
    scenes = [make_scene(7, "uniform", int(n)) for n in controls.unlike(found.sentence)]
    assert len(scenes) == CONTROLS
    assert not any({"turtle", "cake"} & set(scene.nouns) for scene in scenes)
    assert found.log_p == pytest.approx(log_p(talker, picture, found.sentence), abs=1e-3)
    assert found.blind == pytest.approx(log_p(talker, None, found.sentence), abs=1e-3)
    others = [log_p(talker, Image.fromarray(scene.image), found.sentence) for scene in scenes]
    assert found.shuffled == pytest.approx(others, abs=1e-3)
    assert found.over_blind == pytest.approx(found.log_p - found.blind)
    assert found.over_shuffled == pytest.approx(found.log_p - np.mean(others), abs=1e-3)


def test_rank_among_the_controls():
    found = Match("A dog.", -1.0, -1.5, (-2.0, -1.0, -0.5, -3.0))
    assert (found.beaten, found.rank) == (2, 3)  # a tie is not beaten
    assert found.over_blind == 0.5
    assert found.over_shuffled == pytest.approx(0.625)


def test_controls_show_as_little_as_possible_of_the_sentence(tiny_talker):
    controls = Controls(tiny_talker("cross"))
    shown = [set(scene.nouns) for scene in (make_scene(7, "uniform", n) for n in range(12))]
    for noun in NOUNS:
        chosen = controls.unlike(f"Two {noun} and nothing else")
        assert len(set(chosen.tolist())) == CONTROLS
        assert not any(noun in shown[n] for n in chosen)
    every = controls.unlike(", ".join(NOUNS))  # no scene is free: the emptiest ones
    assert sorted(len(shown[n]) for n in every) == sorted(map(len, shown))[:CONTROLS]


def test_many_words_are_asked_in_several_passes_with_the_same_numbers(talker, noise, monkeypatch):
    words = ", ".join(NOUNS[:9])
    controls = Controls(talker)
    passes = list(examine(talker, noise(2), words, controls))
    assert [len(step.rows) for step in passes] == [0, 8, 9, 9]
    assert [step.match is not None for step in passes] == [False, False, False, True]
    alone = [ask_about(one(talker, noise(2)), [noun])[0] for noun in NOUNS[:9]]
    for row, other in zip(passes[-1].rows, alone, strict=True):
        assert row.word == other.word
        assert row.p_yes == pytest.approx(other.p_yes, abs=1e-4)
        assert row.look == pytest.approx(other.look, abs=1e-5)
    assert passes[-1].match.sentence == caption(NOUNS[:9])


def test_closing_stops_it(tiny_talker, noise, monkeypatch):
    it, asked = tiny_talker("cross"), []
    monkeypatch.setattr(presence, "ask_about", lambda asker, words: asked.append(words) or [])
    controls = Controls(it)
    steps = examine(it, noise(0), ", ".join(NOUNS[:20]), controls)
    assert len(list(islice(steps, 2))) == 2
    steps.close()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "words", "sentence"),
    [
        ("dog, red car; house", ("dog", "red car", "house"), "A dog, a red car and a house."),
        ("Dog\n a dog\nThe  DOG ,apple,", ("dog", "apple"), "A dog and an apple."),
        ("A dog and a cat.", ("dog", "cat"), "A dog and a cat."),
        ("A dog, a car\n and a  pizza.", ("dog", "car", "pizza"), "A dog, a car and a pizza."),
        ("there is a dog", ("dog",), "there is a dog"),
        ("big old red fire engine", ("big", "old", "red", "fire", "engine"), None),
        ("traffic light", ("traffic light",), "A traffic light."),
        ("ein Hund; éléphant", ("ein hund", "éléphant"), None),
    ],
)
def test_reading_words_and_sentences(text, words, sentence):
    found = wanted(text)
    assert found.words == words
    assert found.left_out == 0
    if sentence is not None:
        assert found.sentence == sentence


def test_too_many_words_are_left_out_and_counted():
    text = ", ".join(NOUNS[: MOST_WORDS + 3])
    found = wanted(text)
    assert found.words == NOUNS[:MOST_WORDS]
    assert found.left_out == 3
    assert found.sentence == caption(NOUNS[:MOST_WORDS])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "got nothing"),
        (" \n,;", "got ',;'"),
        ("is there a", "got 'is there a'"),
        ("12 %", "words for things"),
        ("x" * (LONGEST_TEXT + 1), f"at most {LONGEST_TEXT} characters, got {LONGEST_TEXT + 1}"),
        ("x" * (LONGEST_WORD + 1), f"at most {LONGEST_WORD} characters, got {LONGEST_WORD + 1}"),
        ("dog \ud83d", "not UTF-8"),
    ],
)
def test_texts_that_cannot_be_asked(text, why):
    with pytest.raises(UserError, match="expected") as error:
        wanted(text)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["", "the", " dog", "red\ncar", "x" * 41, "42"])
def test_words_that_a_question_cannot_hold(word, tiny_talker, noise):
    with pytest.raises(UserError, match="word: expected"):
        ask_about(one(tiny_talker("cross"), noise(0)), ["dog", word])


def test_an_empty_sentence_and_no_words(tiny_talker, noise):
    it = tiny_talker("cross")
    asker = one(it, noise(0))
    assert ask_about(asker, []) == []
    with pytest.raises(UserError, match="sentence: expected"):
        match(asker, Controls(it), " \n")


def test_yes_and_no_that_begin_alike(tiny_talker, noise, monkeypatch):
    it = tiny_talker("cross")
    controls = Controls(it)
    monkeypatch.setattr(Asker, "first_token", lambda self, answer: 7)
    with pytest.raises(UserError, match="'Yes' and 'No'"):
        next(examine(it, noise(0), "dog", controls))


@pytest.mark.parametrize("margin", [-2000.0, -3.0, 0.0, 2000.0])
def test_p_yes_is_a_softmax_that_never_overflows(margin):
    expected = np.exp(-np.logaddexp(0, -margin))
    assert presence._p_yes(margin) == pytest.approx(expected, abs=1e-12)


@pytest.mark.e2e
def test_the_shipped_model_tells_what_is_there():
    it = load(shipped("model"))
    controls = Controls(it)
    there, not_there, rank = [], [], []
    for number in range(6):
        scene = make_scene(11, "test", number)
        nouns = [scene.nouns[i] for i in scene.left_to_right()]
        absent = likely_absent(list(scene.nouns))[:2]
        picture = Image.fromarray(scene.image)
        rows: list[Presence] = ask_about(one(it, picture), [*nouns, *absent])
        there += [row.p_yes for row in rows[: len(nouns)]]
        not_there += [row.p_yes for row in rows[len(nouns) :]]
        right = match(one(it, picture), controls, caption(nouns))
        wrong = match(one(it, picture), controls, caption(absent))
        assert right.over_blind > wrong.over_blind
        rank.append(right.rank)
    assert np.mean(there) > 0.75 > 0.35 > np.mean(not_there)
    assert np.median(rank) == 1
