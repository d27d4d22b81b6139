"""From vision tokens to the language model's width: z_vis [B S' Dv] -> z_img [B S D]."""

import math

import mlx.core as mx
import mlx.nn as nn

from ..config import FusionConfig
from ..errors import UserError

#: Waves of a side of the picture, in half turns: 1 tells one end from the other.
_WAVES = (1, 2, 4, 8)


def sincos_positions(grid: tuple[int, int]) -> mx.array:
    """Where each token of a grid lies: f32 [Gh*Gw 16], sine and cosine of the middle of its cell.

    As in MAE (arXiv 2111.06377, appendix A.1), but in shares of the picture's height and width, so
    that it means the same on every grid.
    """

    def side(cells: int) -> mx.array:
        middle = (mx.arange(cells) + 0.5) / cells
        angles = math.pi * middle[:, None] * mx.array(_WAVES, mx.float32)
        return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)

    Gh, Gw = grid
    rows, columns = mx.repeat(side(Gh), Gw, axis=0), mx.tile(side(Gw), (Gh, 1))
    return mx.concatenate([rows, columns], axis=-1)


class Projector(nn.Module):
    """What all have in common: the grid of the tokens that come out, and where each one lies."""

    def __init__(self, config: FusionConfig, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        if config.image_positions:
            self.position_proj = nn.Linear(4 * len(_WAVES), dim, bias=False)

    def tokens(self, z_vis: mx.array) -> mx.array:
        """z_vis [B S' Dv] -> [B S D], without positions."""
        raise NotImplementedError

    def __call__(self, z_vis: mx.array) -> mx.array:
        z_img = self.tokens(z_vis)
        if "position_proj" in self:
            z_img = z_img + self.position_proj(sincos_positions(self.grid).astype(z_img.dtype))
        return z_img


class LinearProjector(Projector):
    """One linear layer, as the paper describes."""

    def __init__(self, config: FusionConfig, width: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(config, dim, grid)
        self.linear = nn.Linear(width, dim)

    def tokens(self, z_vis: mx.array) -> mx.array:
        return self.linear(z_vis)


class MLPProjector(Projector):
    """Two layers with a ReLU (GELU is 40 times slower on MLX's CPU backend)."""

    def __init__(self, config: FusionConfig, width: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(config, dim, grid)
        hidden = config.projector_hidden_size or 2 * dim
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, dim)

    def tokens(self, z_vis: mx.array) -> mx.array:
        return self.linear_2(nn.relu(self.linear_1(z_vis)))


class PixelShuffleProjector(Projector):
    """Joins factor x factor neighbouring tokens, then one linear layer (as in SmolVLM)."""

    def __init__(self, config: FusionConfig, width: int, dim: int, grid: tuple[int, int]) -> None:
        f = config.pixel_shuffle_factor
        if f < 1 or grid[0] % f or grid[1] % f:
            raise UserError(
                f"fusion_config.pixel_shuffle_factor: expected a divisor of the "
                f"{grid[0]}x{grid[1]} token grid, got {f}"
            )
        super().__init__(config, dim, (grid[0] // f, grid[1] // f))
        self.factor, self.vision_grid = f, grid
        self.linear = nn.Linear(width * f * f, dim, bias=False)

    def tokens(self, z_vis: mx.array) -> mx.array:
        B, _, width = z_vis.shape
        (Gh, Gw), f = self.grid, self.factor
        z = z_vis.reshape(B, Gh, f, Gw, f, width).transpose(0, 1, 3, 2, 4, 5)
        return self.linear(z.reshape(B, Gh * Gw, f * f * width))


PROJECTORS = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
}
