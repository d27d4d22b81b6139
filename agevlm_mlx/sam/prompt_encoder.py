"""SAM's prompt encoder (arXiv 2304.02643, appendix A) for boxes and points, in MLX.

Matches the ``PromptEncoder`` of Meta's ``segment_anything``, with Hugging Face's parameter names.
Mask prompts are left out: no teacher is given any.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from .architecture import Architecture


class PositionalEmbedding(nn.Module):
    """Random Fourier features of places (arXiv 2006.10739)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.positional_embedding = mx.zeros((2, width // 2))

    def __call__(self, places: mx.array) -> mx.array:
        """x, y f32 [... 2], 0..1 over the input -> f32 [... C]."""
        # No matrix product: a GPU may round its factors, and these angles are large.
        across, down = self.positional_embedding.astype(mx.float32)
        x, y = 2 * places[..., :1] - 1, 2 * places[..., 1:] - 1
        angles = 2 * math.pi * (x * across + y * down)
        return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)


class PromptEncoder(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, self.image_size = architecture.out_chans, architecture.image_size
        self.side = architecture.grid
        self.shared_embedding = PositionalEmbedding(width)
        #: A point of the background and one of the object, two corners of a box.
        self.point_embed = [nn.Embedding(1, width) for _ in range(4)]
        self.not_a_point_embed = nn.Embedding(1, width)
        self.no_mask_embed = nn.Embedding(1, width)

    def __call__(self, prompts: mx.array, boxes: mx.array) -> mx.array:
        """Two tokens for each prompt.

        prompts: f32 [n 4] in input px, a box (x0, y0, x1, y1) or a point (x, y, ignored, ignored).
        boxes: bool [n], which of them are boxes. Returns [n 2 C].
        """
        # Half a pixel: the middle of a pixel is its place.
        places = (prompts.reshape(-1, 2, 2).astype(mx.float32) + 0.5) / self.image_size
        encoded = self.shared_embedding(places).astype(self.no_mask_embed.weight.dtype)
        _, point, first, second = (embedding.weight for embedding in self.point_embed)
        corners = encoded + mx.stack([first, second], axis=1)
        # A point without a box is followed by a token that says that no more points come.
        end = mx.broadcast_to(self.not_a_point_embed.weight, corners[:, :1].shape)
        points = mx.concatenate([encoded[:, :1] + point, end], axis=1)
        return mx.where(boxes[:, None, None], corners, points)

    def cells(self) -> mx.array:
        """Encoded places [S C] of the image embedding's cells, row by row."""
        middles = (mx.arange(self.side) + 0.5) / self.side
        across, down = mx.meshgrid(middles, middles)  # "xy": across varies along a row
        places = mx.stack([across, down], axis=-1).reshape(-1, 2)
        return self.shared_embedding(places).astype(self.no_mask_embed.weight.dtype)
