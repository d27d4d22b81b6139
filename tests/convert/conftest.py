"""Reference implementations, and the record of how far ours is from them."""

import json
import os
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

#: Where `scripts/parity_table.py` wants the figures of this run.
RECORD = os.environ.get("AGEVLM_PARITY_RECORD")


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """torchvision, importable also where its compiled operators do not load (Linux, CPU)."""
    from agevlm_mlx.sam.torchvision_ops import import_torchvision

    return import_torchvision()


@pytest.fixture(scope="session")
def transformers(torchvision: Any) -> Any:
    import transformers

    return transformers


@pytest.fixture(scope="session")
def parity() -> Callable[..., None]:
    """``parity(part, reference, case, figure, bound)``: `figure` is at most `bound`.

    With ``AGEVLM_PARITY_RECORD`` set to a file, the figures are appended to it as JSON lines,
    from which docs/parity.md is made.
    """

    def check(part: str, reference: str, case: str, figure: float, bound: float) -> None:
        if RECORD:
            row = {"part": part, "reference": reference, "case": case}
            with open(RECORD, "a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"figure": figure, "bound": bound}) + "\n")
        assert figure <= bound

    return check


@pytest.fixture(scope="session")
def randomise() -> Callable[[Any], Any]:
    """Weights large enough that every layer matters (the libraries' own start near zero)."""
    import torch

    def noise(model: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.add_(values, alpha=0.1)
        return model.eval()

    return noise


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
