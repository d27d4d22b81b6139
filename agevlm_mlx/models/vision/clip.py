"""CLIP's vision transformer (arXiv 2103.00020) with Hugging Face's parameter names, as OpenAI
and LAION publish it.

Matches ``hidden_states[vision_feature_layer][:, 1:]`` of ``transformers.CLIPVisionModel``. The
class token, the final norm and the projection serve CLIP's one vector for an image; a language
model reads the patches. By default they are those before the last layer, as in LLaVA (arXiv
2304.08485): the last layer is trained to fill the class token, not the patches.
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError
from . import positions
from .transformer import Encoder, PatchEmbedding, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class ClipConfig(TransformerConfig):
    """``vision_config`` of ``model_type = "clip_vision_model"`` (defaults: base, patch 32)."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "quick_gelu"
    #: Which of the hidden states 1 .. num_hidden_layers; -1 is what the last layer gives.
    vision_feature_layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.depth <= self.num_hidden_layers:
            raise UserError(
                f"vision_config.vision_feature_layer: expected 1 to {self.num_hidden_layers} or "
                f"-{self.num_hidden_layers} to -1 (num_hidden_layers), got "
                f"{self.vision_feature_layer}"
            )

    @property
    def depth(self) -> int:
        """How many layers run; the others are neither built nor converted."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.num_hidden_layers + 1 + layer


class ClipEmbeddings(nn.Module):
    """pixels [B Hi Wi 3] -> [B 1+Gh*Gw Dv], the class token first."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.class_embedding = mx.zeros((config.hidden_size,))
        self.patch_embedding = PatchEmbedding(config, bias=False)
        Gh, Gw = config.grid
        self.position_embedding = nn.Embedding(1 + Gh * Gw, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.patch_embedding(pixels)
        B, _, D = x.shape
        first = mx.broadcast_to(self.class_embedding, (B, 1, D))
        return mx.concatenate([first, x], axis=1) + self.position_embedding.weight


class ClipEncoder(nn.Module):
    """pixels f32 [B Hi Wi 3] -> z_vis [B Gh*Gw Dv]. ``ValueError`` for pixels of another size."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.grid, self.width = config.grid, config.hidden_size
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, config.depth)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {
            "image_size": self.config.image_size,
            "resize": "crop",
            "convention": "transformers",
            "resample": "bicubic",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }

    def fitted(self, name: str, value: mx.array) -> mx.array:
        """The position table of any square input size, resampled to this encoder's grid."""
        if name != "embeddings.position_embedding.weight":
            return value
        return positions.resample(value, self.grid, positions.cubic, class_rows=1)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 1:]
