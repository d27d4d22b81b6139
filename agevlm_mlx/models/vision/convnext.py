"""CLIP's ConvNeXt: a convolutional vision tower whose tokens are the deep stage's feature map.

ConvNeXt is arXiv 2201.03545; its CLIP weights are LAION's (open_clip, arXiv 2212.07143), built
on timm. Parameter names are those of transformers' ``ConvNextModel``. The output equals timm's
``forward_features``, and open_clip's ``visual.trunk.forward_features``: the last stage as it
leaves its last block. These checkpoints have no norm there (timm's ``norm_pre`` is the
identity); the one in their head was trained on the mean of all positions, after pooling, so
it is no part of a token.

A convolution takes any size: `image_size` only says what the pixels are resized to. One token
covers 32x32 pixels, so the 256 pixels that most of these models were trained on give 64 tokens,
and larger pictures are the usual way to more.

    architecture         parameters  width  tokens at 256   320     512     768
    convnext_base          87.56 M    1024           8x8  10x10   16x16   24x24
    convnext_large        196.23 M    1536           8x8  10x10   16x16   24x24
    convnext_xxlarge      843.40 M    3072           8x8  10x10   16x16   24x24
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError

#: Pixels that one position of each stage's map covers; the last is the encoder's stride.
_STRIDES = (4, 8, 16, 32)
_ACTIVATIONS = {"gelu": nn.gelu, "gelu_pytorch_tanh": nn.gelu_approx}


@dataclass(frozen=True, kw_only=True)
class ConvNextConfig:
    """``vision_config`` of ``model_type = "convnext_clip"`` (defaults: base at 256 pixels)."""

    model_type: Literal["convnext_clip"] = "convnext_clip"
    #: Pixels of a side, a multiple of 32.
    image_size: int = 256
    #: Blocks of each stage.
    depths: tuple[int, int, int, int] = (3, 3, 27, 3)
    #: Channels of each stage; the last is the width of a token.
    hidden_sizes: tuple[int, int, int, int] = (128, 256, 512, 1024)
    #: Of every norm (transformers uses its own field of this name for the head's alone).
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["gelu", "gelu_pytorch_tanh"] = "gelu"

    def __post_init__(self) -> None:
        stride = _STRIDES[-1]
        if self.image_size < stride or self.image_size % stride:
            raise UserError(
                f"vision_config.image_size: expected a multiple of {stride} pixels, got "
                f"{self.image_size}; {max(1, round(self.image_size / stride)) * stride} is nearest"
            )
        for name in ("depths", "hidden_sizes"):
            if min(getattr(self, name)) < 1:
                raise UserError(
                    f"vision_config.{name}: expected numbers from 1 up, got "
                    f"{list(getattr(self, name))}"
                )


class ConvNextEmbeddings(nn.Module):
    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        patch, dim = _STRIDES[0], config.hidden_sizes[0]
        self.patch_embeddings = nn.Conv2d(3, dim, patch, stride=patch)
        self.layernorm = nn.LayerNorm(dim, config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.layernorm(self.patch_embeddings(pixels))


class ConvNextLayer(nn.Module):
    """A depthwise convolution, then an MLP over the channels, scaled and added."""

    def __init__(self, config: ConvNextConfig, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.layernorm = nn.LayerNorm(dim, config.layer_norm_eps)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.layer_scale_parameter = mx.full((dim,), 1e-6)
        self._act = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layernorm(self.dwconv(x))
        return x + self.layer_scale_parameter * self.pwconv2(self._act(self.pwconv1(y)))


class ConvNextStage(nn.Module):
    """[B h w C] -> [B h/2 w/2 C'], or of the same size in the first stage."""

    def __init__(self, config: ConvNextConfig, index: int) -> None:
        super().__init__()
        dim = config.hidden_sizes[index]
        before = config.hidden_sizes[max(0, index - 1)]
        self.downsampling_layer = []
        if index:
            self.downsampling_layer = [
                nn.LayerNorm(before, config.layer_norm_eps),
                nn.Conv2d(before, dim, 2, stride=2),
            ]
        self.layers = [ConvNextLayer(config, dim) for _ in range(config.depths[index])]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in [*self.downsampling_layer, *self.layers]:
            x = layer(x)
        return x


class ConvNextStages(nn.Module):
    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        self.stages = [ConvNextStage(config, index) for index in range(len(config.depths))]

    def __call__(self, x: mx.array) -> mx.array:
        for stage in self.stages:
            x = stage(x)
        return x


class ConvNextEncoder(nn.Module):
    """pixels f32 [B Hi Wi 3] -> z_vis [B Gh*Gw Dv], Gh = Hi/32 and Gw = Wi/32, row by row."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // _STRIDES[-1]
        self.grid, self.width = (side, side), config.hidden_sizes[-1]
        self.embeddings = ConvNextEmbeddings(config)
        self.encoder = ConvNextStages(config)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """open_clip's, for inference."""
        return {
            "image_size": self.config.image_size,
            "resize": "crop",
            "convention": "torchvision",
            "resample": "bicubic",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }

    def __call__(self, pixels: mx.array) -> mx.array:
        """Any height and width that are multiples of 32; ``ValueError`` for others."""
        stride = _STRIDES[-1]
        height, width = pixels.shape[1:3]
        if not height or not width or height % stride or width % stride:
            raise ValueError(f"expected sides that are multiples of {stride}, got {pixels.shape}")
        pixels = pixels.astype(self.embeddings.patch_embeddings.weight.dtype)
        return self.encoder(self.embeddings(pixels)).flatten(1, 2)
