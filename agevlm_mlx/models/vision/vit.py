"""The embedded default: a small convolutional-stem ViT, trained from scratch in minutes.

ReLU and squared ReLU only: exp, tanh and GELU cost 13 to 40 ns an element on MLX's CPU
backend, a squared ReLU less than one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError
from . import positions


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """``vision_config`` of ``model_type = "agevlm_vit"``."""

    model_type: Literal["agevlm_vit"] = "agevlm_vit"
    image_size: int = 64
    #: Pixels per token side; the stem works at half of it.
    patch_size: int = 8
    stem_channels: int = 48
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 384
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.patch_size % 2 or self.image_size % self.patch_size:
            raise UserError(
                "vision_config: expected an even patch_size that divides image_size, got "
                f"{self.patch_size} and {self.image_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                "vision_config.hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )


class VitBlock(nn.Module):
    """Pre-norm self-attention and a squared-ReLU MLP."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim, self.n_heads = config.hidden_size, config.num_attention_heads
        self.norm1 = nn.RMSNorm(dim, config.rms_norm_eps)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.RMSNorm(dim, config.rms_norm_eps)
        self.fc1 = nn.Linear(dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, dim)

    def __call__(self, x: mx.array) -> mx.array:
        B, S, D = x.shape
        qkv = self.qkv_proj(self.norm1(x)).reshape(B, S, 3, self.n_heads, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # 3 B N S H
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        x = x + self.out_proj(out.swapaxes(1, 2).reshape(B, S, D))
        return x + self.fc2(nn.relu2(self.fc1(self.norm2(x))))


class VitEncoder(nn.Module):
    """pixels f32 [B Hi Wi 3] -> z_vis [B Gh*Gw Dv]."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // config.patch_size
        self.grid, self.width = (side, side), config.hidden_size
        self.stride = config.patch_size // 2
        C = config.stem_channels
        self.patch_embed = nn.Linear(3 * self.stride**2, C)
        self.stem_conv1 = nn.Conv2d(C, 2 * C, 3, padding=1)
        self.stem_conv2 = nn.Linear(2 * C, C)
        self.merge = nn.Linear(4 * C, config.hidden_size)
        self.position_embedding = 0.02 * mx.random.normal((side * side, config.hidden_size))
        self.layers = [VitBlock(config) for _ in range(config.num_hidden_layers)]
        self.post_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {
            "image_size": self.config.image_size,
            "resize": "pad",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
        }

    def fitted(self, name: str, value: mx.array) -> mx.array:
        """The position table of any square input size, resampled to this encoder's grid."""
        if name != "position_embedding":
            return value
        return positions.resample(value, self.grid, positions.cubic)

    def __call__(self, pixels: mx.array) -> mx.array:
        B, Hi, Wi, _ = pixels.shape
        size = self.config.image_size
        if (Hi, Wi) != (size, size):
            raise ValueError(f"expected {size}x{size} pixels, got {Hi}x{Wi}")
        x = _merge_cells(pixels.astype(self.patch_embed.weight.dtype), self.stride)
        x = self.patch_embed(x)
        x = x + self.stem_conv2(nn.relu(self.stem_conv1(x)))
        x = self.merge(_merge_cells(x, 2)).reshape(B, -1, self.width)
        x = x + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.post_norm(x)


def _merge_cells(x: mx.array, f: int) -> mx.array:
    """[B h w C] -> [B h/f w/f f*f*C]."""
    B, h, w, C = x.shape
    x = x.reshape(B, h // f, f, w // f, f, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h // f, w // f, f * f * C)
