"""Small vision-language models that look where they should, and show it (MLX)."""

import sys
from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .openblas import preload

if TYPE_CHECKING:
    from .config import ModelConfig
    from .conversation import Conversation
    from .data.records import Turn
    from .generation import batch_generate, generate, stream_generate
    from .models.agevlm import AgeVLM
    from .sampling import Sampling
    from .weights import load

preload()  # before anything imports mlx

try:
    __version__ = metadata.version("agevlm-mlx")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AgeVLM",
    "Conversation",
    "ModelConfig",
    "Sampling",
    "Turn",
    "__version__",
    "batch_generate",
    "generate",
    "load",
    "stream_generate",
]

_HOME = {
    "AgeVLM": ".models.agevlm",
    "Conversation": ".conversation",
    "ModelConfig": ".config",
    "Sampling": ".sampling",
    "Turn": ".data.records",
    "batch_generate": ".generation",
    "generate": ".generation",
    "load": ".weights",
    "stream_generate": ".generation",
}


class _Package(ModuleType):
    """The package's names stay functions: importing the module of the command ``generate`` would
    put that module in the place of the function `generate`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
