"""Run kernels: one traced call (`run`), or every call of a block of code (`emulate`)."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .build import Program, build, companion
from .errors import KernelError, ToolError
from .source import Parameter
from .tracing import Call, trace

#: Far longer than any kernel takes that ends at all.
SECONDS = 120
_MAX_THREADS = 1024
#: compile_s (0.0 from the cache) and run_s.
Timings = dict[str, float]


def run(
    call: Call, arrays: Sequence[mx.array], mode: str = "fast", order: int = 0
) -> tuple[list[mx.array], Timings]:
    """Run one traced kernel on ``arrays``, its inputs in order.

    Args:
        call: from `trace`.
        mode: ``"fast"``, ``"check"`` or ``"asan"``.
        order: of the threads, where a GPU promises none: 0 forwards, 1 backwards, larger numbers
            are seeds of a shuffle.

    Returns:
        The outputs, and the seconds of compiling (0 from the cache) and running.

    Raises:
        KernelError: a bug in the kernel, with a line for each finding.
        ToolError: no working C++ compiler.
    """
    if len(arrays) != len(call.input_shapes):
        raise ValueError(f"expected {len(call.input_shapes)} input arrays, got {len(arrays)}")
    threads = int(np.prod(call.threadgroup))
    if threads > _MAX_THREADS:
        raise KernelError(f"THREADGROUP SIZE: {threads} threads, more than {_MAX_THREADS}")
    program = build(call, mode)
    buffers = _buffers(call, program.parameters, arrays)
    with tempfile.TemporaryDirectory() as folder:
        job, output = Path(folder, "job"), Path(folder, "output")
        with open(job, "wb") as file:
            sizes = [len(buffers), *call.grid, *call.threadgroup]
            file.write(np.array(sizes, np.int64).tobytes())
            for buffer in buffers:
                file.write(buffer.record())
        arguments = [str(job), str(output), str(order), str(int(mode == "check"))]
        started = time.monotonic()
        _execute(call, program, arguments)
        seconds = time.monotonic() - started
        raw = output.read_bytes()
    outputs, at = [], 0
    for shape, dtype in call.outputs:
        count = int(np.prod(shape))
        values = np.frombuffer(raw, _numpy_type(dtype), count, at).reshape(shape)
        at += values.nbytes
        array = mx.array(values)
        outputs.append(array.view(dtype) if dtype == mx.bfloat16 else array)
    return outputs, {"compile_s": program.compile_seconds, "run_s": seconds}


class emulate:
    """``with emulate():`` every ``mx.fast.metal_kernel`` that is created inside runs on the CPU,
    at once, whenever it is called inside.

    ``mode`` and ``order`` are those of `run`. ``log``, a list, receives ``(call, timings)`` for
    each call. A kernel created before is not emulated: create kernels when they are first needed.
    """

    _active: "emulate | None" = None

    def __init__(self, mode: str = "fast", order: int = 0, log: list | None = None) -> None:
        self.mode, self.order, self.log = mode, order, log

    def __enter__(self) -> "emulate":
        self._outer, emulate._active = emulate._active, self
        self._metal_kernel = mx.fast.metal_kernel
        if self._outer is None:
            mx.fast.metal_kernel = _Kernel
        return self

    def __exit__(self, *_: object) -> None:
        mx.fast.metal_kernel = self._metal_kernel
        emulate._active = self._outer

    def _call(self, kernel: Callable[..., Any], inputs: Sequence[Any], options: dict) -> list:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        init_value = options.get("init_value")
        emulate._active = None  # while MLX records the call, the kernel must be the real one
        try:
            [call] = trace(
                lambda *xs: kernel(inputs=list(xs), **options), *arrays, init_value=init_value
            )
        finally:
            emulate._active = self
        outputs, timings = run(call, arrays, self.mode, self.order)
        if self.log is not None:
            self.log.append((call, timings))
        return outputs


_real_metal_kernel: Any = mx.fast.metal_kernel


class _Kernel:
    """Stands for a kernel. It looks for an `emulate` at each call, since code may keep it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._kernel = _real_metal_kernel(*args, **options)

    def __call__(self, *, inputs: Sequence[Any], **options: Any) -> list[mx.array]:
        if emulate._active is None:
            return self._kernel(inputs=inputs, **options)
        for name in ("stream", "verbose"):
            options.pop(name, None)
        return emulate._active._call(self._kernel, inputs, options)


@dataclass
class _Buffer:
    """What one ``[[buffer(n)]]`` points to."""

    name: str
    content: bytes
    element_bytes: int
    is_output: bool = False
    initialised: bool = True
    #: Of the first element: not 0 where a stride is negative.
    offset: int = 0

    def record(self) -> bytes:
        """As runtime.cpp reads it."""
        numbers = [self.is_output, len(self.content), self.element_bytes, self.initialised]
        header = np.array([*numbers, self.offset], np.int64).tobytes()
        return header + self.name.encode()[:63].ljust(64, b"\0") + self.content


def _buffers(call: Call, parameters: list[Parameter], arrays: Sequence[mx.array]) -> list[_Buffer]:
    """The kernel's buffers in the order of its signature: each input, followed by its shape,
    strides and rank where the kernel uses them, then the outputs."""
    names = iter([p.name for p in parameters if p.is_buffer])
    buffers = []
    for array, infos in zip(arrays, call.shape_infos, strict=True):
        values = _numpy(array)
        if call.ensure_row_contiguous:
            values = np.ascontiguousarray(values).reshape(values.shape)
        content, offset = _memory(values)
        buffers.append(_Buffer(next(names), content, values.itemsize, offset=offset))
        strides = [stride // values.itemsize for stride in values.strides]
        facts = (
            np.array(values.shape, np.int32),
            np.array(strides, np.int64),
            np.array(values.ndim, np.int32),
        )
        for wanted, fact in zip(infos, facts, strict=True):
            if wanted and values.ndim:  # a scalar has none
                buffers.append(_Buffer(next(names), fact.tobytes(), fact.itemsize))
    for shape, dtype in call.outputs:
        item = _numpy_type(dtype)
        count = int(np.prod(shape))
        content = b"\xff" * (count * item.itemsize)  # NaN: a GPU leaves it undefined
        if call.init_value is not None:
            content = _numpy(mx.full((count,), call.init_value, dtype=dtype)).tobytes()
        initialised = call.init_value is not None
        buffers.append(_Buffer(next(names), content, item.itemsize, True, initialised))
    return buffers


def _numpy_type(dtype: mx.Dtype) -> np.dtype:
    """NumPy has no bfloat16: its bits travel as uint16."""
    if dtype == mx.bfloat16:
        return np.dtype(np.uint16)
    return np.asarray(mx.array(0, dtype=dtype)).dtype


def _numpy(array: mx.array) -> np.ndarray:
    """A view, with the array's own strides."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _memory(values: np.ndarray) -> tuple[bytes, int]:
    """(the bytes from the first to the last in memory, gaps included; the place of values[0])."""
    if not values.size or values.flags.c_contiguous:
        return values.tobytes(), 0
    reach = [(n - 1) * stride for n, stride in zip(values.shape, values.strides, strict=True)]
    before, after = -sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
    count = (before + after) // values.itemsize + 1
    lowest = tuple(
        slice(n - 1, n) if stride < 0 else slice(0, 1)
        for n, stride in zip(values.shape, values.strides, strict=True)
    )
    span = np.lib.stride_tricks.as_strided(values[lowest], (count,), (values.itemsize,))
    return span.tobytes(), before


def _execute(call: Call, program: Program, arguments: list[str]) -> None:
    """Run the program; ``MSL_RUNNER`` is put in front of it (an emulator of another CPU)."""
    runner = shlex.split(os.environ.get("MSL_RUNNER", ""))
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    try:
        done = subprocess.run(
            [*runner, str(program.path), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise KernelError(f"{call.name}: still running after {SECONDS} s") from None
    if done.returncode == 0:
        return
    if "HARNESS: " in done.stdout:
        raise ToolError(done.stdout.strip())
    findings = [_with_lines(line, call, program.path) for line in done.stdout.splitlines()]
    if not findings:
        findings = _sanitizer_findings(done.stderr, call)
    if done.returncode < 0:
        findings.append(f"CRASH: {signal.Signals(-done.returncode).name}")
    raise KernelError("\n".join(findings) or f"exit status {done.returncode}")


def _sanitizer_findings(output: str, call: Call) -> list[str]:
    """The sanitizer's headline, and the first line of the kernel in its stack trace."""
    headline = re.search(r"(?:ERROR: AddressSanitizer|runtime error): .*", output)
    if headline is None:
        return output.splitlines()[:20]
    line = re.search(re.escape(call.name) + r"\.metal:(\d+)", output)
    access = re.search(r"^(?:READ|WRITE) of size \d+", output, re.M)
    parts = [headline[0], access[0] if access else "", _line(call, int(line[1])) if line else ""]
    return [", ".join(part for part in parts if part)]


def _line(call: Call, number: int) -> str:
    lines = call.source.splitlines()
    text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return f"line {number}: {text}"


def _with_lines(finding: str, call: Call, program: Path) -> str:
    """Replace addresses in the program, and bare line numbers, by lines of the source."""

    def source_line(match: re.Match[str]) -> str:
        pc, base = int(match[1], 16), int(match[2], 16)
        command = ["addr2line", "-i", "-e", str(program), hex(pc)]
        if sys.platform == "darwin":
            command = ["atos", "-i", "-o", str(program), "-l", hex(base), hex(base + pc)]
        try:
            places = companion(command).stdout
        except FileNotFoundError:
            return f"an unknown line ({command[0]} is not installed)"
        # The innermost frame may be a function of the shim.
        line = re.search(r"(?:\.metal|kernel\.cpp):(\d+)", places)
        return _line(call, int(line[1])) if line else f"an unknown line ({places.strip()})"

    finding = re.sub(r"pc=0x([0-9a-f]+) base=0x([0-9a-f]+)", source_line, finding)
    return re.sub(r"line=(\d+)", lambda match: _line(call, int(match[1])), finding)
