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
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, one_line
from .architecture import (
    ADVICE,
    EMBEDDED,
    PIXEL_MEAN,
    PIXEL_STD,
    WEIGHTS,
    Architecture,
    folder_architecture,
    meta_architecture,
)
from .names import as_meta
from .protocol import Candidates, Labels, Prompt

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
        f"--backend torch needs torch, torchvision and segment_anything, but {error.name or error} "
        'is not installed; run: pip install "agevlm-mlx[teacher]", or use --backend mlx'
    ) from error

#: Pixels of full-size masks that are in memory at a time, 4 bytes each.
_PIXELS = 1 << 25


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


class _Resize(ResizeLongestSide):
    """Meta's, but a long thin picture keeps a side of one pixel, as in MLX: theirs has none."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        height, width = ResizeLongestSide.get_preprocess_shape(oldh, oldw, long_side_length)
        return max(height, 1), max(width, 1)


class Teacher:
    """SAM with weights on a device. ``UserError`` for a checkpoint that is not SAM's.

    `checkpoint` is None (the embedded teacher), a folder written by
    ``scripts/train_teacher.py``, one of Meta's files (``sam_vit_b_01ec64.pth`` ...), or the folder
    or the .safetensors file of a Hugging Face ``SamModel``.
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
                "the folder of a Hugging Face SamModel, or no --checkpoint"
            )
        state = _read_weights(weights)
        theirs = any(name.startswith("vision_encoder.") for name in state)
        if path.is_dir():
            self.architecture, theirs = folder_architecture(path, model_type)
        if theirs:
            state = as_meta(state, weights)
        if not path.is_dir():
            self.architecture = meta_architecture(weights, _shapes(state), model_type)
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
        self._resize = _Resize(self.architecture.image_size)

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
        embeddings, resized = self._embed(images)
        flat = [(i, prompt) for i, group in enumerate(prompts) for prompt in group]
        masks: list[list[np.ndarray]] = [[] for _ in images]
        scores: list[list[np.ndarray]] = [[] for _ in images]
        for start in range(0, len(flat), chunk):
            part = flat[start : start + chunk]
            logits, iou = self._best(embeddings, images, part)
            owners = [i for i, _ in part]
            for i, rows in itertools.groupby(range(len(part)), key=owners.__getitem__):
                index = list(rows)
                low, size = logits[index, None], images[i].shape[:2]
                most = self._at_once(size)
                for first in range(0, len(index), most):
                    full = self.sam.postprocess_masks(low[first : first + most], resized[i], size)
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

    @torch.inference_mode()
    def look(self, image: np.ndarray) -> "Look":
        """Run the encoder over one image u8[h w 3], which then can be asked about many points."""
        embedding, (resized,) = self._embed([image])
        return Look(self, embedding, resized, image.shape[:2])

    def _at_once(self, size: tuple[int, int]) -> int:
        """How many masks of an image of `size` may be in memory in full size."""
        return max(1, _PIXELS // max(size[0] * size[1], self.architecture.image_size**2))

    def _embed(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Image embeddings [n C Gs Gs], and the sizes that the images were brought to."""
        resized = [self._resize.apply_image(image) for image in images]
        tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in resized]
        pixels = torch.stack([self.sam.preprocess(t.to(self.device)) for t in tensors])
        return self.sam.image_encoder(pixels), [image.shape[:2] for image in resized]

    def _moved(self, prompt: Sequence[float], size: tuple[int, int]) -> np.ndarray:
        """f32[4]: a box, or a point and zeros, in model pixels. `size` is that of the image."""
        corners = np.asarray(prompt, dtype=np.float64).reshape(-1, 2)
        moved = self._resize.apply_coords(corners, size).ravel()
        row = np.zeros(4, dtype=np.float32)
        row[: len(moved)] = moved
        return row

    def _best(
        self,
        embeddings: torch.Tensor,
        images: Sequence[np.ndarray],
        part: Sequence[tuple[int, Prompt]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-resolution logits [n h w] and estimated IoU [n], one mask per prompt."""
        rows = np.stack([self._moved(prompt, images[i].shape[:2]) for i, prompt in part])
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


class Look:
    """What `Teacher.look` saw of an image of `size` (h, w), see `protocol.Look`."""

    def __init__(
        self,
        teacher: Teacher,
        embedding: torch.Tensor,
        resized: tuple[int, int],
        size: tuple[int, int],
    ):
        self._teacher, self._embedding = teacher, embedding
        self._resized, self._size = resized, size

    @property
    def features(self) -> np.ndarray:
        """f32[Gs Gs C]."""
        return self._embedding[0].permute(1, 2, 0).cpu().numpy()

    @torch.inference_mode()
    def candidates(
        self, points: np.ndarray, *, min_iou: float, min_stability: float, offset: float = 1.0
    ) -> Candidates:
        """The good masks of points f64[n 2], in their order."""
        teacher, sam = self._teacher, self._teacher.sam
        rows = np.stack([teacher._moved(point, self._size) for point in points])
        prompts = torch.from_numpy(rows).to(teacher.device)
        kinds = torch.zeros(len(rows), dtype=torch.bool, device=teacher.device)
        logits, iou = decode(sam, self._embedding.expand(len(rows), -1, -1, -1), prompts, kinds)
        tokens = slice(1, None) if teacher.architecture.multimask else slice(0, 1)
        low, iou = logits[:, tokens].flatten(0, 1), iou[:, tokens].flatten()
        good = iou > min_iou
        low, iou = low[good], iou[good]
        chunk = teacher._at_once(self._size)
        masks, stability = [np.zeros((0, *self._size), bool)], [np.zeros(0, np.float32)]
        for start in range(0, len(low), chunk):
            full = sam.postprocess_masks(
                low[start : start + chunk, None], self._resized, self._size
            )[:, 0]
            inner = (full > sam.mask_threshold + offset).sum((1, 2))
            outer = (full > sam.mask_threshold - offset).sum((1, 2))
            stability.append((inner / outer.clamp(min=1)).float().cpu().numpy())
            masks.append((full > sam.mask_threshold).cpu().numpy())
        steady = np.concatenate(stability)
        kept = steady >= min_stability
        return Candidates(np.concatenate(masks)[kept], iou.cpu().numpy()[kept], steady[kept])


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
        raise UserError(f"{path}: expected SAM's table of weights, got {keys}; {ADVICE}")
    return state


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
