"""Recomputed layers: the same values and gradients, in less memory."""

import contextlib
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from agevlm_mlx.config import ModelConfig
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.recompute import recomputed

ROWS, COLS = mx.array([3, 0, 5, 2]), mx.array([1, 4, 2, 2])


def inputs(images: int, texts: int, tokens: int) -> tuple[mx.array, list[mx.array]]:
    rng = np.random.default_rng(0)
    pixels = mx.array(rng.normal(size=(images, 16, 16, 3)).astype(np.float32))
    ids = rng.integers(40, size=(2, images * texts, tokens)).astype(np.int32)
    return pixels, [mx.array(group) for group in ids]


def step(model: AgeVLM, texts: int, tokens: int, checkpointed: bool) -> Any:
    """Loss, maps and gradients of two groups of texts, with maps and without."""
    pixels, groups = inputs(2, texts, tokens)

    def loss(params: dict[str, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        model.update(tree_unflatten(list(params.items())))
        seen = model.look(model.project(model.encode(pixels)))
        logits, maps = model.attend(groups[0], model.share(seen, texts), ROWS, COLS, 2)
        other = model(groups[1], model.share(seen, texts))
        # `seen` serves all groups and is not written to.
        last = model(groups[1], model.share(seen, texts))
        total = logits.square().mean() + other.square().mean() - mx.log(maps[..., :3].sum())
        return total, maps, (other - last).abs().max()

    params = dict(tree_flatten(model.trainable_parameters()))
    with recomputed(model) if checkpointed else contextlib.nullcontext():
        result = mx.value_and_grad(loss)(params)
    model.update(tree_unflatten(list(params.items())))
    mx.eval(result)
    return result


def compare(model: AgeVLM) -> None:
    (loss, maps, same), grads = step(model, 3, 6, checkpointed=False)
    (loss2, maps2, same2), grads2 = step(model, 3, 6, checkpointed=True)
    assert same.item() == same2.item() == 0
    assert loss2.item() == pytest.approx(loss.item(), abs=1e-6)
    np.testing.assert_allclose(np.array(maps2), np.array(maps), atol=1e-6)
    assert grads.keys() == grads2.keys()
    for name, grad in grads.items():
        assert name.endswith(("lm_head.weight", "null_value")) or grad.abs().max() > 0, name
        np.testing.assert_allclose(np.array(grads2[name]), np.array(grad), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("fusion", ["cross", "concat"])
@pytest.mark.parametrize("encoder", ["agevlm_vit", "siglip_vision_model"])
def test_loss_maps_and_gradients_are_the_same(tiny_model_config, fusion, encoder):
    layers = (1, 2) if fusion == "cross" else None
    config: ModelConfig = tiny_model_config(40, fusion=fusion, layers=layers)
    config.vision_config["model_type"] = encoder
    compare(AgeVLM(config))


def test_frozen_layers_pass_their_gradients_on(tiny_model):
    tiny_model.freeze()
    tiny_model.multi_modal_projector.unfreeze()
    tiny_model.layers[1].cross_attn.unfreeze()
    compare(tiny_model)


def test_classes_and_parameters_are_as_before(tiny_model):
    kinds = [type(layer) for layer in tiny_model.layers]
    params = dict(tree_flatten(tiny_model.parameters()))
    with recomputed(tiny_model):
        assert not [layer for layer, kind in zip(tiny_model.layers, kinds, strict=True)
                    if type(layer) is kind]  # fmt: skip
        tiny_model(mx.array([[1, 2]]), tiny_model.see(mx.zeros((1, 16, 16, 3))))
    assert [type(layer) for layer in tiny_model.layers] == kinds
    assert all(params[name] is value for name, value in tree_flatten(tiny_model.parameters()))


def test_a_cache_goes_on_after_a_checkpointed_pass(tiny_model):
    ids, pixels = mx.array([[1, 2, 3, 4, 5, 6]]), mx.random.normal((1, 16, 16, 3))
    whole = tiny_model(ids, tiny_model.see(pixels))
    with recomputed(tiny_model):
        cache = tiny_model.see(pixels)
        tiny_model(ids[:, :4], cache)
    rest = tiny_model(ids[:, 4:], cache)
    np.testing.assert_allclose(np.array(rest), np.array(whole[:, 4:]), atol=1e-5)


def test_dropout_is_refused(tiny_model):
    from mlx.nn import Dropout

    tiny_model.layers[0].dropout = Dropout(0.1)
    with pytest.raises(UserError, match=r"lora\.dropout = 0"), recomputed(tiny_model):
        pass
    tiny_model.layers[0].dropout = Dropout(0.0)
    with recomputed(tiny_model):
        pass


def test_the_backward_pass_takes_less_memory(tiny_model_config):
    config: ModelConfig = tiny_model_config(40, layers=(3, 7))
    config.text_config["num_hidden_layers"] = 12
    config.vision_config["num_hidden_layers"] = 4
    model = AgeVLM(config)
    mx.eval(model.parameters())
    peaks = []
    for checkpointed in (False, True):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step(model, 8, 32, checkpointed)
        peaks.append(mx.get_peak_memory() - before)
    print(f"peak: {peaks[0] / 2**20:.1f} MiB, recomputed {peaks[1] / 2**20:.1f} MiB")
    assert peaks[1] < 0.4 * peaks[0]
