"""SAM's image encoder: sizes, the way images go through it, and positions for other sizes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from agevlm_mlx.config import from_dict
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.vision import build_encoder, sam

CONFIG = {
    "model_type": "sam_vision_model",
    "image_size": 40,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 24,
    "output_channels": 6,
    "window_size": 3,
    "global_attn_indexes": [1],
}


def encoder(**changes) -> sam.SamEncoder:
    """An encoder with random weights, also where SAM's start at zero."""
    model = build_encoder(CONFIG | changes)
    rng = np.random.default_rng(0)
    weights = dict(tree_flatten(model.parameters()))
    noise = {k: mx.array(rng.normal(0, 0.3, v.shape), mx.float32) for k, v in weights.items()}
    model.update(tree_unflatten(list(noise.items())))
    return model


def pixels(n: int, side: int = 40) -> mx.array:
    return mx.array(np.random.default_rng(1).normal(size=(n, side, side, 3)), mx.float32)


def test_it_says_its_grid_width_and_pixels():
    model = encoder()
    assert model.grid == (5, 5)
    assert model.width == 6
    assert model(pixels(2)).shape == (2, 25, 6)
    wanted = Preprocessor.from_dict(model.preprocessing)
    assert (wanted.image_size, wanted.convention, wanted.fill) == (40, "sam", "zero")


def test_vit_b_is_the_default():
    default = sam.SamConfig()
    assert sam.SamEncoder(default).grid == (64, 64)
    names = dict(tree_flatten(sam.SamEncoder(default).parameters()))
    assert names["layers.0.attn.rel_pos_h"].shape == (27, 64)
    assert names["layers.2.attn.rel_pos_h"].shape == (127, 64)


@pytest.mark.parametrize("images", [1, 2])
def test_images_in_parts_are_images_together(monkeypatch, images):
    model, x = encoder(), pixels(5)

    def loss() -> mx.array:
        return (model(x) ** 3).sum()

    together, its_gradients = nn.value_and_grad(model, loss)()
    # The global layer: `images` of 5 at a time, 2 heads, 25 x 25 scores.
    monkeypatch.setattr(sam, "_BIAS_ELEMENTS", images * 2 * 25 * 25)
    parts, gradients = nn.value_and_grad(model, loss)()
    assert together.item() == pytest.approx(parts.item(), rel=1e-4)
    wanted = dict(tree_flatten(its_gradients))
    for name, got in tree_flatten(gradients):
        np.testing.assert_allclose(np.array(got), np.array(wanted[name]), 1e-3, 1e-3, err_msg=name)


def test_biases_of_many_images_are_not_in_memory_at_once(monkeypatch):
    model = encoder(image_size=160, global_attn_indexes=[0], num_hidden_layers=1)
    bias = 2 * 400 * 400  # numbers, of one image
    x = pixels(24, 160)
    mx.eval(model.parameters(), x)

    def peak(images: int) -> int:
        """Bytes beside the model's own, with the biases of so many images at once."""
        monkeypatch.setattr(sam, "_BIAS_ELEMENTS", images * bias)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(model(x))
        return mx.get_peak_memory() - before

    one = peak(1)
    assert 4 * bias < one < peak(24) / 3


def test_an_image_does_not_depend_on_its_batch():
    model, x = encoder(), pixels(3)
    np.testing.assert_allclose(model(x)[1:2], model(x[1:2]), atol=1e-5)


def test_a_window_sees_itself_and_the_padding_only():
    model = encoder(global_attn_indexes=[], num_hidden_layers=1)
    x = np.array(pixels(1))
    changed = x.copy()
    changed[:, :8, :8] += 1  # the first cell, in the window of cells 0..2 down and across
    difference = np.abs(np.array(model(mx.array(changed)) - model(mx.array(x)))).reshape(5, 5, -1)
    moved = difference.max(-1) > 1e-6
    assert moved[:4, :4].all()  # the neck mixes in the next cell
    assert not moved[4:].any()
    assert not moved[:, 4:].any()


def test_half_precision_weights_take_float32_pixels():
    model = encoder()
    exact = np.array(model(pixels(1)))
    model.set_dtype(mx.float16)
    tokens = model(pixels(1))
    assert tokens.dtype == mx.float16
    np.testing.assert_allclose(tokens, exact, atol=0.05)


def test_other_pixels_are_refused():
    with pytest.raises(ValueError, match="expected 40x40"):
        encoder()(pixels(1, 48))


def test_positions_that_fit_are_kept_and_others_fitted():
    small, large = encoder(), encoder(image_size=64)
    for name, value in tree_flatten(small.parameters()):
        fitted = large.fitted(name, value)
        assert fitted.shape == dict(tree_flatten(large.parameters()))[name].shape
        # Only what belongs to the grid or to a layer that sees all of it.
        depends = name in ("pos_embed", "layers.1.attn.rel_pos_h", "layers.1.attn.rel_pos_w")
        assert (fitted is value) != depends, name
        assert small.fitted(name, value).shape == value.shape
    np.testing.assert_array_equal(small.fitted("pos_embed", small.pos_embed), small.pos_embed)


def test_relative_positions_stay_where_they_are():
    # A table that rises with the distance still does, from the same lowest to the same highest.
    table = mx.broadcast_to(mx.arange(9.0)[:, None], (9, 8))
    fitted = np.array(encoder(image_size=64).fitted("layers.1.attn.rel_pos_h", table))
    assert fitted.shape == (15, 8)
    np.testing.assert_allclose(fitted[[0, 7, 14], 0], [0, 4, 8], atol=1e-5)
    inner = np.diff(fitted[1:-1, 0])
    np.testing.assert_allclose(inner, 9 / 15, atol=1e-5)


def test_tables_of_no_use_are_left_for_the_check_of_shapes():
    model = encoder()
    for name, shape in (
        ("pos_embed", (1, 4, 9, 16)),
        ("pos_embed", (25, 16)),
        ("layers.7.attn.rel_pos_h", (5, 8)),
        ("layers.1.attn.rel_pos_w", (5,)),
    ):
        value = mx.zeros(shape)
        assert model.fitted(name, value) is value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 44}, "image_size: expected a multiple of patch_size"),
        ({"num_attention_heads": 3}, "hidden_size: expected a multiple of num_attention_heads"),
        ({"window_size": -1}, "window_size: expected 0"),
        ({"global_attn_indexes": [2]}, "global_attn_indexes: expected layers below"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_sizes_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(sam.SamConfig, CONFIG | changes, "vision_config")
