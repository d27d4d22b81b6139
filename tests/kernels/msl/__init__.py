"""Run the Metal source of ``mx.fast.metal_kernel`` kernels on a CPU, and look for their bugs.

Neither a Mac nor a GPU is needed: MLX is asked for the source it would hand to Metal, and that
source is compiled as C++ against a stand-in for Apple's standard library (``shim/``). Every GPU
thread becomes a fibre; threads of a threadgroup meet at barriers and SIMD operations as on a GPU.

    from tests.kernels import msl

    with msl.emulate():                        # kernels called inside run on the CPU at once
        out = my_function(q, keys)
    [call] = msl.trace(my_function, q, keys)   # or step by step
    msl.check_types(call)
    [out], timings = msl.run(call, [q, keys], mode="check")

Four passes, each with bugs that only it finds:

- `check_types`: address spaces (``device``, ``constant``, ``threadgroup``), the types of pointers.
- ``mode="fast"``: values. ``order`` runs the threads forwards, backwards or shuffled; outputs and
  threadgroup memory start as NaN.
- ``mode="asan"``: AddressSanitizer and UBSan; the only pass that sees a private array overflow.
- ``mode="check"``: out of bounds, races, missing barriers and memory flags, uninitialised reads,
  divergence, each with its source line.

It needs a C++ compiler (g++ or clang++; ``CXX`` chooses) and, for `check_types`, the package
libclang. Programs are kept in the user's cache folder (``MSL_CACHE`` moves it). With
``MSL_CXXFLAGS`` (more flags) and ``MSL_RUNNER`` (put in front of a program) the tests run for
another CPU too: ``CXX=aarch64-linux-gnu-g++ MSL_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"``.

Not covered: the numerics, speed and registers of real hardware, simdgroup matrices, textures,
64-bit atomics, swizzles, and whatever else ``shim/metal_stdlib`` lacks (a compile error says so).
Write ``1.0f``: ``1.0`` is a double here. Emulation cannot run inside ``mx.compile``.
"""

from .address_spaces import check_types
from .build import MODES
from .errors import CompileError, KernelError, ToolError
from .launch import emulate, run
from .tracing import Call, trace

__all__ = [
    "MODES",
    "Call",
    "CompileError",
    "KernelError",
    "ToolError",
    "check_types",
    "emulate",
    "run",
    "trace",
]
