"""Gives MLX's CPU back end on Linux a fast BLAS.

The Linux wheel of MLX bundles the reference BLAS: 5 GFLOPS on one core where OpenBLAS makes
97 (512 x 512 fp32 products). Opened with global scope before MLX is, a system OpenBLAS takes
its place, because the dynamic linker looks for ``cblas_sgemm`` in the global scope first.
Macs use Metal and Accelerate and need none of this. An OpenBLAS older than the processor falls back
to kernels without AVX; it is told better ones.
"""

import ctypes
import os
import sys
from pathlib import Path

_CANDIDATES = ("libopenblas.so.0", "libopenblasp.so.0")
#: The kernels that OpenBLAS takes on an x86 processor newer than itself: those of 2004. Debian 12's
#: 0.3.21 makes 23 GFLOPS with them on one core of an Emerald Rapids Xeon, 98 to 114 with SkylakeX
#: (products of 1024 x 256 with 256 x 512, fp32).
_FALLBACK = b"Prescott"
#: Newest first: kernels, and the instructions of ``/proc/cpuinfo`` that they need.
_KERNELS = (
    ("SkylakeX", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma"}),
    ("Haswell", {"avx2", "fma"}),
)
_CHOICE = "OPENBLAS_CORETYPE"


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
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if _CHOICE not in os.environ and _kernels(library) == _FALLBACK:
            _reopen(library, name)
        return name
    return None


def _kernels(library: ctypes.CDLL) -> bytes | None:
    """The name of the kernels in use; None where the library does not tell."""
    function = getattr(library, "openblas_get_corename", None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return function()


def _reopen(library: ctypes.CDLL, name: str) -> None:
    """Open it anew with the best kernels for this processor: it chooses them as it is opened."""
    try:
        best = _best_kernels(Path("/proc/cpuinfo").read_text())
    except OSError:  # hidden from this process: slow, but it works
        return
    if best is None:
        return
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
    os.environ[_CHOICE] = best
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    finally:
        del os.environ[_CHOICE]  # or NumPy's own OpenBLAS, which may know better, would obey it


def _best_kernels(cpuinfo: str) -> str | None:
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    have = set(flags.partition(":")[2].split())
    return next((name for name, needs in _KERNELS if needs <= have), None)


def set_threads(count: int) -> None:
    """Let the OpenBLAS that `preload` opened, if it did, use `count` threads in this process."""
    function = getattr(ctypes.CDLL(None), "openblas_set_num_threads", None)
    if function is not None:
        function(count)
