"""The pixel preprocessing that a published vision tower was trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agevlm_mlx.data.image import Preprocessor


def read_preprocessing(folder: Path, default: Mapping[str, Any]) -> Preprocessor:
    return Preprocessor.from_dict(default)
