"""Gives MLX's CPU back end on Linux a fast BLAS.

The Linux wheel of MLX bundles the reference BLAS: 5 GFLOPS on one core where OpenBLAS makes
97 (512 x 512 fp32 products). Opened with global scope before MLX is, a system OpenBLAS takes
its place, because the dynamic linker looks for ``cblas_sgemm`` in the global scope first.
Macs use Metal and Accelerate and need none of this.
"""

import ctypes
import os
import sys

_CANDIDATES = ("libopenblas.so.0", "libopenblasp.so.0")


def preload() -> str | None:
    """Open OpenBLAS for MLX and return its name; None where there is none or no need.

    Has an effect only before the first ``import mlx.core``. ``OPENBLAS_LIB`` names another
    library; set it to nothing to keep MLX's own.
    """
    if not sys.platform.startswith("linux"):
        return None
    chosen = os.environ.get("OPENBLAS_LIB")
    if chosen == "":
        return None
    for name in (chosen,) if chosen else _CANDIDATES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def set_threads(count: int) -> None:
    """Let the OpenBLAS that `preload` opened, if it did, use `count` threads in this process."""
    function = getattr(ctypes.CDLL(None), "openblas_set_num_threads", None)
    if function is not None:
        function(count)
