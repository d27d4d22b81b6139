"""SigLIP's vision transformer (arXiv 2303.15343) and SigLIP 2's (arXiv 2502.14786), with
Hugging Face's parameter names.

Match ``last_hidden_state`` of ``transformers.SiglipVisionModel`` and ``Siglip2VisionModel``;
the pooling head is not used, since every patch token goes to the language model.

SigLIP 2's checkpoints of fixed resolution are of SigLIP's architecture. Its NaFlex ones
(``siglip2_vision_model``) differ in how the position table is resampled. Here they see a
square of one size, chosen at conversion; their variable aspect ratio is not supported.
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from . import positions
from .transformer import Encoder, PatchEmbedding, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class _Config(TransformerConfig):
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(_Config):
    """``vision_config`` of ``model_type = "siglip_vision_model"`` (defaults: base, patch 16)."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    image_size: int = 224


@dataclass(frozen=True, kw_only=True)
class Siglip2Config(_Config):
    """``vision_config`` of ``model_type = "siglip2_vision_model"`` (defaults: base, NaFlex)."""

    model_type: Literal["siglip2_vision_model"] = "siglip2_vision_model"
    image_size: int = 256


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: SiglipConfig | Siglip2Config) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config, bias=True)
        Gh, Gw = config.grid
        self.position_embedding = nn.Embedding(Gh * Gw, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.patch_embedding(pixels) + self.position_embedding.weight


class SiglipEncoder(nn.Module):
    """pixels f32 [B Hi Wi 3] -> z_vis [B Gh*Gw Dv]. ``ValueError`` for pixels of another size."""

    def __init__(self, config: SiglipConfig | Siglip2Config) -> None:
        super().__init__()
        self.config = config
        self.grid, self.width = config.grid, config.hidden_size
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = Encoder(config, config.num_hidden_layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    @property
    def _naflex(self) -> bool:
        return isinstance(self.config, Siglip2Config)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {
            "image_size": self.config.image_size,
            "resize": "stretch",
            "resample": "bilinear" if self._naflex else "bicubic",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }

    def fitted(self, name: str, value: mx.array) -> mx.array:
        """The position table of any square input size, resampled to this encoder's grid."""
        if name != "embeddings.position_embedding.weight":
            return value
        weights = positions.triangle if self._naflex else positions.cubic
        return positions.resample(value, self.grid, weights)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))
