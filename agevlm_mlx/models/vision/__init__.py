"""Vision encoders. To add one: a file here with a config dataclass and a module that has
``grid``, ``width``, ``preprocessing`` and ``__call__`` (and ``fitted`` when a parameter depends
on the input's size), and one line in `VISION_ENCODERS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ...config import check_depth, from_dict
from ...errors import UserError, one_line
from . import clip, convnext, sam, siglip, vit


class VisionEncoder(Protocol):
    """What the rest of the model needs to know of an encoder."""

    #: Tokens down and across, Gh Gw.
    grid: tuple[int, int]
    #: Dv, the width of a token.
    width: int

    def __call__(self, pixels: mx.array) -> mx.array:
        """f32 [B Hi Wi 3] -> z_vis [B Gh*Gw Dv]."""
        ...

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The ``preprocessor_config.json`` of the pixels it was trained with."""
        ...


#: ``vision_config.model_type`` -> (config class, module class)
VISION_ENCODERS: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "agevlm_vit": (vit.VitConfig, vit.VitEncoder),
    "convnext_clip": (convnext.ConvNextConfig, convnext.ConvNextEncoder),
    "siglip_vision_model": (siglip.SiglipConfig, siglip.SiglipEncoder),
    "siglip2_vision_model": (siglip.Siglip2Config, siglip.SiglipEncoder),
    "clip_vision_model": (clip.ClipConfig, clip.ClipEncoder),
    "sam_vision_model": (sam.SamConfig, sam.SamEncoder),
}


def build_encoder(config: Mapping[str, Any]) -> Any:
    """The encoder of a ``vision_config`` table, with random weights."""
    kind = config["model_type"]
    if kind not in VISION_ENCODERS:
        raise UserError(
            f"vision_config.model_type: expected {' or '.join(VISION_ENCODERS)}, got {kind!r}"
        )
    check_depth(config, "vision_config")
    config_class, encoder = VISION_ENCODERS[kind]
    settings = from_dict(config_class, config, "vision_config")
    try:
        return encoder(settings)
    except ArithmeticError as error:  # sizes beyond what an array can have
        raise UserError(f"vision_config: {kind} cannot be built: {one_line(error)}") from None


def fitted(encoder: Any, name: str, value: mx.array) -> mx.array:
    """The parameter `name`, made for another input size, as this encoder's size needs it.

    Position embeddings are interpolated; a parameter that does not depend on the input's
    size, or that has the right shape already, is returned as it is.
    """
    fit = getattr(encoder, "fitted", None)
    return value if fit is None else fit(name, value)
