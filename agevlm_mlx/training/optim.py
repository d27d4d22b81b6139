"""AdamW with a learning-rate scale per parameter, the schedule of a stage, gradient clipping.

Parameters, gradients and moments are flat dictionaries by parameter name: what a stage trains is
a set of names, and a checkpoint stores the same names.
"""

import math
from collections.abc import Iterable

import mlx.core as mx

from .stages import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of the stage's step `step` (0-based): linear warm-up, then its schedule."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return stage.lr
    # The last step is the last one above lr_end, so that a next stage can go on from lr_end.
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    return stage.lr_end + (stage.lr - stage.lr_end) * 0.5 * (1.0 + math.cos(math.pi * done))


def global_norm(grads: dict[str, mx.array]) -> mx.array:
    """The L2 norm of all gradients together, f32 scalar; inf or nan when any of them is."""
    squares = [g.astype(mx.float32).square().sum() for g in grads.values()]
    return mx.sqrt(mx.stack(squares).sum())


def clip(grads: dict[str, mx.array], norm: mx.array, limit: float) -> dict[str, mx.array]:
    """`grads` scaled so that their global norm, `norm`, is at most `limit`."""
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return {name: (g * scale).astype(g.dtype) for name, g in grads.items()}


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), moments in fp32.

    Decay falls on matrices only, not on norms, gates and biases. Every parameter counts its own
    updates for the bias correction, so one that a later stage thaws starts as it should while
    the others keep their moments.
    """

    def __init__(
        self, betas: tuple[float, float] = (0.9, 0.98), weight_decay: float = 0.0, eps: float = 1e-8
    ):
        self.betas, self.weight_decay, self.eps = betas, weight_decay, eps
        #: "<name>/m", "<name>/v" f32 like the parameter and "<name>/t" i32 [] its updates.
        self.state: dict[str, mx.array] = {}

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget the moments of all other parameters: those a new stage freezes."""
        names = set(names)
        self.state = {k: v for k, v in self.state.items() if k.rpartition("/")[0] in names}

    def update(
        self,
        params: dict[str, mx.array],
        grads: dict[str, mx.array],
        lr: float,
        scales: dict[str, float],
    ) -> dict[str, mx.array]:
        """The new values of `params`, each moved with ``lr * scales[name]``; moves the moments."""
        return {
            name: self._update_one(name, param, grads[name], lr * scales[name])
            for name, param in params.items()
        }

    def _update_one(self, name: str, param: mx.array, grad: mx.array, lr: float) -> mx.array:
        b1, b2 = self.betas
        grad = grad.astype(mx.float32)
        if f"{name}/t" in self.state:
            m, v, t = (self.state[f"{name}/{key}"] for key in "mvt")
        else:
            m, v, t = mx.zeros_like(grad), mx.zeros_like(grad), mx.array(0, mx.int32)
        m, v, t = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad.square(), t + 1
        self.state |= {f"{name}/m": m, f"{name}/v": v, f"{name}/t": t}
        step = (m / (1 - b1**t)) / (mx.sqrt(v / (1 - b2**t)) + self.eps)
        decay = self.weight_decay if param.ndim > 1 else 0.0
        value = param.astype(mx.float32)
        return (value - lr * (step + decay * value)).astype(param.dtype)
