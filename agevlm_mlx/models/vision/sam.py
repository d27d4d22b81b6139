"""The image encoder of the Segment Anything Model (arXiv 2304.02643): a ViTDet-style
transformer (arXiv 2203.16527) with windowed attention, a few global layers and decomposed
relative positions, with Hugging Face parameter names.

Matches ``transformers.SamVisionModel(...).last_hidden_state`` and the ``ImageEncoderViT`` of
Meta's ``segment_anything``, their [B C Gh Gw] as tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ...errors import UserError
from . import positions

#: Elements of the attention bias of one call. A global layer of vit_h at 1024 px needs
#: 16 heads x 4096 x 4096 of them for one image: 1.1 GB in float32, 0.5 GB in float16 (vit_b,
#: 12 heads: 0.8 GB and 0.4 GB). So images go through a global layer one after the other, but
#: many images' windows of 196 cells together.
_BIAS_ELEMENTS = 16 * 4096 * 4096


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """``vision_config`` of ``model_type = "sam_vision_model"`` (defaults: Meta's vit_b)."""

    model_type: Literal["sam_vision_model"] = "sam_vision_model"
    image_size: int = 1024
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_dim: int = 3072
    #: Channels of the image embedding, the width of a token.
    output_channels: int = 256
    #: Cells along a side of an attention window; 0 makes every layer global.
    window_size: int = 14
    #: The layers whose attention is not windowed.
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    use_rel_pos: bool = True
    qkv_bias: bool = True
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                "vision_config.image_size: expected a multiple of patch_size "
                f"({self.patch_size}), got {self.image_size}"
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise UserError(
                "vision_config.hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )
        if self.window_size < 0:
            raise UserError(
                "vision_config.window_size: expected 0 (every layer global) or more, got "
                f"{self.window_size}"
            )
        beyond = [i for i in self.global_attn_indexes if not 0 <= i < self.num_hidden_layers]
        if beyond:
            raise UserError(
                "vision_config.global_attn_indexes: expected layers below num_hidden_layers "
                f"({self.num_hidden_layers}), got {beyond[0]}"
            )


class SamPatchEmbeddings(nn.Module):
    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size
        )

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.projection(pixels)


class SamAttention(nn.Module):
    """Attention among the cells of [B h w D], each h x w on its own (a window or an image)."""

    def __init__(self, config: SamConfig, side: int) -> None:
        super().__init__()
        dim, self.n_heads = config.hidden_size, config.num_attention_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = config.use_rel_pos
        if config.use_rel_pos:
            # One row for each distance, -(side - 1) .. side - 1.
            self.rel_pos_h = mx.zeros((2 * side - 1, dim // self.n_heads))
            self.rel_pos_w = mx.zeros((2 * side - 1, dim // self.n_heads))

    def __call__(self, x: mx.array) -> mx.array:
        B, h, w, D = x.shape
        S, N = h * w, self.n_heads
        q, k, v = self.qkv(x).reshape(B, S, 3, N, D // N).transpose(2, 0, 3, 1, 4)  # B N S H
        step = max(1, _BIAS_ELEMENTS // (N * S * S))
        out: list[mx.array] = []
        for i in range(0, B, step):
            part = q[i : i + step], k[i : i + step], v[i : i + step]
            if out:  # else all parts would be computed side by side, with all their biases
                part = mx.depends(part, out[-1])
            bias = self._bias(part[0], h, w) if self.use_rel_pos else None
            out.append(
                mx.fast.scaled_dot_product_attention(*part, scale=(D // N) ** -0.5, mask=bias)
            )
        return self.proj(mx.concatenate(out).swapaxes(1, 2).reshape(B, h, w, D))

    def _bias(self, q: mx.array, h: int, w: int) -> mx.array:
        """What the positions add to the scores [B N S S]: for cells (y, x) and (y', x') the sum
        of the query's products with the rows of the tables for y - y' and x - x'."""
        B, N, S, H = q.shape
        cells = q.reshape(B, N, h, w, H)
        rel_h = cells @ _by_distance(self.rel_pos_h, h).swapaxes(1, 2)  # B N h w h
        rel_w = cells.swapaxes(2, 3) @ _by_distance(self.rel_pos_w, w).swapaxes(1, 2)  # B N w h w
        bias = rel_h[..., :, None] + rel_w.swapaxes(2, 3)[..., None, :]
        return bias.reshape(B, N, S, S)


def _by_distance(table: mx.array, side: int) -> mx.array:
    """[2*side-1 H] -> [side side H]: the row for the distance of each query and key."""
    at = mx.arange(side)
    return table[at[:, None] - at[None, :] + side - 1]


class SamMLP(nn.Module):
    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.lin1 = nn.Linear(config.hidden_size, config.mlp_dim)
        self.lin2 = nn.Linear(config.mlp_dim, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.lin2(nn.gelu(self.lin1(x)))


class SamLayer(nn.Module):
    """[B Gh Gw D] -> the same; attention in windows of `window` x `window` cells, or 0: global."""

    def __init__(self, config: SamConfig, window: int) -> None:
        super().__init__()
        self.window = window
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = SamAttention(config, window or config.image_size // config.patch_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SamMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layer_norm1(x)
        x = x + (self._windowed(y) if self.window else self.attn(y))
        return x + self.mlp(self.layer_norm2(x))

    def _windowed(self, x: mx.array) -> mx.array:
        """Zeros fill the last windows of a row or column; as in SAM they are attended to."""
        B, Gh, Gw, D = x.shape
        side = self.window
        x = mx.pad(x, [(0, 0), (0, -Gh % side), (0, -Gw % side), (0, 0)])
        down, across = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(B, down, side, across, side, D).swapaxes(2, 3)
        x = self.attn(x.reshape(-1, side, side, D))
        x = x.reshape(B, down, across, side, side, D).swapaxes(2, 3)
        return x.reshape(B, down * side, across * side, D)[:, :Gh, :Gw]


class SamNeck(nn.Module):
    """[B Gh Gw D] -> [B Gh Gw output_channels]."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        C = config.output_channels
        # The eps of these two is not the configuration's but fixed.
        self.conv1 = nn.Conv2d(config.hidden_size, C, 1, bias=False)
        self.layer_norm1 = nn.LayerNorm(C, 1e-6)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.layer_norm2 = nn.LayerNorm(C, 1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer_norm2(self.conv2(self.layer_norm1(self.conv1(x))))


class SamEncoder(nn.Module):
    """pixels f32 [B Hi Wi 3] -> z_vis [B Gh*Gw Dv], SAM's image embedding as tokens."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // config.patch_size
        self.grid, self.width = (side, side), config.output_channels
        self.patch_embed = SamPatchEmbeddings(config)
        self.pos_embed = mx.zeros((1, side, side, config.hidden_size))
        self.layers = [
            SamLayer(config, 0 if i in config.global_attn_indexes else config.window_size)
            for i in range(config.num_hidden_layers)
        ]
        self.neck = SamNeck(config)

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {
            "image_size": self.config.image_size,
            "resize": "pad",
            "resample": "bilinear",
            "convention": "sam",
            "fill": "zero",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }

    def __call__(self, pixels: mx.array) -> mx.array:
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"expected {size}x{size} pixels, got {pixels.shape[1:3]}")
        pixels = pixels.astype(self.patch_embed.projection.weight.dtype)
        x = self.patch_embed(pixels) + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        return self.neck(x).flatten(1, 2)

    def fitted(self, name: str, value: mx.array) -> mx.array:
        """Positions made for another input size, for this one: ``pos_embed`` bicubic (as ViTDet
        does it), the tables of relative positions linear (as SAM itself does it)."""
        if name == "pos_embed" and value.ndim == 4 and value.shape[1] == value.shape[2]:
            table = positions.resample(value.flatten(0, 2), self.grid, positions.cubic)
            return table.reshape(-1, *self.grid, value.shape[-1])
        own = dict(tree_flatten(self.parameters())).get(name)
        if name.endswith((".rel_pos_h", ".rel_pos_w")) and own is not None and value.ndim == 2:
            return _stretched(value, own.shape[0])
        return value


def _stretched(table: mx.array, rows: int) -> mx.array:
    """[L H] -> [rows H], as ``torch.nn.functional.interpolate(mode="linear")`` does it."""
    L = table.shape[0]
    if rows == L:
        return table
    at = np.clip((np.arange(rows) + 0.5) * L / rows - 0.5, 0, L - 1)
    weights = np.maximum(1 - np.abs(at[:, None] - np.arange(L)), 0).astype(np.float32)
    # The CPU's products are float32; a GPU's may be of reduced precision.
    stretched = mx.matmul(mx.array(weights), table.astype(mx.float32), stream=mx.cpu)
    return stretched.astype(table.dtype)
