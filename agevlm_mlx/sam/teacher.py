"""The SAM teacher: Meta's `segment_anything` model code in torch, run once over the images.

The weights are one of Meta's checkpoints (vit_b, vit_l, vit_h) or the small teacher shipped
with the package: the same classes at about 1 M parameters, trained on drawn scenes by
``scripts/train_teacher.py``. This is the only module of the package that imports torch.
"""

# pyright: reportMissingImports=false
# (torch is an extra: everything but this teacher works without it)
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import config
from ..errors import UserError, one_line

try:
    import torch
    from safetensors.torch import load_file
    from torch import nn

    from .torchvision_ops import import_torchvision

    import_torchvision()
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )
    from segment_anything.utils.transforms import (
        ResizeLongestSide,
    )
except ImportError as error:
    raise UserError(
        f"the SAM teacher needs torch, torchvision and segment_anything, but {error.name or error} "
        'is not installed; run: pip install "agevlm-mlx[teacher]"'
    ) from error

#: The teacher that the package ships.
EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "teacher"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: SAM's normalisation (ImageNet mean and std, 0..255), the same for all its checkpoints.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

Prompt = Sequence[float]


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

    def __post_init__(self):
        sizes = (self.image_size, self.patch_size, self.embed_dim, self.out_chans, self.num_heads)
        if min(sizes) < 1 or max(sizes) > 8192 or self.depth > 256 or self.decoder_depth > 64:
            raise UserError(f"teacher architecture: sizes out of range in {self}")
        if self.image_size % self.patch_size or self.embed_dim % self.num_heads:
            raise UserError(
                f"teacher architecture: image_size {self.image_size} must be a multiple of "
                f"patch_size {self.patch_size}, embed_dim {self.embed_dim} of num_heads "
                f"{self.num_heads}"
            )


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


def build(arch: Architecture) -> Sam:
    """A randomly initialised SAM of the given sizes, from Meta's own classes."""
    grid = arch.image_size // arch.patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=arch.image_size,
            patch_size=arch.patch_size,
            embed_dim=arch.embed_dim,
            depth=arch.depth,
            num_heads=arch.num_heads,
            mlp_ratio=arch.mlp_ratio,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
            qkv_bias=True,
            use_rel_pos=True,
            window_size=arch.window_size,
            global_attn_indexes=arch.global_attn_indexes,
            out_chans=arch.out_chans,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=arch.out_chans,
            image_embedding_size=(grid, grid),
            input_image_size=(arch.image_size, arch.image_size),
            mask_in_chans=arch.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=arch.decoder_depth,
                embedding_dim=arch.out_chans,
                mlp_dim=arch.decoder_mlp_dim,
                num_heads=arch.decoder_num_heads,
            ),
            transformer_dim=arch.out_chans,
            iou_head_depth=3,
            iou_head_hidden_dim=arch.iou_head_hidden_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def decode(
    sam: Sam, embeddings: torch.Tensor, prompts: torch.Tensor, kinds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of many prompts of many images in one pass through Meta's prompt encoder and decoder.

    `embeddings` f32[n C Gs Gs] holds the embedding of each prompt's own image, `prompts`
    f32[n 4] boxes or points (x, y, ignored, ignored) in model pixels, `kinds` bool[n] is True
    for a box. Returns logits f32[n 4 4Gs 4Gs] (SAM's single mask, then its three) and their
    estimated IoU f32[n 4].

    The decoder is made for one image, whose embedding it repeats for every prompt and adds to
    the prompt's dense embedding. Here the decoder gets zeros for the image, and the dense
    embedding already holds the sum: the same arithmetic. A box and a point both make two
    sparse tokens, so they share a batch.
    """
    sparse = embeddings.new_zeros((len(prompts), 2, embeddings.shape[1]))
    boxes, points = kinds.nonzero()[:, 0], (~kinds).nonzero()[:, 0]
    if len(boxes):
        sparse[boxes] = sam.prompt_encoder(points=None, boxes=prompts[boxes], masks=None)[0]
    if len(points):
        labels = torch.ones((len(points), 1), device=prompts.device)
        chosen = (prompts[points, None, :2], labels)
        sparse[points] = sam.prompt_encoder(points=chosen, boxes=None, masks=None)[0]
    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    return sam.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=embeddings + no_mask,
    )


@dataclass(frozen=True)
class Labels:
    """What the teacher says about one image of h x w pixels with n prompts."""

    #: bool[n h w] at the resolution of the source image.
    masks: np.ndarray
    #: f32[n], the teacher's own estimate of each mask's IoU.
    iou: np.ndarray
    #: f32[Gs Gs C] image embedding of the letterboxed image, or None.
    features: np.ndarray | None


class Teacher:
    """SAM with weights on a device. ``UserError`` for a checkpoint that is not SAM's.

    `checkpoint` is None (the embedded teacher), a folder written by
    ``scripts/train_teacher.py``, or one of Meta's files (``sam_vit_b_01ec64.pth`` ...).
    `model_type` (vit_b, vit_l, vit_h) is found from the weights; when given it is checked.
    `device` is mps, cuda or cpu; None takes the first of them that is there.
    """

    def __init__(
        self,
        checkpoint: Path | str | None = None,
        model_type: str | None = None,
        device: str | None = None,
    ):
        self.device = _device(device)
        path = EMBEDDED if checkpoint is None else Path(checkpoint)
        weights = path / WEIGHTS if path.is_dir() else path
        if not weights.is_file():
            raise UserError(
                f"{weights}: no such file; pass a SAM checkpoint such as sam_vit_b_01ec64.pth, "
                "a folder made by scripts/train_teacher.py, or no --checkpoint"
            )
        state = _read_weights(weights)
        self.architecture = (
            config.from_dict(
                Architecture, config.read_json(path / CONFIG).get("architecture", {}), str(path)
            )
            if path.is_dir()
            else META[_model_type(weights, state, model_type)]
        )
        sam = build(self.architecture)
        try:
            sam.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UserError(
                f"{weights}: not the weights of this SAM model: {one_line(error)}"
            ) from None
        self.sam = sam.float().eval().requires_grad_(False).to(self.device)
        with weights.open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = "embedded" if checkpoint is None else path.name
        self._resize = ResizeLongestSide(self.architecture.image_size)

    @property
    def feature_channels(self) -> int:
        """C of `features`."""
        return self.architecture.out_chans

    @property
    def batch_size(self) -> int:
        """Images per encoder pass: 8 of 16 x 16 cells, which still fit a core's cache.

        One of Meta's images has 4096 cells, and its attention alone takes a gigabyte.
        """
        cells = (self.architecture.image_size // self.architecture.patch_size) ** 2
        return max(1, 2048 // cells)

    @property
    def light(self) -> bool:
        """Whether one copy of the model per core is a good way to use a CPU."""
        size = sum(p.numel() for p in self.sam.parameters())
        return self.device.type == "cpu" and size < 20_000_000

    def masks(self, image: np.ndarray, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Masks bool[n h w] and their estimated IoU f32[n] for one image uint8[h w 3] RGB.

        `prompts` are boxes (x0, y0, x1, y1) or points (x, y) in pixels of the image.
        """
        labels = self.label([image], [prompts])[0]
        return labels.masks, labels.iou

    def features(self, image: np.ndarray) -> np.ndarray:
        """SAM's image embedding f32[Gs Gs C]: image uint8[h w 3] in the top left corner.

        SAM resizes the longer side to fill the grid and pads to the right and below.
        """
        embedding = self.label([image], [[]], features=True)[0].features
        assert embedding is not None
        return embedding

    @torch.inference_mode()
    def label(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[Prompt]],
        *,
        features: bool = False,
        chunk: int = 32,
    ) -> list[Labels]:
        """Masks (and features) of a batch of images, each with its own prompts.

        The encoder runs once over the batch, the decoder over `chunk` prompts at a time.
        """
        resized = [self._resize.apply_image(image) for image in images]
        tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in resized]
        pixels = torch.stack([self.sam.preprocess(t.to(self.device)) for t in tensors])
        embeddings = self.sam.image_encoder(pixels)
        flat = [(i, prompt) for i, group in enumerate(prompts) for prompt in group]
        masks: list[list[np.ndarray]] = [[] for _ in images]
        scores: list[list[np.ndarray]] = [[] for _ in images]
        for start in range(0, len(flat), chunk):
            part = flat[start : start + chunk]
            logits, iou = self._best(embeddings, images, part)
            owners = [i for i, _ in part]
            for i, rows in itertools.groupby(range(len(part)), key=owners.__getitem__):
                index = list(rows)
                full = self.sam.postprocess_masks(
                    logits[index, None], resized[i].shape[:2], images[i].shape[:2]
                )
                masks[i].append((full[:, 0] > self.sam.mask_threshold).cpu().numpy())
                scores[i].append(iou[index].cpu().numpy())
        grids = embeddings.permute(0, 2, 3, 1).cpu().numpy() if features else [None] * len(images)
        return [
            Labels(
                np.concatenate([np.zeros((0, *image.shape[:2]), dtype=bool), *masks[i]]),
                np.concatenate([np.zeros(0, dtype=np.float32), *scores[i]]),
                grids[i],
            )
            for i, image in enumerate(images)
        ]

    def _best(
        self,
        embeddings: torch.Tensor,
        images: Sequence[np.ndarray],
        part: Sequence[tuple[int, Prompt]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-resolution logits [n h w] and estimated IoU [n], one mask per prompt."""
        rows = np.zeros((len(part), 4), dtype=np.float32)
        for row, (i, prompt) in enumerate(part):
            corners = np.asarray(prompt, dtype=np.float64).reshape(-1, 2)
            moved = self._resize.apply_coords(corners, images[i].shape[:2]).ravel()
            rows[row, : len(moved)] = moved
        kinds = torch.tensor([len(prompt) == 4 for _, prompt in part], device=self.device)
        chosen = torch.tensor([i for i, _ in part], device=self.device)
        logits, iou = decode(
            self.sam, embeddings[chosen], torch.from_numpy(rows).to(self.device), kinds
        )
        # A box names one object; for a point SAM offers whole, part and sub-part.
        best = torch.zeros_like(chosen)
        if self.architecture.multimask:
            best = torch.where(kinds, best, 1 + iou[:, 1:].argmax(dim=1))
        index = torch.arange(len(part), device=self.device)
        return logits[index, best], iou[index, best]


def set_threads(count: int) -> None:
    """Let torch use this many threads in this process."""
    torch.set_num_threads(count)


def _device(name: str | None) -> torch.device:
    available = {
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    if name is None:
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name.partition(":")[0], False):
        there = ", ".join(kind for kind, ok in available.items() if ok)
        raise UserError(f"device {name!r}: not available here; choose from {there}")
    return torch.device(name)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file. Nothing in it is ever executed."""
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in a dozen ways; all mean the same here
        raise UserError(f"{path}: not a readable checkpoint ({one_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        keys = list(state)[:3] if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: expected SAM's table of weights, got {keys}; {_ADVICE}")
    return state


_ADVICE = (
    "use one of Meta's first SAM checkpoints: sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or "
    "sam_vit_h_4b8939.pth"
)


def _model_type(
    path: Path, state: dict[str, torch.Tensor], wanted: str | None
) -> Literal["vit_b", "vit_l", "vit_h"]:
    """Which of Meta's models these weights belong to."""
    patch = state.get("image_encoder.patch_embed.proj.weight")
    if patch is None or "mask_decoder.iou_token.weight" not in state:
        raise UserError(
            f"{path}: expected the weights of segment_anything, got keys like "
            f"{', '.join(sorted(state)[:3])}; {_ADVICE}"
        )
    depth = sum(
        key.startswith("image_encoder.blocks.") and key.endswith(".norm1.weight") for key in state
    )
    sizes = (patch.shape[0], depth)
    for name in ("vit_b", "vit_l", "vit_h"):
        if sizes == (META[name].embed_dim, META[name].depth):
            if wanted not in (None, name):
                raise UserError(f"{path}: holds {name}, got --model-type {wanted}; pass {name}")
            return name
    raise UserError(
        f"{path}: expected vit_b, vit_l or vit_h, got an encoder of width {sizes[0]} and depth "
        f"{sizes[1]}; {_ADVICE}"
    )
