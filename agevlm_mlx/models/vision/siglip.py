"""SigLIP's vision transformer (arXiv 2303.15343) with Hugging Face parameter names.

Matches ``transformers.SiglipVisionModel(...).last_hidden_state``; the pooling head is not
used, since every patch token goes to the language model.
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """``vision_config`` of ``model_type = "siglip_vision_model"`` (defaults: base, patch 16)."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                "vision_config.hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size
        )
        self.position_embedding = nn.Embedding(side * side, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.patch_embedding(pixels).flatten(1, 2)
        return x + self.position_embedding.weight


class SiglipAttention(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        dim, self.n_heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        B, S, D = x.shape
        q, k, v = (
            p(x).reshape(B, S, self.n_heads, -1).swapaxes(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out.swapaxes(1, 2).reshape(B, S, D))


class SiglipMLP(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu_approx(self.fc1(x)))


class SiglipEncoderLayer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipLayers(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = [SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipEncoder(nn.Module):
    """pixels f32 [B Hi Wi 3] -> z_vis [B Gh*Gw Dv]."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // config.patch_size
        self.grid, self.width = (side, side), config.hidden_size
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipLayers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {
            "image_size": self.config.image_size,
            "resize": "stretch",
            "resample": "bicubic",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }

    def __call__(self, pixels: mx.array) -> mx.array:
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"expected {size}x{size} pixels, got {pixels.shape[1:3]}")
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))
