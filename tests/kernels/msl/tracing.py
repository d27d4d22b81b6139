"""Ask MLX for the kernels that a function calls, with the Metal source it generates for each.

Calling a Metal kernel without Metal fails, but while a function is being exported MLX records the
kernel instead of running it. So the real generated signature is tested, not an imitation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Call:
    """One call of an ``mx.fast.metal_kernel``."""

    name: str
    #: The complete Metal source, with the generated signature.
    source: str
    #: Threads in x, y, z: all of them, and of one threadgroup.
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    #: For each input, whether the kernel takes its ``_shape``, ``_strides`` and ``_ndim``.
    shape_infos: list[tuple[bool, bool, bool]]
    ensure_row_contiguous: bool
    #: What the outputs start from; None leaves them undefined.
    init_value: float | None
    input_shapes: list[tuple[int, ...]]
    outputs: list[tuple[tuple[int, ...], mx.Dtype]]


def trace(fn: Callable[..., Any], *arrays: mx.array, init_value: float | None = None) -> list[Call]:
    """The kernel calls that ``fn(*arrays)`` makes, in order, without running any.

    ``init_value`` must repeat that of the calls: MLX does not record it.
    """
    calls: list[Call] = []

    def record(node: dict[str, Any]) -> None:
        if node["type"] != "primitive" or node["name"] != "CustomKernel":
            return
        name, source, *sizes = node["arguments"][:8]
        shape_infos, contiguous = node["arguments"][8:10]
        calls.append(
            Call(
                name=name,
                source=source,
                grid=tuple(sizes[:3]),
                threadgroup=tuple(sizes[3:]),
                shape_infos=shape_infos,
                ensure_row_contiguous=contiguous,
                init_value=init_value,
                input_shapes=[shape for _, shape, _ in node["inputs"]],
                outputs=[(shape, dtype) for _, shape, dtype in node["outputs"]],
            )
        )

    mx.export_function(record, fn, *arrays)
    return calls
