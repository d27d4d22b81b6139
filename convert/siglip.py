"""SigLIP of Hugging Face: ``siglip_vision_model`` (also SigLIP 2 of fixed resolution) and
``siglip2_vision_model`` (NaFlex), alone or as the vision half of ``siglip`` and ``siglip2``."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import mlx.core as mx

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.tensors import Rule, channels_last, known_keys
from agevlm_mlx.models.vision.siglip import Siglip2Config, SiglipConfig


def config(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    return known_keys(SiglipConfig, table)


def naflex_config(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """NaFlex has no image size: the square whose patches its position table has rows for."""
    own = known_keys(Siglip2Config, table)
    rows, patch = table.get("num_patches", 256), own.get("patch_size", Siglip2Config.patch_size)
    if not isinstance(rows, int) or rows < 1 or isqrt(rows) ** 2 != rows:
        raise UserError(f"{where}.num_patches: expected a square number, got {rows!r}")
    if isinstance(patch, int):  # else the reader of our configuration names it
        own.setdefault("image_size", isqrt(rows) * patch)
    return own


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    return (_kernel(channels_last), *_RULES)


def naflex_rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    patch = config["patch_size"]

    def kernel(weight: mx.array) -> mx.array:
        """A linear layer over flattened patches, channels fastest: [out h*w*3] -> [out h w 3]."""
        return weight.reshape(-1, patch, patch, 3)

    return (_kernel(kernel), *_RULES)


def _kernel(change: Callable[[mx.array], mx.array]) -> Rule:
    pattern = r"(?:vision_model\.)?(embeddings\.patch_embedding\.weight)"
    return Rule(pattern, r"\1", change)


_RULES = (
    Rule(
        r"(?:vision_model\.)?"
        r"(embeddings\.patch_embedding\.bias|embeddings\.position_embedding\.weight)",
        r"\1",
    ),
    Rule(r"(?:vision_model\.)?(encoder\.layers\.\d+\..+\.(?:weight|bias))", r"\1"),
    Rule(r"(?:vision_model\.)?(post_layernorm\.(?:weight|bias))", r"\1"),
    Rule(r"(vision_model\.)?head\..+", drop="pooling head"),
    Rule(r"(vision_model\.)?embeddings\.position_ids", drop="index buffer"),
    Rule(r"text_model\..+|logit_(scale|bias)", drop="text tower"),
)
