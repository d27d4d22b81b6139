"""CLIP of Hugging Face: ``clip_vision_model``, and the vision half of ``clip``."""

from collections.abc import Mapping
from typing import Any

from agevlm_mlx.config import from_dict
from agevlm_mlx.models.tensors import Rule, channels_last, known_keys
from agevlm_mlx.models.vision.clip import ClipConfig


def config(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    return known_keys(ClipConfig, table)


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    own = from_dict(ClipConfig, config)
    built = "|".join(map(str, range(own.depth)))
    above = "|".join(map(str, range(own.depth, own.num_hidden_layers)))
    return (
        Rule(r"(?:vision_model\.)?(embeddings\.patch_embedding\.weight)", r"\1", channels_last),
        Rule(
            r"(?:vision_model\.)?"
            r"(embeddings\.class_embedding|embeddings\.position_embedding\.weight)",
            r"\1",
        ),
        Rule(r"(?:vision_model\.)?(pre_layrnorm\.(?:weight|bias))", r"\1"),
        Rule(rf"(?:vision_model\.)?(encoder\.layers\.(?:{built})\..+\.(?:weight|bias))", r"\1"),
        Rule(rf"(vision_model\.)?encoder\.layers\.({above})\..+", drop="layers after the features"),
        Rule(
            r"(vision_model\.)?post_layernorm\.(weight|bias)|visual_projection\.weight",
            drop="pooled output",
        ),
        Rule(r"(vision_model\.)?embeddings\.position_ids", drop="index buffer"),
        Rule(r"text_model\..+|text_projection\.weight|logit_scale", drop="text tower"),
    )
