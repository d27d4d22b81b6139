"""The embedded default: a small convolutional-stem ViT, trained from scratch in minutes.

ReLU and squared ReLU only: exp, tanh and GELU cost 13 to 40 ns an element on MLX's CPU
backend, a squared ReLU less than one.
"""

import itertools
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
    #: Pixels per token side.
    patch_size: int = 8
    #: Channels of the stem's stages; each halves the resolution, down to a token a patch.
    stem_channels: tuple[int, ...] = (48,)
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 384
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        halved = 2 ** len(self.stem_channels)
        if not self.stem_channels or min(self.stem_channels) < 1:
            raise UserError(
                "vision_config.stem_channels: expected one positive number a stage, got "
                f"{list(self.stem_channels)}"
            )
        if self.patch_size % halved or self.image_size % self.patch_size:
            raise UserError(
                f"vision_config: expected a patch_size that divides image_size and is a multiple "
                f"of {halved} ({len(self.stem_channels)} stages of the stem), got "
                f"{self.patch_size} and {self.image_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                "vision_config.hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )


class StemStage(nn.Module):
    """A residual 3x3 convolution, then every 2x2 cells become one: [B h w C] -> [B h/2 w/2 D]."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.conv2 = nn.Linear(2 * channels, channels)
        self.merge = nn.Linear(4 * channels, dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.conv2(nn.relu(self.conv1(x)))
        return self.merge(_merge_cells(x, 2))


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
        widths = [*config.stem_channels, config.hidden_size]
        self.stride = config.patch_size // 2 ** len(config.stem_channels)
        self.patch_embed = nn.Linear(3 * self.stride**2, widths[0])
        self.stem = [StemStage(C, D) for C, D in itertools.pairwise(widths)]
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
        for stage in self.stem:
            x = stage(x)
        x = x.reshape(B, -1, self.width) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.post_norm(x)


def _merge_cells(x: mx.array, f: int) -> mx.array:
    """[B h w C] -> [B h/f w/f f*f*C]."""
    B, h, w, C = x.shape
    x = x.reshape(B, h // f, f, w // f, f, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h // f, w // f, f * f * C)
