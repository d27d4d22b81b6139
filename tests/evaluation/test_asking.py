"""Batched questions give what one question at a time gives, on real (tiny, random) models."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from PIL import Image

from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data import chat
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.asking import Asker
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.weights import Loaded

QUESTIONS = [
    ["Is there a dog?"],
    ["Is there a strawberry in the image?", "Is there a car?", "Is there a dog?"],
    [],
    ["Is there a car?", "Is there a dog in the image?"],
]

#: Tokens whose probabilities are compared.
EVERY = list(range(0, 300, 7))


@pytest.fixture(params=["cross", "concat"])
def loaded(request: pytest.FixtureRequest, tiny_model_config: Callable[..., ModelConfig]) -> Loaded:
    texts = [q for row in QUESTIONS for q in row] + ["Yes", "No", "Describe the image. A dog."] * 3
    tokenizer = TokenizerWrapper(chat.build_tokenizer(texts, 400))
    fusion = {"fusion": request.param, "gate_init": 1.0}
    if request.param == "concat":
        fusion = {"fusion": "concat", "layers": None}
    model = AgeVLM(tiny_model_config(400, **fusion))
    mx.eval(model.parameters())
    return Loaded(model, tokenizer, Preprocessor(image_size=16), Path("tiny"))


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)) for _ in range(4)]


def asker(loaded: Loaded, images: list[Image.Image], batch_size: int) -> Asker:
    return Asker(loaded, images, lambda image: image, batch_size)


def alone(loaded: Loaded, image: Image.Image, ids: list[int]) -> np.ndarray:
    """The logits after `ids`, one picture and one text at a time."""
    pixels = mx.array(loaded.preprocessor(image)[0])[None]
    logits = loaded.model(mx.array([ids]), cache=loaded.model.see(pixels))
    return np.array(logits[0, -1].astype(mx.float32))


def test_padded_batches_equal_single_questions(loaded, images):
    many = asker(loaded, images, 3)
    prompts = [[many.prompt(q) for q in row] for row in QUESTIONS]
    order = np.array([1, 2, 3, 0])
    for shown, (found, margins) in (
        (np.arange(4), (many.next_log_p(prompts, EVERY), many.margins(prompts))),
        (order, (many.next_log_p(prompts, EVERY, order), many.margins(prompts, order))),
    ):
        assert [len(row) for row in found] == [1, 3, 0, 2]
        for i, row in enumerate(found):
            for log_p, margin, ids in zip(row, margins[i], prompts[i], strict=True):
                expected = alone(loaded, images[shown[i]], ids)
                expected -= np.logaddexp.reduce(expected)
                assert log_p == pytest.approx(expected[EVERY], abs=1e-4)
                assert margin == pytest.approx(expected[many.yes] - expected[many.no], abs=1e-4)


def test_the_picture_matters(loaded, images):
    many = asker(loaded, images, 4)
    prompts = [[many.prompt("Is there a dog?")]] * 4
    margins = [row[0] for row in many.margins(prompts)]
    assert len({round(m, 5) for m in margins}) == 4


def test_blind_is_the_language_model_alone(loaded, images):
    many = asker(loaded, images, 2)
    blind = many.blind_margins([q for row in QUESTIONS for q in row])
    assert set(blind) == {q for row in QUESTIONS for q in row}
    for question, margin in blind.items():
        ids = mx.array([many.prompt(question)])
        logits = np.array(loaded.model.language_model(ids)[0, -1].astype(mx.float32))
        assert margin == pytest.approx(logits[many.yes] - logits[many.no], abs=1e-4)


def mean_log_p(loaded: Loaded, after: Callable[[list[int]], np.ndarray], answer: str) -> float:
    """Of the answer's tokens and the end, one pass each; `after` gives the logits after ids."""
    turns = (Turn("user", "Describe the image."), Turn("assistant", answer))
    encoded = chat.encode(loaded.tokenizer, turns, ())
    prompt = len(chat.prompt_ids(loaded.tokenizer, turns[:1]))
    total = 0.0
    for k in range(prompt, len(encoded.ids)):
        logits = after(list(encoded.ids[:k]))
        total += logits[encoded.ids[k]] - np.log(np.exp(logits).sum())
    return total / (len(encoded.ids) - prompt)


@pytest.mark.parametrize("order", [None, np.array([1, 2, 3, 0])])
def test_log_likelihood_is_the_mean_over_the_answers_tokens(loaded, images, order):
    many = asker(loaded, images, 3)
    answers = [["A dog.", "A car and a strawberry."]] * 4
    found = many.log_likelihood("Describe the image.", answers, order)
    assert [len(row) for row in found] == [2] * 4
    shown = images[2 if order is None else order[2]]
    expected = mean_log_p(loaded, lambda ids: alone(loaded, shown, ids), answers[0][1])
    assert found[2][1] == pytest.approx(expected, abs=1e-4)


def test_blind_log_likelihood_is_the_language_model_alone(loaded, images):
    answers = ["A dog.", "A car and a strawberry.", "No"]
    found = asker(loaded, images[:1], 1).blind_log_likelihood("Describe the image.", answers)

    def after(ids: list[int]) -> np.ndarray:
        return np.array(loaded.model.language_model(mx.array([ids]))[0, -1].astype(mx.float32))

    assert found == pytest.approx([mean_log_p(loaded, after, a) for a in answers], abs=1e-4)


def test_maps_are_taken_at_the_nouns_tokens(loaded, images):
    many = asker(loaded, images, 3)
    pairs = [[(q, q.split()[3].strip("?")) for q in row] for row in QUESTIONS]
    maps = many.phrase_maps(pairs)
    assert [len(row) for row in maps] == [1, 3, 0, 2]
    ids = many.prompt("Is there a car?")
    spelled = [loaded.tokenizer.decode([i]).strip() for i in ids]
    column = spelled.index("car")
    pixels = mx.array(loaded.preprocessor(images[1])[0])[None]
    _, one = loaded.model.attend(
        mx.array([ids]), loaded.model.see(pixels), mx.array([0]), mx.array([column])
    )
    assert maps[1][1].shape == one.shape[1:]
    assert np.allclose(maps[1][1], np.array(one[0]), atol=1e-5)


def test_words_that_begin_or_end_without_a_letter_have_a_place(loaded, images):
    many = asker(loaded, images[:1], 1)
    words = ("C++", "#1", "dog")
    (maps,) = many.phrase_maps([[(f"Is there a {word}?", word) for word in words]])
    assert len(maps) == 3
    with pytest.raises(ValueError, match="is not in"):
        many.phrase_maps([[("Is there a dogfish?", "dog")]])


def test_a_tokenizer_in_which_yes_and_no_begin_alike_is_refused(loaded, images, monkeypatch):
    monkeypatch.setattr(Asker, "first_token", lambda self, answer: 7)
    with pytest.raises(UserError, match="'Yes' and 'No'"):
        asker(loaded, images, 2)


def test_a_large_vocabulary_takes_more_passes_and_gives_the_same(loaded, images, monkeypatch):
    many = asker(loaded, images, 4)
    answers = [["A dog.", "A car and a strawberry."]] * 4
    whole = many.log_likelihood("Describe the image.", answers)
    passes: list[tuple[int, ...]] = []
    log_p = Asker._log_p
    monkeypatch.setattr(
        Asker,
        "_log_p",
        lambda self, ids, cache: passes.append(ids.shape) or log_p(self, ids, cache),
    )
    monkeypatch.setattr("agevlm_mlx.evaluation.asking._MOST_LOGITS", 400 * 60)
    assert np.allclose(many.log_likelihood("Describe the image.", answers), whole, atol=1e-4)
    assert len(passes) > 1
    assert all(rows * length <= 60 for rows, length in passes)


def test_only_images_that_are_asked_about_are_read(loaded, images, monkeypatch):
    many = asker(loaded, images, 4)
    ids = many.prompt("Is there a dog?")
    ((wanted,),) = many.next_log_p([[ids]], EVERY)
    shapes: list[tuple[int, ...]] = []
    found = Asker._next
    monkeypatch.setattr(
        Asker, "_next", lambda self, ids, *rest: shapes.append(ids.shape) or found(self, ids, *rest)
    )
    assert np.allclose(many.next_log_p([[ids], [], [], []], EVERY)[0][0], wanted, atol=1e-4)
    assert shapes == [(1, len(ids))]


def test_long_texts_are_read_alone_and_memory_is_bounded(loaded, images, monkeypatch):
    many = asker(loaded, images, 4)
    questions = [[*row, "Is there a dog? " * 9] for row in QUESTIONS]
    prompts = [[many.prompt(q) for q in row] for row in questions]
    pairs = [[(q, "dog") for q in row if "dog" in q] for row in questions]
    blind = [ids for row in prompts for ids in row]

    def everything() -> list[np.ndarray]:
        found = [log_p for row in many.next_log_p(prompts, EVERY) for log_p in row]
        found += many.blind_log_p(blind, EVERY)
        return found + [one for row in many.phrase_maps(pairs) for one in row]

    whole, shapes = everything(), []
    call = type(loaded.model).__call__
    monkeypatch.setattr(
        type(loaded.model),
        "__call__",
        lambda self, ids, *rest, **more: shapes.append(ids.shape) or call(self, ids, *rest, **more),
    )
    monkeypatch.setattr("agevlm_mlx.evaluation.asking._SHORT", 30)
    monkeypatch.setattr("agevlm_mlx.evaluation.asking._MOST_PAIRS", 4 * 30 * 30 * 4)
    for one, other in zip(everything(), whole, strict=True):
        assert np.allclose(one, other, atol=1e-4)
    longest = max(map(len, blind))
    assert longest > 50
    assert all(rows == 1 for rows, T in shapes if T > 30)
    assert all(rows * T * T <= 4 * 30 * 30 for rows, T in shapes if T <= 30 and rows > 3)


def test_an_image_that_is_refused_is_left_out_and_told(loaded, images):
    def open_image(image: Image.Image) -> Image.Image:
        if image is images[1]:
            raise UserError("broken")
        return image

    refused = []
    many = Asker(loaded, images, open_image, 2, lambda *both: refused.append(both))
    assert len(many.geometries) == len(many.z_img) == 3
    [(image, error)] = refused
    assert image is images[1]
    assert str(error) == "broken"
    with pytest.raises(UserError, match="broken"):
        Asker(loaded, images, open_image)
