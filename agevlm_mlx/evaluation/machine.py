"""What a number was measured with: versions and the machine, written beside every result."""

import contextlib
import os
import platform
from importlib import metadata
from typing import Any

import mlx.core as mx

_PACKAGES = ("agevlm-mlx", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers; the teacher's packages when present."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, "torch", "segment-anything"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """System, processor, cores and the device MLX computes on."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "device": "Metal" if on_metal() else "GPU" if _on_gpu() else "CPU",
    }


def on_metal() -> bool:
    """Does MLX compute with Metal here?"""
    return _on_gpu() and mx.metal.is_available()


def _on_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
