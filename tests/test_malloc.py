"""Freed memory stays with the process; counted in page faults, no time is judged."""

import subprocess
import sys

import pytest

from agevlm_mlx import malloc

PROGRAM = """
import resource, sys
from agevlm_mlx import malloc
if "keep" in sys.argv:
    assert malloc.keep_freed()
import mlx.core as mx
mx.set_default_device(mx.cpu)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(4):
        mx.eval(mx.ones((48, 1024, 1024)) + 1.0)  # 192 MB
work()
before = faults()
work()
print(faults() - before)
"""


def _faults(*args: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_arrays_are_used_again_without_new_pages():
    assert _faults("keep") * 20 < _faults()


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert malloc.keep_freed() is False
