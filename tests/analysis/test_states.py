"""Hidden states as they are captured, against a pass through the layers by hand."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask

from agevlm_mlx.analysis.states import answer_states
from agevlm_mlx.data import chat
from agevlm_mlx.data.records import Turn
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.hidden_states import hidden_states

PROMPT = "Describe the image."
TEXTS = ["A dog.", "A dog and a big red car."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat.build_tokenizer([PROMPT, *TEXTS] * 3, 300)


@pytest.fixture(params=["cross", "concat"])
def model(request, tiny_model_config: Callable[..., Any]) -> AgeVLM:
    layers = {"layers": (1,)} if request.param == "cross" else {"layers": None}
    model = AgeVLM(tiny_model_config(300, fusion=request.param, **layers))
    mx.eval(model.parameters())
    return model


@pytest.fixture
def z_img(model: AgeVLM) -> mx.array:
    return model.project(model.encode(mx.random.normal((1, 16, 16, 3))))


def by_hand(model: AgeVLM, x: mx.array, cache: list[Any]) -> list[mx.array]:
    """The residual stream, one decoder layer after the other."""
    mask = create_attention_mask(x, cache[0])
    stream = [x]
    for layer, entry in zip(model.layers, cache, strict=True):
        stream.append(layer(stream[-1], mask, entry))
    return stream


def test_states_are_those_of_a_pass_layer_by_layer(model, z_img):
    ids = mx.array([[5, 6, 7, 8]])
    cache = model.look(z_img)
    with hidden_states(model.layers) as states:
        logits = model(ids, cache=cache)
    trunk = model.language_model.model
    stream = by_hand(model, trunk.embed_tokens(ids), model.look(z_img))
    assert len(states) == len(stream) == len(model.layers) + 1
    for seen, expected in zip(states, stream, strict=True):
        np.testing.assert_allclose(np.array(seen), np.array(expected), atol=1e-5)
    # The last state leads to the logits, so that nothing is missing between them.
    tied = "lm_head" not in model.language_model
    head = trunk.embed_tokens.as_linear if tied else model.language_model.lm_head
    out = head(trunk.norm(states[-1]))
    np.testing.assert_allclose(np.array(out), np.array(logits), atol=1e-5)


def test_layers_are_what_they_were_afterwards_also_after_an_error(model, z_img):
    classes = [type(layer) for layer in model.layers]
    before = np.array(model(mx.array([[5, 6]]), cache=model.look(z_img)))

    def fails() -> None:
        with hidden_states(model.layers) as states:
            model(mx.array([[5, 6]]), cache=model.look(z_img))
            assert len(states) > 0
            assert [type(layer) for layer in model.layers] != classes
            assert all(isinstance(a, c) for a, c in zip(model.layers, classes, strict=True))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert [type(layer) for layer in model.layers] == classes
    after = np.array(model(mx.array([[5, 6]]), cache=model.look(z_img)))
    np.testing.assert_array_equal(after, before)


def test_text_states_are_means_over_the_answers_own_tokens(model, z_img, tokenizer):
    text, _ = answer_states(model, tokenizer, z_img, TEXTS, PROMPT)
    assert text.shape == (2, len(model.layers) + 1, 32)
    assert text.dtype == np.float32
    for n, said in enumerate(TEXTS):  # each by itself, without padding
        prompt = len(chat.prompt_ids(tokenizer, (Turn("user", PROMPT),)))
        turns = (Turn("user", PROMPT), Turn("assistant", said))
        ids = mx.array([chat.encode(tokenizer, turns, ()).ids])
        x = model.language_model.model.embed_tokens(ids)
        for layer, state in enumerate(by_hand(model, x, model.look(z_img))):
            expected = np.array(state[0, prompt:-1].mean(0))  # the last token ends the answer
            np.testing.assert_allclose(text[n, layer], expected, atol=1e-5)


def test_image_states_of_concat_are_means_over_the_image_tokens(tiny_model_config, tokenizer):
    model = AgeVLM(tiny_model_config(300, fusion="concat", layers=None))
    z_img = model.project(model.encode(mx.random.normal((1, 16, 16, 3))))
    _, image = answer_states(model, tokenizer, z_img, TEXTS, PROMPT)
    stream = by_hand(model, z_img, model.make_cache())
    expected = np.stack([np.array(state[0].mean(0)) for state in stream])
    assert image is not None
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_image_states_of_cross_are_what_even_attention_writes(tiny_model_config, tokenizer):
    model = AgeVLM(tiny_model_config(300, layers=(1, 2), null_slot=False))
    z_img = model.project(model.encode(mx.random.normal((1, 16, 16, 3))))
    _, image = answer_states(model, tokenizer, z_img, TEXTS, PROMPT)
    written = []
    for i in (1, 2):
        block: Any = model.layers[i].cross_attn
        block.q_proj.weight = mx.zeros_like(block.q_proj.weight)  # now it looks evenly
        x = mx.random.normal((1, 1, 32))
        vision = model.look(z_img)[i].vision
        written.append(np.array((block(x, vision) - x)[0, 0]))
    # The embedding, after layer 0 (not grafted), after 1 and 2: each before its own layer.
    expected = np.stack([written[0], written[0], written[0], written[1]])
    assert image is not None
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_without_an_image_there_are_only_text_states(model, z_img, tokenizer):
    blind, image = answer_states(model, tokenizer, None, TEXTS, PROMPT)
    assert image is None
    seeing, _ = answer_states(model, tokenizer, z_img, TEXTS, PROMPT)
    # The embedding knows nothing of the image, the last state does.
    np.testing.assert_allclose(blind[:, 0], seeing[:, 0], atol=1e-6)
    assert np.abs(blind[:, -1] - seeing[:, -1]).max() > 1e-3
