"""Our models as a benchmark asks them: batched answers are those of one question alone."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from PIL import Image

from agevlm_mlx import respondents, weights
from agevlm_mlx.config import ModelConfig
from agevlm_mlx.data import chat
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation.respondent import Request
from agevlm_mlx.generation import generate
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.respondents import Ours
from agevlm_mlx.weights import Loaded

QUESTIONS = ("Is there a dog?", "Is there a strawberry in the image?", "Describe the image.")


@pytest.fixture(params=["cross", "concat"])
def ours(
    request: pytest.FixtureRequest,
    tiny_model_config: Callable[..., ModelConfig],
    tmp_path: Path,
) -> Ours:
    words = [*QUESTIONS, "Yes", "No", "A dog and a car."] * 3
    tokenizer = TokenizerWrapper(chat.build_tokenizer(words, 400))
    fusion = {"fusion": "cross", "gate_init": 1.0}
    if request.param == "concat":
        fusion = {"fusion": "concat", "layers": None}
    mx.random.seed(1)
    model = AgeVLM(tiny_model_config(400, **fusion))
    weights.save_model(tmp_path / "mine", model, tokenizer, Preprocessor(image_size=16), "")
    return Ours(Loaded(model, tokenizer, Preprocessor(image_size=16), tmp_path / "mine"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    return paths


def alone(loaded: Loaded, image: Path | None, ids: list[int]) -> np.ndarray:
    """Log-probabilities after `ids`, by one pass over one text."""
    if image is None:
        cache = loaded.model.make_cache()
    else:
        with Image.open(image) as opened:
            pixels, _ = loaded.preprocessor(opened)
        cache = loaded.model.see(mx.array(pixels[None]))
    logits = np.array(loaded.model(mx.array([ids]), cache=cache)[0, -1], np.float64)
    return logits - np.logaddexp.reduce(logits)


def requests(images: list[Path]) -> list[Request]:
    """Out of order, some twice, and some without a picture."""
    places = [images[2], None, images[0], images[2], images[1], None]
    return [Request(image, QUESTIONS[n % 3]) for n, image in enumerate(places)]


def test_answers_are_those_of_one_question_alone(ours, images):
    assert ours.show(images) == {}
    loaded, asked = ours.loaded, requests(images)
    said = dict(ours.generate(asked, 6))
    for n, request in enumerate(asked):
        expected = generate(
            loaded.model, loaded.tokenizer, loaded.preprocessor, request.prompt,
            request.image or (), max_tokens=6,
        )  # fmt: skip
        assert said[n] == expected


def test_options_count_every_spelling_of_yes(ours, images):
    ours.show(images)
    asked = requests(images)
    tokenizer = ours.loaded.tokenizer
    found = ours.options(asked, [("yes", "no", "A")] * len(asked))

    def first(word: str) -> int:
        return tokenizer.encode(word, add_special_tokens=False)[0]

    for request, (yes, _, letter) in zip(asked, found, strict=True):
        ids = chat.prompt_ids(tokenizer, (Turn("user", request.prompt),))
        log_p = alone(ours.loaded, request.image, ids)
        spelled = {first(word) for word in ("yes", "Yes", "YES")}
        assert yes == pytest.approx(np.log(sum(np.exp(log_p[t]) for t in spelled)), abs=1e-4)
        assert letter == pytest.approx(log_p[first("A")], abs=1e-4)


def test_likelihoods_are_means_over_the_tokens_of_an_answer(ours, images):
    ours.show(images)
    asked = requests(images)
    captions = [("A dog and a car.", "A dog."), ("A car.",)] * 3
    found = ours.log_likelihood(asked, captions)
    for request, answers, values in zip(asked, captions, found, strict=True):
        for answer, value in zip(answers, values, strict=True):
            turns = (Turn("user", request.prompt), Turn("assistant", answer))
            ids = list(chat.encode(ours.loaded.tokenizer, turns, ()).ids)
            start = len(chat.prompt_ids(ours.loaded.tokenizer, turns[:1]))
            each = [
                alone(ours.loaded, request.image, ids[:k])[ids[k]] for k in range(start, len(ids))
            ]
            assert value == pytest.approx(np.mean(each), abs=1e-4)


def test_looks_are_by_layer_and_head(ours, images):
    ours.show(images)
    asked = [Request(images[1], "Is there a dog?"), Request(images[0], "Is there a car?")]
    first, second = ours.look(asked, ["dog", "car"])
    model = ours.loaded.model
    heads = model.args.num_attention_heads
    assert first.attention.shape == (len(model.looking_layers), heads, *model.grid)
    total = first.attention.sum((2, 3))
    if model.fusion == "cross" and model.config.fusion_config.null_slot:
        assert np.allclose(total + first.null, 1, atol=1e-4)
    else:
        assert first.null is None
        assert (total < 1.0001).all()
    assert (second.geometry.width, second.geometry.height) == (30, 20)
    assert not np.allclose(first.attention, second.attention)


def test_what_cannot_be_read_is_told_and_what_was_shown_before_is_gone(ours, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    bad = ours.show([images[0], broken, images[1], images[0]])
    assert list(bad) == [broken]
    assert "broken.png" in bad[broken]
    assert len(list(ours.generate([Request(images[1], "Is there a dog?")], 2))) == 1
    ours.show([images[2]])
    with pytest.raises(KeyError):
        list(ours.generate([Request(images[1], "Is there a dog?")], 2))


def test_what_a_result_says_of_the_model(ours):
    about = ours.about
    assert about["fusion"] == ours.loaded.model.fusion
    assert about["name"] == "mine"
    assert about["fingerprint"] == weights.fingerprint(ours.loaded.path)
    assert about["parameters"] > 1000


def test_the_model_is_chosen_by_its_configuration(tiny_checkpoint, tmp_path, monkeypatch):
    assert isinstance(respondents.respondent(str(tiny_checkpoint)), Ours)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava"}')
    opened = []
    monkeypatch.setattr("agevlm_mlx.foreign.Foreign", lambda model: opened.append(model))
    respondents.respondent(str(other))
    assert opened == [str(other)]
    with pytest.raises(UserError, match="nowhere"):
        respondents.respondent("nowhere/at/all")
