"""Models to measure: known sizes with random weights, and a language model without its images."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..config import FusionConfig, ModelConfig
from ..errors import UserError
from ..models.agevlm import AgeVLM
from ..models.graft import build_language_model, tie_embeddings

#: Name -> the ``text_config`` of a published language model (SmolLM2's, Llama 3.2's).
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-360m": {
        "model_type": "llama",
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}

#: SigLIP-B/16 at 512 pixels, the vision part of SmolVLM-256M; sixteen patches become one token,
#: so that a picture is 64 tokens and larger numbers are several pictures (or tiles of one).
VISION = {
    "model_type": "siglip_vision_model",
    "image_size": 512,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
FUSION = FusionConfig(projector="pixel_shuffle", pixel_shuffle_factor=4, gate_init=0.5)
#: What is smaller in the miniatures that try a benchmark out.
TINY_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
}
TINY_VISION = {
    "image_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def random_model(
    text_config: Mapping[str, Any],
    vision_config: Mapping[str, Any] = VISION,
    fusion: FusionConfig = FUSION,
    dtype: mx.Dtype = mx.float32,
) -> AgeVLM:
    """An `AgeVLM` with random weights.

    Those of the vision encoder are never evaluated and take no memory: nothing here runs it.
    """
    model = AgeVLM(
        ModelConfig(
            text_config=dict(text_config), vision_config=dict(vision_config), fusion_config=fusion
        )
    )
    model.set_dtype(dtype)
    mx.eval(model.language_model.parameters(), model.multi_modal_projector.parameters())
    model.eval()
    return model


def quantize(model: AgeVLM, bits: int, group_size: int) -> None:
    """Quantise the language model in place, as `agevlm-convert quantize` does.

    ``UserError`` when it is quantised already or no layer's width is a multiple of `group_size`.
    """
    if model.config.quantization:
        raise UserError("--quantize: the model is quantised already; drop the flag")
    done = 0

    def choose(_: str, module: nn.Module) -> bool:
        nonlocal done
        fits = hasattr(module, "to_quantized") and module["weight"].shape[-1] % group_size == 0
        done += fits
        return fits

    nn.quantize(model.language_model, group_size, bits, class_predicate=choose)
    if not done:
        raise UserError(f"--q-group-size: no layer's width is a multiple of {group_size}")
    mx.eval(model.language_model.parameters())


def text_only(model: AgeVLM) -> Any:
    """The language model of `model` as mlx-lm knows it, without cross-attention: the same arrays
    in a model that was never grafted."""
    config = model.config.text_config
    lm = build_language_model(config)
    tie_embeddings(lm, config)
    leaves = _leaves(model.language_model)
    lm.update_modules(tree_unflatten([(name, leaves[name]) for name in _leaves(lm)]))
    own = dict(tree_flatten(model.language_model.parameters()))
    names = [name for name, _ in tree_flatten(lm.parameters())]
    lm.update(tree_unflatten([(name, own[name]) for name in names]))
    return lm.eval()


def _leaves(module: nn.Module) -> dict[str, nn.Module]:
    return dict(tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module))


def pictures(model: AgeVLM, image_tokens: int) -> int:
    """How many pictures make `image_tokens`; ``UserError`` if no whole number does."""
    each = model.num_image_tokens
    if image_tokens < each or image_tokens % each:
        raise UserError(
            f"--image-tokens: expected a multiple of this model's {each} tokens a picture, "
            f"got {image_tokens}"
        )
    return image_tokens // each


def encoder_output(model: AgeVLM, image_tokens: int) -> mx.array:
    """Random z_vis [M S' Dv] in place of what the vision encoder says of so many tokens."""
    Gh, Gw = model.vision_grid
    shape = (pictures(model, image_tokens), Gh * Gw, model.vision_tower.width)
    weights = dict(tree_flatten(model.multi_modal_projector.parameters()))
    z_vis = mx.random.normal(shape).astype(next(iter(weights.values())).dtype)
    mx.eval(z_vis)
    return z_vis


def project(model: AgeVLM, z_vis: mx.array) -> mx.array:
    """z_vis [M S' Dv] of the pictures of one text -> z_img [1 M*S D]."""
    z_img = model.project(z_vis)
    return z_img.reshape(1, -1, z_img.shape[-1])
