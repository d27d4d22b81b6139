"""SAM's image encoder in the checkpoints of Hugging Face and of Meta."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.tensors import Rule, channels_last, known_keys
from agevlm_mlx.models.vision.sam import SamConfig

_REST = "prompt encoder and mask decoder"
META_FILES = "sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or sam_vit_h_4b8939.pth"


def config(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our ``vision_config`` of a ``SamVisionConfig``."""
    own = known_keys(SamConfig, table)
    if own.get("mlp_dim") is None:
        ratio = table.get("mlp_ratio", 4.0)
        own["mlp_dim"] = int(own.get("hidden_size", SamConfig.hidden_size) * ratio)
    return own


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """For the keys of ``SamModel`` and ``SamVisionModel``."""
    kernels = r"patch_embed\.projection\.weight|neck\.conv[12]\.weight"
    others = (
        r"pos_embed|patch_embed\.projection\.bias|neck\.layer_norm[12]\.(?:weight|bias)"
        r"|layers\.\d+\..+"
    )
    return (
        Rule(rf"(?:vision_encoder\.)?({kernels})", r"\1", channels_last),
        Rule(rf"(?:vision_encoder\.)?({others})", r"\1"),
        Rule(r"(prompt_encoder|mask_decoder|shared_image_embedding)\..+", drop=_REST),
    )


def meta_config(tensors: Mapping[str, mx.array], where: object) -> dict[str, Any]:
    """The ``vision_config`` of Meta's file, which holds none, from its tensors' shapes.

    Besides vit_b, vit_l and vit_h any model of Meta's ``ImageEncoderViT`` with relative
    positions is read, such as one that was made smaller. ``UserError`` for anything else.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        tensor = tensors.get(f"image_encoder.{key}")
        if tensor is None or tensor.ndim != dimensions or not tensor.size:
            got = "nothing" if tensor is None else f"a tensor of shape {tensor.shape}"
            raise UserError(
                f"{where}: expected a file of Meta's first SAM ({META_FILES}) with "
                f"{dimensions} dimensions in image_encoder.{key}, got {got} there"
            )
        return tensor.shape

    _, grid, _, hidden = shape("pos_embed", 4)
    patch = shape("patch_embed.proj.weight", 4)
    blocks = [key for key in tensors if key.startswith("image_encoder.blocks.")]
    depth = len({key.split(".")[2] for key in blocks})
    tables = [shape(f"blocks.{i}.attn.rel_pos_h", 2) for i in range(max(depth, 1))]
    everywhere = 2 * grid - 1  # rows of the table of a global layer
    windows = {rows for rows, _ in tables} - {everywhere}
    if len(windows) > 1:
        raise UserError(
            f"{where}: expected tables of relative positions of one window size besides the "
            f"global {everywhere} rows, got {sorted(windows)} rows; this is not Meta's SAM"
        )
    return {
        "image_size": grid * patch[2],
        "patch_size": patch[2],
        "num_channels": patch[1],
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": hidden // tables[0][1],
        "mlp_dim": shape("blocks.0.mlp.lin1.weight", 2)[0],
        "output_channels": shape("neck.0.weight", 4)[0],
        "window_size": (windows.pop() + 1) // 2 if windows else 0,
        "global_attn_indexes": [i for i, (rows, _) in enumerate(tables) if rows == everywhere],
        "qkv_bias": "image_encoder.blocks.0.attn.qkv.bias" in tensors,
    }
