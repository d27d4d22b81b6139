"""The fast BLAS really replaces MLX's own on Linux."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

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
