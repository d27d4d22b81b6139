"""SigLIP of Hugging Face: ``siglip_vision_model``, and the vision half of ``siglip``."""

from collections.abc import Mapping
from typing import Any

from agevlm_mlx.models.vision.siglip import SiglipConfig

from .rules import Rule, channels_last, known_keys


def config(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    return known_keys(SiglipConfig, table)


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    return (
        Rule(r"(?:vision_model\.)?(embeddings\.patch_embedding\.weight)", r"\1", channels_last),
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
