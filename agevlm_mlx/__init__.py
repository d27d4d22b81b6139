"""Small vision-language models that look where they should, and show it (MLX)."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from .openblas import preload

if TYPE_CHECKING:
    from .config import ModelConfig
    from .generate import generate, stream_generate
    from .models.agevlm import AgeVLM
    from .weights import load

preload()  # before anything imports mlx

try:
    __version__ = metadata.version("agevlm-mlx")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["AgeVLM", "ModelConfig", "__version__", "generate", "load", "stream_generate"]

_HOME = {
    "AgeVLM": ".models.agevlm",
    "ModelConfig": ".config",
    "load": ".weights",
}


def __getattr__(name: str) -> Any:
    # `generate` is also a submodule: importing the package stays quick, and the function wins.
    if name in ("generate", "stream_generate"):
        module = import_module(".generate", __name__)
        globals().update(generate=module.generate, stream_generate=module.stream_generate)
        return globals()[name]
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
