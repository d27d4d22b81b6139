"""The kernels on the CPU: what the tests of all of them need."""

import contextlib
from collections.abc import Callable, Iterator

import mlx.core as mx

from agevlm_mlx.kernels.metal import metal_kernel
from tests.kernels import msl

#: The passes that look for a bug, the quick ones first: (name, mode, order of the threads).
PASSES = [
    ("values", "fast", 0),
    ("values, threads reversed", "fast", 1),
    ("check", "check", 0),
    ("asan", "asan", 0),
]


@contextlib.contextmanager
def emulated(mode: str = "fast", order: int = 0) -> Iterator[None]:
    """Kernels called inside run on the CPU."""
    metal_kernel.cache_clear()  # real kernels outside, emulated ones inside
    try:
        with msl.emulate(mode, order):
            yield
    finally:
        metal_kernel.cache_clear()


def check_types(run: Callable[..., object], *arrays: mx.array) -> None:
    """The pass over address spaces for each kernel that ``run(*arrays)`` calls."""
    for call in msl.trace(run, *arrays):
        msl.check_types(call)


def caught_by(
    run: Callable[..., object], arrays: list[mx.array], verify: Callable[..., None]
) -> tuple[str, str] | None:
    """The first pass that finds a bug in ``verify(run(*arrays))``, and what it says."""
    try:
        check_types(run, *arrays)
    except msl.KernelError as error:
        return "types", str(error).splitlines()[0]
    for name, mode, order in PASSES:
        try:
            with emulated(mode, order):
                verify(run(*arrays))
        except msl.KernelError as error:
            return name, str(error).splitlines()[0]
        except AssertionError:
            return name, "wrong values"
    return None


def mutate(source: str, old: str, new: str) -> str:
    """`source` with its only `old` replaced."""
    assert source.count(old) == 1, f"{source.count(old)} times in the source: {old}"
    return source.replace(old, new)
