"""The whole Segment Anything Model in MLX, and its checkpoints.

The image encoder is the one of `models.vision.sam`, which a model can also have as its eyes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError, one_line
from ..models.tensors import Rule, apply_rules, assign, channels_last
from ..models.vision.sam import SamConfig, SamEncoder
from . import names
from .architecture import EMBEDDED, WEIGHTS, Architecture, folder_architecture, meta_architecture
from .checkpoint_file import read_checkpoint
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder

Dtype = Literal["float32", "float16", "bfloat16"]


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder, with Hugging Face's parameter names."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.vision_encoder = SamEncoder(
            SamConfig(
                image_size=architecture.image_size,
                patch_size=architecture.patch_size,
                hidden_size=architecture.embed_dim,
                num_hidden_layers=architecture.depth,
                num_attention_heads=architecture.num_heads,
                mlp_dim=int(architecture.embed_dim * architecture.mlp_ratio),
                output_channels=architecture.out_chans,
                window_size=architecture.window_size,
                global_attn_indexes=architecture.global_attn_indexes,
            )
        )
        self.prompt_encoder = PromptEncoder(architecture)
        self.mask_decoder = MaskDecoder(architecture)

    def masks(
        self, embeddings: mx.array, prompts: mx.array, boxes: mx.array
    ) -> tuple[mx.array, mx.array]:
        """What SAM sees at each prompt.

        embeddings: [n S C], each prompt's own image, or [1 S C] where all are of one image.
        prompts, boxes: as `PromptEncoder` takes them. Returns `MaskDecoder`'s logits and IoUs.
        """
        cells = embeddings + self.prompt_encoder.no_mask_embed.weight
        sparse = self.prompt_encoder(prompts, boxes)
        return self.mask_decoder(sparse, cells, self.prompt_encoder.cells())


def load(
    checkpoint: Path | None, model_type: str | None, dtype: Dtype
) -> tuple[Sam, Path, Architecture]:
    """A SAM, the file of its weights, and its sizes.

    checkpoint: one of Meta's files (``.pth``, or the same tensors as ``.safetensors`` under Meta's
    or Hugging Face's names), a folder of ``scripts/train_teacher.py`` or of Hugging Face, or None
    for the shipped one. ``UserError`` when it is none of these, or not the `model_type` asked for.
    """
    path = EMBEDDED if checkpoint is None else checkpoint
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise UserError(
            f"{weights}: no such file; pass a SAM checkpoint such as sam_vit_b_01ec64.pth, the "
            "folder of a Hugging Face SamModel or of scripts/train_teacher.py, or no --checkpoint"
        )
    tensors = _tensors(weights)
    theirs = any(name.startswith("vision_encoder.") for name in tensors)
    if path.is_dir():
        architecture, theirs = folder_architecture(path, model_type)
    else:
        metas = names.as_meta(tensors, weights) if theirs else tensors
        shapes = {name: tensor.shape for name, tensor in metas.items()}
        architecture = meta_architecture(path, shapes, model_type)
    own = names.untied(tensors) if theirs else names.as_hugging_face(tensors, weights)
    sam = Sam(architecture)
    assign(sam, apply_rules(own, _RULES, weights)[0], weights)
    _set_dtype(sam, dtype)
    mx.eval(sam.parameters())
    return sam, weights, architecture


def _tensors(path: Path) -> Mapping[str, mx.array]:
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        loaded = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({one_line(error)})") from None
    assert isinstance(loaded, dict)
    return loaded


def _set_dtype(sam: Sam, dtype: Dtype) -> None:
    """Numbers of this kind everywhere but in the encoding of places, which would lose pixels."""
    exact = sam.prompt_encoder.shared_embedding.positional_embedding
    sam.set_dtype(getattr(mx, dtype))
    sam.prompt_encoder.shared_embedding.positional_embedding = exact.astype(mx.float32)


def _doubling(kernel: mx.array) -> mx.array:
    """A transposed convolution's kernel [in out 2 2] as `mask_decoder.Double` has it."""
    return kernel.transpose(2, 3, 1, 0)


_KERNELS = r"vision_encoder\.(?:patch_embed\.projection|neck\.conv[12])\.weight"
_DOUBLING = r"mask_decoder\.upscale_conv[12]\.weight"
_SHARED = r"shared_image_embedding\.positional_embedding"
_UNUSED = r"prompt_encoder\.mask_embed\..+"
#: For tensors with Hugging Face's names.
_RULES = (
    Rule(rf"({_KERNELS})", r"\1", channels_last),
    Rule(rf"({_DOUBLING})", r"\1", _doubling),
    Rule(_SHARED, "prompt_encoder.shared_embedding.positional_embedding"),
    Rule(_UNUSED, drop="mask prompts"),
    Rule(rf"(?!{_KERNELS}|{_DOUBLING}|{_SHARED}|{_UNUSED})(.+)", r"\1"),
)
