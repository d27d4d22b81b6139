"""The fast BLAS really replaces MLX's own on Linux."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from agevlm_mlx.openblas import _best_kernels

ROOT = Path(__file__).parents[1]


def has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return sys.platform.startswith("linux")


def libraries_of(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code + "\nprint(open('/proc/self/maps').read())"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(not has_openblas(), reason="Linux with libopenblas.so.0 only")
def test_importing_the_package_loads_it():
    assert "openblas" in libraries_of("import agevlm_mlx")


@pytest.mark.skipif(not has_openblas(), reason="Linux with libopenblas.so.0 only")
def test_an_empty_name_keeps_mlx_as_it_is():
    assert "libopenblas" not in libraries_of("import agevlm_mlx", OPENBLAS_LIB="")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_a_wrong_name_is_not_an_error():
    code = "from agevlm_mlx.openblas import preload; print(preload())"
    assert libraries_of(code, OPENBLAS_LIB="/nowhere/libblas.so").startswith("None\n")


def test_the_newest_kernels_that_the_processor_runs_are_chosen():
    old = "model name\t: x\nflags\t\t: fpu sse2 avx\n"
    assert _best_kernels(old) is None
    assert _best_kernels(old.replace("avx", "avx avx2 fma")) == "Haswell"
    newest = "avx2 fma avx512f avx512bw avx512cd avx512dq avx512vl"
    assert _best_kernels(old.replace("avx", newest)) == "SkylakeX"
    assert _best_kernels("processor : 0\n") is None


#: Opens the library as the environment tells it, then as if it had not known the processor.
REOPENED = """
import ctypes, os, runpy
module = runpy.run_path("agevlm_mlx/openblas.py")
kernels = module["_kernels"]
library = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
print(kernels(library).decode())
del os.environ["OPENBLAS_CORETYPE"]
module["_reopen"](library, "libopenblas.so.0")
print(kernels(ctypes.CDLL("libopenblas.so.0")).decode())
print("OPENBLAS_CORETYPE" in os.environ)
"""


@pytest.mark.skipif(not has_openblas(), reason="Linux with libopenblas.so.0 only")
def test_an_openblas_that_does_not_know_the_processor_is_opened_anew():
    best = _best_kernels(Path("/proc/cpuinfo").read_text())
    if best is None:
        pytest.skip("a processor without AVX2")
    told = libraries_of(REOPENED, OPENBLAS_CORETYPE="Prescott").splitlines()
    assert told[:3] == ["Prescott", best, "False"]


@pytest.mark.skipif(not has_openblas(), reason="Linux with libopenblas.so.0 only")
def test_kernels_that_the_user_chooses_are_kept():
    code = (
        "import ctypes; from agevlm_mlx.openblas import _kernels\n"
        "print(_kernels(ctypes.CDLL('libopenblas.so.0')))"
    )
    assert libraries_of(code, OPENBLAS_CORETYPE="Prescott").startswith("b'Prescott'")
