"""What the tests of the conversions share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.config import read_json
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.weights import assign, read_weights
from convert import __main__ as cli


@pytest.fixture(scope="session")
def converted() -> Callable[..., Any]:
    """The MLX encoder that the command line makes of a saved checkpoint."""

    def convert(source: Path, out: Path, *options: str, command: str = "vision") -> Any:
        arguments = [command, "--hf-path", str(source), "--mlx-path", str(out), *options]
        assert cli.main(arguments) == 0
        encoder = build_encoder(read_json(out / "config.json"))
        assign(encoder, read_weights(out), out)
        return encoder

    return convert


@pytest.fixture(scope="session")
def token_error() -> Callable[..., float]:
    """Largest error of an output token, relative to that token's largest reference value.

    `reference` maps NCHW torch pixels to tokens [B S Dv].
    """
    import torch

    def error(ours: Any, reference: Callable[[Any], Any], height: int, width: int = 0) -> float:
        shape = (2, height, width or height, 3)
        pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        with torch.no_grad():
            want = reference(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).numpy()
        got = np.array(ours(mx.array(pixels)))
        assert got.shape == want.shape
        return float((np.abs(got - want).max(-1) / np.abs(want).max(-1)).max())

    return error
