"""Metal kernels from their source, made at the first use and kept."""

import functools
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx


@functools.cache
def metal_kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str
) -> Callable[..., list[Any]]:
    """``mx.fast.metal_kernel``, made once: on the way to a token its 30 us a call would count."""
    kernel = mx.fast.metal_kernel(
        name=f"agevlm_{name}", input_names=inputs, output_names=outputs, source=source
    )
    return cast(Callable[..., list[Any]], kernel)
