"""CLIP and SigLIP without the libraries they come from (those: tests/convert/*_parity.py)."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.vision import build_encoder, fitted

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 24,
    "patch_size": 8,
}
CLIP = SIZES | {"model_type": "clip_vision_model"}
SIGLIP = SIZES | {"model_type": "siglip_vision_model"}
SIGLIP2 = SIZES | {"model_type": "siglip2_vision_model"}
FAMILIES = pytest.mark.parametrize("config", [CLIP, SIGLIP, SIGLIP2])
TABLE = "embeddings.position_embedding.weight"


@FAMILIES
def test_one_token_for_every_patch(config):
    encoder = build_encoder(config)
    assert (encoder.grid, encoder.width) == ((3, 3), 16)
    assert encoder(mx.random.normal((2, 24, 24, 3))).shape == (2, 9, 16)


@FAMILIES
def test_pixels_left_over_by_the_patches_are_not_seen(config):
    encoder = build_encoder(config | {"image_size": 29})
    assert encoder.grid == (3, 3)
    pixels = mx.random.normal((1, 29, 29, 3))
    cut = mx.where((mx.arange(29) < 24)[:, None], pixels, 0.0)
    assert mx.array_equal(encoder(pixels), encoder(cut))


@FAMILIES
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_pixels_take_the_dtype_of_the_weights(config, dtype):
    encoder = build_encoder(config)
    encoder.update(tree_map(lambda p: p.astype(dtype), encoder.parameters()))
    assert encoder(mx.random.normal((1, 24, 24, 3))).dtype == dtype


@FAMILIES
def test_pixels_of_another_size_are_an_error(config):
    with pytest.raises(ValueError, match="expected 24x24 pixels, got"):
        build_encoder(config)(mx.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(("layer", "depth"), [(-1, 3), (-2, 2), (-3, 1), (3, 3), (1, 1)])
def test_clip_builds_no_layer_after_the_features(layer, depth):
    encoder = build_encoder(CLIP | {"vision_feature_layer": layer})
    assert len(encoder.encoder.layers) == depth
    assert not [name for name, _ in tree_flatten(encoder.parameters()) if "post_" in name]


def test_clips_default_is_the_layer_before_the_last():
    assert len(build_encoder(CLIP).encoder.layers) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "multiple of num_attention_heads (3), got 16"),
        ({"num_attention_heads": 0}, "multiple of num_attention_heads (0), got 16"),
        ({"image_size": 7}, "at least patch_size (8) and both positive, got 7"),
        ({"patch_size": 0}, "at least patch_size (0) and both positive, got 24"),
        ({"hidden_act": "gelu_new"}, "'quick_gelu' or 'gelu' or 'gelu_pytorch_tanh', got 'gelu_n"),
        ({"num_channels": 1}, "num_channels: expected 3, got 1"),
        ({"image_size": [24, 24]}, "image_size: expected int, got [24, 24]"),
    ],
)
@FAMILIES
def test_a_configuration_that_does_not_go_together(config, change, message):
    with pytest.raises(UserError) as error:
        build_encoder(config | change)
    assert message in str(error.value)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_feature_layer_that_is_not_there(layer):
    with pytest.raises(UserError, match=f"expected 1 to 3 or -3 to -1 .*, got {layer}$"):
        build_encoder(CLIP | {"vision_feature_layer": layer})


def test_the_preprocessing_is_what_each_was_trained_with():
    clip = Preprocessor.from_dict(build_encoder(CLIP).preprocessing)
    assert (clip.image_size, clip.resize, clip.resample) == (24, "crop", "bicubic")
    assert clip.convention == "transformers"
    assert clip.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert clip.image_std == (0.26862954, 0.26130258, 0.27577711)
    for config, resample in ((SIGLIP, "bicubic"), (SIGLIP2, "bilinear")):
        siglip = Preprocessor.from_dict(build_encoder(config).preprocessing)
        assert (siglip.image_size, siglip.resize, siglip.resample) == (24, "stretch", resample)
        assert siglip.image_mean == siglip.image_std == (0.5, 0.5, 0.5)


@FAMILIES
def test_weights_of_another_input_size_fit(config):
    small, large = build_encoder(config), build_encoder(config | {"image_size": 40})
    weights = dict(tree_flatten(small.parameters()))
    fit = {name: fitted(large, name, value) for name, value in weights.items()}
    assert {name for name in weights if fit[name] is not weights[name]} == {TABLE}
    large.load_weights(list(fit.items()))
    assert large(mx.zeros((1, 40, 40, 3))).shape == (1, 25, 16)
    assert all(fitted(small, name, value) is value for name, value in weights.items())


def test_clips_class_token_keeps_its_row():
    table = mx.random.normal((10, 16))
    out = fitted(build_encoder(CLIP | {"image_size": 40}), TABLE, table)
    assert mx.array_equal(out[0], table[0])


def test_siglip_2_averages_a_shrinking_table_and_siglip_does_not():
    one = mx.zeros((81, 16))
    one[0] = 1.0  # the corner of a 9x9 grid, which is far from the centre of a 3x3 grid's cell
    corner = {c["model_type"]: fitted(build_encoder(c), TABLE, one)[0] for c in (SIGLIP, SIGLIP2)}
    assert (corner["siglip_vision_model"] <= 0.01).all()
    assert (corner["siglip2_vision_model"] > 0.01).all()
