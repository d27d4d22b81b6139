"""What labelling needs of a teacher: `sam.teacher` is one in torch, `sam.mlx_teacher` in MLX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

#: A box (x0, y0, x1, y1) or a point (x, y) in pixels of the image.
Prompt = tuple[float, ...]


@dataclass(frozen=True)
class Labels:
    """The teacher's answer for one image of h x w pixels with n prompts.

    masks: bool [n h w] at the resolution of the source image. iou: f32 [n], the teacher's own
    estimate of each mask's IoU. features: f32 [Gs Gs C], the image embedding of the letterboxed
    image, or None.
    """

    masks: np.ndarray
    iou: np.ndarray
    features: np.ndarray | None


@dataclass(frozen=True)
class Candidates:
    """All masks of some points that look good.

    masks: bool [k h w]. iou: f32 [k], the teacher's own estimate. stability: f32 [k], IoU of the
    mask with a stricter threshold and the mask with a laxer one.
    """

    masks: np.ndarray
    iou: np.ndarray
    stability: np.ndarray


class Look(Protocol):
    """An image that the teacher's encoder has seen, to be asked about at will."""

    @property
    def features(self) -> np.ndarray:
        """f32 [Gs Gs C]."""
        ...

    def candidates(
        self, points: np.ndarray, *, min_iou: float, min_stability: float, offset: float = 1.0
    ) -> Candidates:
        """The masks of points f64 [n 2] whose estimated IoU is above `min_iou` and whose stability
        (under logit thresholds +- `offset`) is `min_stability` or more, in the order of the points:
        three a point, or one where the teacher learnt one."""
        ...


class Teacher(Protocol):
    """A Segment Anything Model."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights' file."""
        ...

    @property
    def feature_channels(self) -> int:
        """C."""
        ...

    @property
    def batch_size(self) -> int:
        """Images that `label` takes at once."""
        ...

    @property
    def light(self) -> bool:
        """Whether one copy per core is a good way to use a CPU."""
        ...

    def label(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[Prompt]],
        *,
        features: bool = False,
    ) -> Sequence[Labels]:
        """The best mask of every prompt of every image u8 [h w 3]."""
        ...

    def look(self, image: np.ndarray) -> Look:
        """Run the encoder over an image u8 [h w 3]."""
        ...
