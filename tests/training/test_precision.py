"""bfloat16 inside, float32 where it counts: losses, maps, gradients and the weights themselves."""

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.config import FusionConfig, ModelConfig
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.training.losses import attention_loss, feature_loss, token_loss
from agevlm_mlx.training.objective import FeatureAdaptor, loss_and_gradients
from agevlm_mlx.training.optim import AdamW
from agevlm_mlx.training.rules import named_parameters
from agevlm_mlx.training.stages import AttentionLoss, Losses

from .conftest import VOCABULARY, noise_batch

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24}
PATCHES = {"image_size": 16, "patch_size": 4, "intermediate_size": 48, **SMALL}
ENCODERS = {
    "agevlm_vit": PATCHES,
    "siglip_vision_model": PATCHES,
    "clip_vision_model": PATCHES,
    "convnext_clip": {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]},
    "sam_vision_model": {
        "image_size": 16,
        "patch_size": 4,
        "mlp_dim": 48,
        "window_size": 2,
        "global_attn_indexes": [1],
        **SMALL,
    },
}


@pytest.mark.parametrize("projector", ["linear", "mlp", "pixel_shuffle"])
@pytest.mark.parametrize("fusion", ["cross", "concat"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_model_of_bfloat16_weights_computes_in_bfloat16_and_its_maps_in_float32(
    tiny_model_config, encoder, fusion, projector
):
    layers = {"layers": (1, 2), "gated_mlp": True} if fusion == "cross" else {}
    model = AgeVLM(
        ModelConfig(
            text_config=tiny_model_config().text_config,
            vision_config={"model_type": encoder, **ENCODERS[encoder]},
            fusion_config=FusionConfig(fusion=fusion, projector=projector, **layers),
        )
    )
    model.set_dtype(mx.bfloat16)
    side = ENCODERS[encoder]["image_size"]
    z_vis = model.encode(mx.zeros((1, side, side, 3)))
    z_img = model.project(z_vis)
    cache = model.look(z_img, texts=2)
    logits, maps = model.attend(
        mx.array([[1, 2, 3], [4, 5, 6]]), cache, mx.array([0, 1]), mx.array([1, 1])
    )
    inside = [z_vis, z_img, logits, cache[1].keys, cache[1].values]
    if fusion == "cross":
        inside += [cache[1].vision.keys, cache[1].vision.values]
    assert {array.dtype for array in inside} == {mx.bfloat16}
    assert maps.dtype == mx.float32


@pytest.mark.parametrize("fusion", ["cross", "concat"])
def test_losses_and_gradients_of_a_bfloat16_step_are_float32(tiny_model_config, fusion):
    layers = (1, 2) if fusion == "cross" else None
    model = AgeVLM(tiny_model_config(VOCABULARY, fusion=fusion, layers=layers))
    model.sam_adaptor = FeatureAdaptor(24, 6, (4, 4), (4, 4))
    params = named_parameters(model)
    batch = noise_batch(0, 2, 2, channels=6)
    losses = Losses(attention=AttentionLoss(weight=0.3), features=0.5)
    (full, full_parts), full_grads = loss_and_gradients(model, params, batch, losses)
    (loss, parts), grads = loss_and_gradients(model, params, batch, losses, dtype=mx.bfloat16)
    assert {v.dtype for v in named_parameters(model).values()} == {mx.bfloat16}
    assert {loss.dtype, parts.dtype, *(g.dtype for g in grads.values())} == {mx.float32}
    assert loss.item() == pytest.approx(full.item(), rel=0.01)
    assert loss.item() != full.item()
    np.testing.assert_allclose(np.array(parts), np.array(full_parts), rtol=0.02)
    for name, grad in full_grads.items():
        size = mx.linalg.norm(grad).item()
        assert mx.linalg.norm(grads[name] - grad).item() < 0.15 * size + 1e-3, name


def test_every_loss_of_bfloat16_is_that_of_the_same_numbers_in_float32():
    def both(loss, *arrays):
        short = [mx.array(a).astype(mx.bfloat16) for a in arrays]
        return loss(*short), loss(*(a.astype(mx.float32) for a in short))

    rng = np.random.default_rng(0)
    labels, ones = rng.integers(50, size=30), np.ones(30, np.float32)
    maps, masks = rng.random((8, 2, 2, 16)) / 16, rng.random((8, 16))
    for ours, wanted in (
        both(lambda x: token_loss(x, labels, ones)[0], rng.normal(size=(30, 50))),
        both(lambda a, t: attention_loss(a, t, mx.ones(8), "kl"), maps, masks),
        both(
            lambda p, t: feature_loss(p, t, mx.ones((2, 4))),
            rng.normal(size=(2, 4, 6)),
            rng.normal(size=(2, 4, 6)),
        ),
    ):
        assert ours.dtype == mx.float32
        assert ours.item() == wanted.item()


def steps(model: AgeVLM, masters: dict[str, mx.array], n: int) -> None:
    """Steps of 1e-5 for every weight, which is below bfloat16's resolution at 0.005 or more."""
    optimizer = AdamW()
    for _ in range(n):
        _, grads = loss_and_gradients(
            model, masters, noise_batch(0, 2, 1), Losses(), dtype=mx.bfloat16
        )
        grads = {name: mx.ones_like(g) for name, g in grads.items()}
        masters = optimizer.update(masters, grads, 1e-5, dict.fromkeys(masters, 1.0))
        mx.eval(masters, optimizer.state)
    loss_and_gradients(model, masters, noise_batch(0, 2, 1), Losses(), dtype=mx.bfloat16)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_steps_below_bfloat16_s_resolution_add_up_in_float32_masters(tiny_model, dtype):
    name = "language_model.model.norm.weight"  # all ones
    steps(tiny_model, {name: named_parameters(tiny_model)[name].astype(dtype)}, 300)
    moved = named_parameters(tiny_model)[name].astype(mx.float32).max().item()
    # 300 steps of 1e-5: bfloat16 has 0.99609375 next to 1. Without masters nothing ever moves.
    assert moved == (0.99609375 if dtype == mx.float32 else 1.0)
