"""Sizes of the Segment Anything Models that can be teachers, and where the shipped one is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import config
from ..errors import UserError

#: The teacher that the package ships.
EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "teacher"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: SAM's normalisation (ImageNet mean and std, 0..255), the same for all its checkpoints.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a SAM model. The defaults are those of Meta's vit_b."""

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    #: Channels of the image embedding, of the prompts and of the mask decoder.
    out_chans: int = 256
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_mlp_dim: int = 2048
    decoder_num_heads: int = 8
    iou_head_hidden_dim: int = 256
    #: Whether the three masks for ambiguous prompts were trained; a point then uses the best.
    multimask: bool = True

    def __post_init__(self) -> None:
        sizes = [
            *(self.image_size, self.patch_size, self.embed_dim, self.num_heads, self.out_chans),
            *(self.mask_in_chans, self.decoder_mlp_dim, self.decoder_num_heads),
            self.iou_head_hidden_dim,
        ]
        depths = (self.depth, self.decoder_depth)
        if (
            min(*sizes, *depths) < 1
            or max(sizes) > 8192
            or max(depths) > 256
            or not 0 < self.mlp_ratio <= 64
            or not 0 <= self.window_size <= 8192
            or not all(0 <= index < self.depth for index in self.global_attn_indexes)
        ):
            raise UserError(f"teacher architecture: sizes out of range in {self}")
        if self.image_size % self.patch_size or self.embed_dim % self.num_heads:
            raise UserError(
                f"teacher architecture: image_size {self.image_size} must be a multiple of "
                f"patch_size {self.patch_size}, embed_dim {self.embed_dim} of num_heads "
                f"{self.num_heads}"
            )
        if self.out_chans % 8 or self.out_chans // 2 % self.decoder_num_heads:
            raise UserError(
                f"teacher architecture: out_chans {self.out_chans} must be a multiple of 8, and "
                f"half of it one of decoder_num_heads {self.decoder_num_heads}"
            )

    @property
    def grid(self) -> int:
        """Cells along a side of the image embedding, Gs."""
        return self.image_size // self.patch_size


#: Meta's checkpoints, told apart by (embed_dim, depth).
META: dict[str, Architecture] = {
    "vit_b": Architecture(),
    "vit_l": Architecture(
        embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)
    ),
    "vit_h": Architecture(
        embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)
    ),
}


#: What to do about a file that is not SAM's.
ADVICE = (
    "use one of Meta's first SAM checkpoints: sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or "
    "sam_vit_h_4b8939.pth"
)


def meta_architecture(
    path: Path, shapes: Mapping[str, tuple[int, ...]], wanted: str | None
) -> Architecture:
    """Which of Meta's models the tensors of these shapes, with Meta's names, belong to.

    ``UserError`` for another model, or when it is not the `wanted` one.
    """
    patch = shapes.get("image_encoder.patch_embed.proj.weight")
    if not patch or "mask_decoder.iou_token.weight" not in shapes:
        raise UserError(
            f"{path}: expected the weights of segment_anything, got keys like "
            f"{', '.join(sorted(shapes)[:3])}; {ADVICE}"
        )
    depth = sum(
        key.startswith("image_encoder.blocks.") and key.endswith(".norm1.weight") for key in shapes
    )
    name = _meta_name(patch[0], depth)
    if name is None:
        raise UserError(
            f"{path}: expected vit_b, vit_l or vit_h, got an encoder of width {patch[0]} and "
            f"depth {depth}; {ADVICE}"
        )
    _check_wanted(path, name, wanted)
    return META[name]


def folder_architecture(folder: Path, wanted: str | None = None) -> tuple[Architecture, bool]:
    """The sizes that the config.json of a teacher's folder says, and whether it is Hugging Face's.

    A folder is one of ``scripts/train_teacher.py`` or a ``SamModel`` of Hugging Face.
    ``UserError`` for anything else, and when it is not the `wanted` one of Meta's models.
    """
    path = folder / CONFIG
    table = config.read_json(path)
    if isinstance(table, dict) and table.get("model_type") == "sam":
        own = _hugging_face(table, str(path))
    elif isinstance(table, dict) and "architecture" in table:
        own = table["architecture"]
    else:
        raise UserError(
            f"{path}: expected a teacher made by scripts/train_teacher.py or a SamModel of "
            f"Hugging Face (model_type sam), got neither; {ADVICE}"
        )
    architecture = config.from_dict(Architecture, own, str(path))
    name = _meta_name(architecture.embed_dim, architecture.depth)
    _check_wanted(folder, name or "a model of other sizes", wanted)
    return architecture, own is not table.get("architecture")


def _meta_name(width: int, depth: int) -> str | None:
    sizes = {(known.embed_dim, known.depth): name for name, known in META.items()}
    return sizes.get((width, depth))


def _check_wanted(path: Path, name: str, wanted: str | None) -> None:
    if wanted not in (None, name):
        raise UserError(f"{path}: holds {name}, got --model-type {wanted}; pass {name}")


#: Hugging Face's part and key -> our field.
_FIELDS = {
    ("vision_config", "image_size"): "image_size",
    ("vision_config", "patch_size"): "patch_size",
    ("vision_config", "hidden_size"): "embed_dim",
    ("vision_config", "num_hidden_layers"): "depth",
    ("vision_config", "num_attention_heads"): "num_heads",
    ("vision_config", "mlp_ratio"): "mlp_ratio",
    ("vision_config", "window_size"): "window_size",
    ("vision_config", "global_attn_indexes"): "global_attn_indexes",
    ("vision_config", "output_channels"): "out_chans",
    ("prompt_encoder_config", "mask_input_channels"): "mask_in_chans",
    ("mask_decoder_config", "num_hidden_layers"): "decoder_depth",
    ("mask_decoder_config", "mlp_dim"): "decoder_mlp_dim",
    ("mask_decoder_config", "num_attention_heads"): "decoder_num_heads",
    ("mask_decoder_config", "iou_head_hidden_dim"): "iou_head_hidden_dim",
}
#: What Hugging Face's configuration can say and Meta's code cannot do otherwise.
_FIXED = {
    ("vision_config", "num_channels"): 3,
    ("vision_config", "hidden_act"): "gelu",
    ("vision_config", "layer_norm_eps"): 1e-6,
    ("vision_config", "qkv_bias"): True,
    ("vision_config", "use_abs_pos"): True,
    ("vision_config", "use_rel_pos"): True,
    ("prompt_encoder_config", "num_point_embeddings"): 4,
    ("mask_decoder_config", "hidden_act"): "relu",
    ("mask_decoder_config", "attention_downsample_rate"): 2,
    ("mask_decoder_config", "num_multimask_outputs"): 3,
    ("mask_decoder_config", "iou_head_depth"): 3,
}


def _hugging_face(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields of a ``SamConfig``; what it leaves out has the same defaults as ours."""

    def said(part: str, key: str) -> Any:
        own = table.get(part)
        return own.get(key) if isinstance(own, Mapping) else None

    for (part, key), only in _FIXED.items():
        if said(part, key) not in (None, only):
            raise UserError(
                f"{where}: {part}.{key}: expected {only!r}, as in every SAM of Meta's, got "
                f"{said(part, key)!r}; {ADVICE}"
            )
    own = {
        ours: said(part, key)
        for (part, key), ours in _FIELDS.items()
        if said(part, key) is not None
    }
    width, mlp = own.get("embed_dim", Architecture.embed_dim), said("vision_config", "mlp_dim")
    if isinstance(mlp, int) and isinstance(width, int) and width > 0:
        own["mlp_ratio"] = mlp / width
    return own
