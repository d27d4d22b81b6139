"""From vision tokens to the language model's width: z_vis [B S' Dv] -> z_img [B S D]."""

import mlx.core as mx
import mlx.nn as nn

from ..config import FusionConfig
from ..errors import UserError


class LinearProjector(nn.Module):
    """One linear layer, as the paper describes."""

    def __init__(self, config: FusionConfig, width: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.grid = grid

    def __call__(self, z_vis: mx.array) -> mx.array:
        return self.linear(z_vis)


class MLPProjector(nn.Module):
    """Two layers with a ReLU (GELU is 40 times slower on MLX's CPU backend)."""

    def __init__(self, config: FusionConfig, width: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        hidden = config.projector_hidden_size or 2 * dim
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, dim)
        self.grid = grid

    def __call__(self, z_vis: mx.array) -> mx.array:
        return self.linear_2(nn.relu(self.linear_1(z_vis)))


class PixelShuffleProjector(nn.Module):
    """Joins factor x factor neighbouring tokens, then one linear layer (as in SmolVLM)."""

    def __init__(self, config: FusionConfig, width: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.factor = f = config.pixel_shuffle_factor
        if f < 1 or grid[0] % f or grid[1] % f:
            raise UserError(
                f"fusion_config.pixel_shuffle_factor: expected a divisor of the "
                f"{grid[0]}x{grid[1]} token grid, got {f}"
            )
        self.vision_grid = grid
        self.grid = (grid[0] // f, grid[1] // f)
        self.linear = nn.Linear(width * f * f, dim, bias=False)

    def __call__(self, z_vis: mx.array) -> mx.array:
        B, _, width = z_vis.shape
        (Gh, Gw), f = self.grid, self.factor
        z = z_vis.reshape(B, Gh, f, Gw, f, width).transpose(0, 1, 3, 2, 4, 5)
        return self.linear(z.reshape(B, Gh * Gw, f * f * width))


PROJECTORS = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
}
