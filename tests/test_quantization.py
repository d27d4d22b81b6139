"""Quantising a model in memory; the command's tests are those of `agevlm-convert quantize`."""

from dataclasses import replace

import mlx.core as mx
import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.quantization import fitting_group_size, layers_by_bits, nbytes, quantize_model
from agevlm_mlx.weights import load


def test_quantising_evaluates_nothing(tiny_checkpoint):
    loaded = load(tiny_checkpoint, lazy=True)
    mx.clear_cache()
    before = mx.get_active_memory()
    quantize_model(loaded.model, 4, 32)
    assert mx.get_active_memory() - before < 4096


def wide(config, width: int) -> AgeVLM:
    return AgeVLM(replace(config, text_config=config.text_config | {"hidden_size": width}))


@pytest.mark.parametrize(("width", "size"), [(32, 32), (64, 64), (96, 32), (128, 64)])
def test_the_group_that_reaches_more_of_the_model(tiny_config, width, size):
    # Of the 32-wide model 64 fits the feed-forward's output only, of the 96-wide one too.
    text = tiny_config.text_config | {"intermediate_size": 128, "head_dim": 16}
    config = replace(tiny_config, text_config=text)
    assert fitting_group_size(wide(config, width)) == size


def test_fewer_bits_fewer_bytes_and_nothing_outside_the_language_model(tiny_config):
    sizes = []
    for bits in (8, 4):
        model = wide(tiny_config, 64)
        before = nbytes(model)
        settings = quantize_model(model, bits, fitting_group_size(model))
        assert settings == {"group_size": 32, "bits": bits}
        found = layers_by_bits(model)
        assert set(found) == {bits}
        assert all(path.startswith("language_model.") for path in found[bits])
        sizes.append(nbytes(model))
        assert sizes[-1] < before
    assert sizes[1] < sizes[0]


def test_a_model_that_nothing_fits_is_left_as_it_is(tiny_config):
    model = wide(replace(tiny_config, text_config=tiny_config.text_config
                         | {"intermediate_size": 40, "head_dim": 10}), 40)  # fmt: skip
    before = nbytes(model)
    with pytest.raises(UserError, match="a multiple of 32, found none; keep the full precision"):
        fitting_group_size(model)
    with pytest.raises(UserError, match=r"group_size: expected a divisor .* got 32; keep the full"):
        quantize_model(model, 4, 32)
    assert nbytes(model) == before
