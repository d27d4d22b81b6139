"""The SAM teacher in MLX: what `sam.teacher` does, without torch.

Both give the same masks from the same checkpoint (`tests/sam/test_mlx_sam_parity.py`), and their
fingerprints are equal, so that stores made by either continue and join those of the other.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from ..data.image import Geometry, Preprocessor
from . import model
from .protocol import Candidates, Labels, Prompt


class MlxTeacher:
    """SAM with weights. ``UserError`` for a checkpoint that is not SAM's.

    checkpoint: None (the embedded teacher), one of Meta's files (``sam_vit_b_01ec64.pth`` ...), a
    folder of ``scripts/train_teacher.py`` or a Hugging Face ``SamModel`` folder.
    model_type (vit_b, vit_l, vit_h) is found from the weights; when given it is checked.
    dtype: of weights and activations; on a GPU float16 halves the memory and changes few pixels.
    """

    def __init__(
        self,
        checkpoint: Path | str | None = None,
        model_type: str | None = None,
        dtype: model.Dtype = "float32",
    ) -> None:
        path = None if checkpoint is None else Path(checkpoint)
        self.sam, weights, self.architecture = model.load(path, model_type, dtype)
        with weights.open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = "embedded" if path is None else path.name
        self._preprocessor = Preprocessor.from_dict(self.sam.vision_encoder.preprocessing)

    @property
    def feature_channels(self) -> int:
        """C of `features`."""
        return self.architecture.out_chans

    @property
    def batch_size(self) -> int:
        """Images of one call: 8 of 16 x 16 cells, one of Meta's with its 4096."""
        return max(1, 2048 // self.architecture.grid**2)

    @property
    def light(self) -> bool:
        """Whether one copy of the model per core is a good way to use a CPU."""
        size = sum(weight.size for weight in dict(tree_flatten(self.sam.parameters())).values())
        return mx.default_device() == mx.cpu and size < 20_000_000

    def masks(self, image: np.ndarray, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Masks bool [n h w] and their estimated IoU f32 [n] for one image u8 [h w 3] RGB.

        prompts: boxes (x0, y0, x1, y1) or points (x, y) in pixels of the image.
        """
        labels = self.label([image], [prompts])[0]
        return labels.masks, labels.iou

    def features(self, image: np.ndarray) -> np.ndarray:
        """SAM's image embedding f32 [Gs Gs C]: image u8 [h w 3] in the top left corner."""
        return self.look(image).features

    def look(self, image: np.ndarray) -> "MlxLook":
        """Run the encoder over an image u8 [h w 3]."""
        embeddings, (geometry,) = self._encode([image])
        return MlxLook(self, embeddings, geometry)

    def label(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[Prompt]],
        *,
        features: bool = False,
        chunk: int = 32,
    ) -> list[Labels]:
        """Masks (and features) of a batch of images u8 [h w 3], each with its own prompts.

        The encoder runs once over the batch, the decoder over `chunk` prompts at a time.
        """
        embeddings, geometries = self._encode(images)
        flat = [(i, prompt) for i, group in enumerate(prompts) for prompt in group]
        masks: list[list[np.ndarray]] = [[] for _ in images]
        scores: list[list[float]] = [[] for _ in images]
        for start in range(0, len(flat), chunk):
            part = flat[start : start + chunk]
            owners = [i for i, _ in part]
            alone = len(set(owners)) == 1
            cells = embeddings[mx.array(owners[:1] if alone else owners)]
            rows = np.stack([input_row(geometries[i], prompt) for i, prompt in part])
            boxes = mx.array([len(prompt) == 4 for _, prompt in part])
            logits, iou = self.sam.masks(cells, mx.array(rows), boxes)
            # A box names one object; for a point SAM offers whole, part and sub-part.
            best = mx.zeros(len(part), mx.int32)
            if self.architecture.multimask:
                best = mx.where(boxes, best, 1 + mx.argmax(iou[:, 1:], axis=1))
            index = mx.arange(len(part))
            logits, iou = logits[index, best], iou[index, best]
            mx.eval(logits, iou)
            for row, (i, score) in enumerate(zip(owners, np.array(iou), strict=True)):
                masks[i].append(np.array(self.full_size(logits[row], geometries[i]) > 0))
                scores[i].append(score)
        return [
            Labels(
                np.stack(masks[i]) if masks[i] else np.zeros((0, *image.shape[:2]), dtype=bool),
                np.array(scores[i], dtype=np.float32),
                self.as_features(embeddings[i]) if features else None,
            )
            for i, image in enumerate(images)
        ]

    def _encode(self, images: Sequence[np.ndarray]) -> tuple[mx.array, list[Geometry]]:
        """Image embeddings [B S C], in memory, and where the images went."""
        ready = [self._preprocessor(Image.fromarray(image)) for image in images]
        embeddings = self.sam.vision_encoder(mx.array(np.stack([pixels for pixels, _ in ready])))
        mx.eval(embeddings)
        return embeddings, [geometry for _, geometry in ready]

    def as_features(self, embedding: mx.array) -> np.ndarray:
        """[S C] -> f32 [Gs Gs C]."""
        side = self.architecture.grid
        return np.array(embedding.astype(mx.float32)).reshape(side, side, -1)

    def full_size(self, logits: mx.array, geometry: Geometry) -> mx.array:
        """Logits f32 [4Gs 4Gs] over the input -> [height width] over the picture, as SAM does it:
        bilinear to the input's size, the padding cut off, bilinear to the picture's size."""
        side = self.architecture.image_size
        _, _, width, height = geometry.shown
        rows = upsampling(logits.shape[0], side, height, geometry.height)
        columns = upsampling(logits.shape[1], side, width, geometry.width)
        return rows @ logits @ columns.T


@dataclass(frozen=True)
class MlxLook:
    """An image that the encoder has seen (`protocol.Look`)."""

    teacher: MlxTeacher
    #: [1 S C]
    embedding: mx.array
    geometry: Geometry

    @property
    def features(self) -> np.ndarray:
        """f32 [Gs Gs C]."""
        return self.teacher.as_features(self.embedding[0])

    def candidates(
        self, points: np.ndarray, *, min_iou: float, min_stability: float, offset: float = 1.0
    ) -> Candidates:
        """The good masks of points f64 [n 2]; see `protocol.Look`."""
        teacher = self.teacher
        rows = np.stack([input_row(self.geometry, point) for point in points])
        boxes = mx.zeros(len(rows), mx.bool_)
        logits, iou = teacher.sam.masks(self.embedding, mx.array(rows), boxes)
        chosen = slice(1, None) if teacher.architecture.multimask else slice(0, 1)
        logits, iou = logits[:, chosen].flatten(0, 1), np.array(iou[:, chosen].flatten())
        mx.eval(logits)
        masks: list[np.ndarray] = []
        scores: list[tuple[float, float]] = []
        for row in np.flatnonzero(iou > min_iou).tolist():
            full = teacher.full_size(logits[row], self.geometry)
            counts = mx.stack([(full > offset).sum(), (full > -offset).sum()])
            sure, perhaps = np.array(counts).tolist()
            stability = sure / perhaps if perhaps else 0.0
            if stability >= min_stability:
                masks.append(np.array(full > 0))
                scores.append((iou[row], stability))
        size = (self.geometry.height, self.geometry.width)
        table = np.array(scores, dtype=np.float32).reshape(-1, 2)
        stack = np.stack(masks) if masks else np.zeros((0, *size), dtype=bool)
        return Candidates(stack, table[:, 0], table[:, 1])


def input_row(geometry: Geometry, prompt: Sequence[float] | np.ndarray) -> np.ndarray:
    """A box or a point in the picture as f32 [4] in input px; of a point the rest is zero."""
    moved = geometry.to_input(np.asarray(prompt, dtype=np.float64).reshape(-1, 2)).ravel()
    return np.pad(moved, (0, 4 - len(moved))).astype(np.float32)


@functools.lru_cache(maxsize=8)
def upsampling(low: int, side: int, shown: int, out: int) -> mx.array:
    """f32 [out low]: `low` values stretched to `side`, of which the first `shown` are stretched
    to `out`. Both in one product, since stretching is linear."""
    return mx.array((_bilinear(shown, out) @ _bilinear(low, side)[:shown]).astype(np.float32))


def _bilinear(count: int, out: int) -> np.ndarray:
    """f64 [out count]: as ``torch.nn.functional.interpolate(mode="bilinear")`` along one axis."""
    at = np.clip((np.arange(out) + 0.5) * count / out - 0.5, 0, count - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(count)), 0)
