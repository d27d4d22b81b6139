"""The update of the weights as one compiled function (``train.compile``).

What is worth compiling in a step is its tail: clipping, moments and weights are a chain of 17
elementwise operations on every parameter, which read and write 39 arrays of its size one
after another and 7 when fused. Its shapes are those of the parameters, so it is traced once or
twice in a stage. The forward and backward pass are not compiled: their shapes change from batch to
batch and every new one would be traced again, what is elementwise in them (SwiGLU, GELU) is
compiled by mlx and mlx-lm already, and matrix products and attention are no faster for it.

On a CPU it does not pay: MLX compiles C++ at run time and the loops are no faster.
"""

from collections.abc import Callable

import mlx.core as mx

from .optim import Optimizer, clip
from .stages import TrainSpec

#: (params, grads, their global norm, learning rate) -> new params; all by name and lazy.
Update = Callable[[dict[str, mx.array], dict[str, mx.array], mx.array, float], dict[str, mx.array]]


def wants_compile(spec: TrainSpec) -> bool:
    """True if the update is to be compiled: ``auto`` is on a GPU only."""
    if spec.compile == "auto":
        return mx.default_device() == mx.Device(mx.gpu)
    return spec.compile == "on"


def make_update(
    optimizer: Optimizer, scales: dict[str, float], limit: float, compile: bool
) -> Update:
    """Clipping to the norm `limit` and a step of `optimizer`, for one stage: its `scales` are
    constants of the compiled function. Compiled or not, the result is the same up to rounding.
    """

    def step(params, grads, state, norm, lr):
        optimizer.state = state
        new = optimizer.update(params, clip(grads, norm, limit), lr, scales)
        return new, optimizer.state

    if not compile:
        return lambda params, grads, norm, lr: step(params, grads, optimizer.state, norm, lr)[0]
    traced = mx.compile(step)

    def update(
        params: dict[str, mx.array], grads: dict[str, mx.array], norm: mx.array, lr: float
    ) -> dict[str, mx.array]:
        # An array: a number would be a constant, and every learning rate traced anew.
        new, optimizer.state = traced(params, grads, optimizer.state, norm, mx.array(lr))
        return new

    return update
