"""The transformer that CLIP's and SigLIP's vision towers share, with Hugging Face's names."""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError

#: Hugging Face's names. ``quick_gelu``, x * sigmoid(1.702 x), is OpenAI's.
ACTIVATIONS = {
    "quick_gelu": nn.gelu_fast_approx,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What the ``vision_config`` of these towers has in common.

    Raises ``UserError`` for sizes that do not go together.
    """

    image_size: int
    patch_size: int
    num_channels: Literal[3] = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float
    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]

    def __post_init__(self) -> None:
        if not 1 <= self.patch_size <= self.image_size:
            raise UserError(
                f"vision_config.image_size: expected at least patch_size ({self.patch_size}) "
                f"and both positive, got {self.image_size}"
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise UserError(
                "vision_config.hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Gh Gw. Where patch_size does not divide image_size, the last pixels are not seen."""
        side = self.image_size // self.patch_size
        return side, side


class PatchEmbedding(nn.Conv2d):
    """pixels [B Hi Wi 3] -> [B Gh*Gw Dv], in the dtype of the weights."""

    def __init__(self, config: TransformerConfig, bias: bool) -> None:
        patch = config.patch_size
        super().__init__(config.num_channels, config.hidden_size, patch, patch, bias=bias)
        self.image_size = config.image_size

    def __call__(self, pixels: mx.array) -> mx.array:
        size = self.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"expected {size}x{size} pixels, got {pixels.shape[1:3]}")
        return super().__call__(pixels.astype(self.weight.dtype)).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, [B S Dv] -> [B S Dv]."""

    def __init__(self, config: TransformerConfig) -> None:
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


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The first `depth` layers."""

    def __init__(self, config: TransformerConfig, depth: int) -> None:
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(depth)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x
