"""What SAM's parameters are called in Meta's files and in Hugging Face's, which hold the same."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ..errors import UserError
from .architecture import ADVICE

T = TypeVar("T")

#: Beginnings of names, Meta's and Hugging Face's; # is a number. The first that fits holds.
_PAIRS = (
    ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
    ("image_encoder.patch_embed.proj", "vision_encoder.patch_embed.projection"),
    ("image_encoder.blocks.#.norm1", "vision_encoder.layers.#.layer_norm1"),
    ("image_encoder.blocks.#.norm2", "vision_encoder.layers.#.layer_norm2"),
    ("image_encoder.blocks.#", "vision_encoder.layers.#"),
    ("image_encoder.neck.0", "vision_encoder.neck.conv1"),
    ("image_encoder.neck.1", "vision_encoder.neck.layer_norm1"),
    ("image_encoder.neck.2", "vision_encoder.neck.conv2"),
    ("image_encoder.neck.3", "vision_encoder.neck.layer_norm2"),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings.#", "prompt_encoder.point_embed.#"),
    ("prompt_encoder.not_a_point_embed", "prompt_encoder.not_a_point_embed"),
    ("prompt_encoder.no_mask_embed", "prompt_encoder.no_mask_embed"),
    ("prompt_encoder.mask_downscaling.0", "prompt_encoder.mask_embed.conv1"),
    ("prompt_encoder.mask_downscaling.1", "prompt_encoder.mask_embed.layer_norm1"),
    ("prompt_encoder.mask_downscaling.3", "prompt_encoder.mask_embed.conv2"),
    ("prompt_encoder.mask_downscaling.4", "prompt_encoder.mask_embed.layer_norm2"),
    ("prompt_encoder.mask_downscaling.6", "prompt_encoder.mask_embed.conv3"),
    ("mask_decoder.iou_token", "mask_decoder.iou_token"),
    ("mask_decoder.mask_tokens", "mask_decoder.mask_tokens"),
    ("mask_decoder.transformer.layers.#.norm1", "mask_decoder.transformer.layers.#.layer_norm1"),
    ("mask_decoder.transformer.layers.#.norm2", "mask_decoder.transformer.layers.#.layer_norm2"),
    ("mask_decoder.transformer.layers.#.norm3", "mask_decoder.transformer.layers.#.layer_norm3"),
    ("mask_decoder.transformer.layers.#.norm4", "mask_decoder.transformer.layers.#.layer_norm4"),
    ("mask_decoder.transformer.norm_final_attn", "mask_decoder.transformer.layer_norm_final_attn"),
    ("mask_decoder.transformer", "mask_decoder.transformer"),
    ("mask_decoder.output_upscaling.0", "mask_decoder.upscale_conv1"),
    ("mask_decoder.output_upscaling.1", "mask_decoder.upscale_layer_norm"),
    ("mask_decoder.output_upscaling.3", "mask_decoder.upscale_conv2"),
    *(
        (f"mask_decoder.{mlp}.layers.{number}", f"mask_decoder.{mlp}.{name}")
        for mlp in ("output_hypernetworks_mlps.#", "iou_prediction_head")
        for number, name in enumerate(("proj_in", "layers.0", "proj_out"))
    ),
)
#: What Hugging Face calls `shared_image_embedding.positional_embedding` where the prompt encoder
#: uses it; files may hold either name, or both.
_SHARED = "shared_image_embedding.positional_embedding"
_TIED = "prompt_encoder.shared_embedding.positional_embedding"


def as_hugging_face(tensors: Mapping[str, T], where: object) -> dict[str, T]:
    """Tensors of Meta's names by Hugging Face's. ``UserError`` for a name that is not Meta's."""
    return _renamed(tensors, _FROM_META, where)


def as_meta(tensors: Mapping[str, T], where: object) -> dict[str, T]:
    """Tensors of Hugging Face's names (``SamModel``) by Meta's. ``UserError`` for another name."""
    return _renamed(untied(tensors), _FROM_HUGGING_FACE, where)


def untied(tensors: Mapping[str, T]) -> dict[str, T]:
    """Hugging Face's tensors with the one that has two names under the first of them only."""
    own = dict(tensors)
    if _TIED in own:
        copy = own.pop(_TIED)
        own.setdefault(_SHARED, copy)
    return own


def _patterns(pairs: Sequence[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.escape(a).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), b.replace("#", r"\1"))
        for a, b in pairs
    ]


_FROM_META = _patterns(_PAIRS)
_FROM_HUGGING_FACE = _patterns([(theirs, metas) for metas, theirs in _PAIRS])


def _renamed(
    tensors: Mapping[str, T], patterns: list[tuple[re.Pattern[str], str]], where: object
) -> dict[str, T]:
    ours: dict[str, T] = {}
    for key, tensor in tensors.items():
        for pattern, name in patterns:
            if match := pattern.match(key):
                new = match.expand(name) + key[match.end() :]
                break
        else:
            raise UserError(f"{where}: {key[:80]} is no tensor of SAM's; {ADVICE}")
        if new in ours:
            raise UserError(f"{where}: two keys name one tensor, {new[:80]}")
        ours[new] = tensor
    return ours
