"""AdamW and Muon with a learning-rate scale per parameter, a stage's schedule, gradient clipping.

Parameters, gradients and moments are flat dictionaries by parameter name: what a stage trains is
a set of names, and a checkpoint stores the same names.
"""

import math
import re
from collections.abc import Iterable
from typing import Protocol

import mlx.core as mx

from .stages import Stage, TrainSpec

#: Matrices that Muon leaves to AdamW: tables and what leads from or to them.
_ENDS = re.compile(r"embed|lm_head|\b(wte|wpe|output)\b")


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of the stage's step `step` (0-based): linear warm-up, then its schedule.

    ``wsd`` (warm-up, stable, decay): the last `decay` of the steps go from `lr` to `lr_end` as
    1 - sqrt of their share, the best of the forms compared in arXiv 2405.18392.
    """
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return stage.lr
    begin = stage.warmup
    if stage.schedule == "wsd":
        begin = max(begin, stage.steps - max(round(stage.decay * stage.steps), 1))
        if step < begin:
            return stage.lr
    # The last step is the last one above lr_end, so that a next stage can go on from lr_end.
    done = (step - begin) / max(stage.steps - begin, 1)
    wsd = stage.schedule == "wsd"
    left = 1.0 - math.sqrt(done) if wsd else 0.5 * (1.0 + math.cos(math.pi * done))
    return stage.lr_end + (stage.lr - stage.lr_end) * left


def global_norm(grads: dict[str, mx.array]) -> mx.array:
    """The L2 norm of all gradients together, f32 scalar; inf or nan when any of them is."""
    squares = [g.astype(mx.float32).square().sum() for g in grads.values()]
    return mx.sqrt(mx.stack(squares).sum())


def clip(grads: dict[str, mx.array], norm: mx.array, limit: float) -> dict[str, mx.array]:
    """`grads` scaled so that their global norm, `norm`, is at most `limit`."""
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return {name: (g * scale).astype(g.dtype) for name, g in grads.items()}


class Optimizer(Protocol):
    """What a training step needs of an optimiser."""

    #: Everything it remembers, "<parameter>/<what>"; saved in and restored from a checkpoint.
    state: dict[str, mx.array]

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget what is known of all other parameters: those a new stage freezes."""
        ...

    def update(
        self,
        params: dict[str, mx.array],
        grads: dict[str, mx.array],
        lr: float | mx.array,
        scales: dict[str, float],
    ) -> dict[str, mx.array]:
        """The new values of `params`, each moved with ``lr * scales[name]``; lazy, like `state`.

        The old values, moments and gradients are overwritten in place when they are evaluated
        if nobody refers to them any more: let go of them before.
        """
        ...


def make_optimizer(spec: TrainSpec) -> Optimizer:
    """The optimiser of a recipe, which has seen nothing yet."""
    kind = {"adamw": AdamW, "muon": Muon}[spec.optimizer]
    return kind(spec.betas, spec.weight_decay)


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
        names = set(names)
        self.state = {k: v for k, v in self.state.items() if k.rpartition("/")[0] in names}

    def update(
        self,
        params: dict[str, mx.array],
        grads: dict[str, mx.array],
        lr: float | mx.array,
        scales: dict[str, float],
    ) -> dict[str, mx.array]:
        return {
            name: self._update_one(name, param, grads[name], lr * scales[name])
            for name, param in params.items()
        }

    def _update_one(
        self, name: str, param: mx.array, grad: mx.array, lr: float | mx.array
    ) -> mx.array:
        b1, b2 = self.betas
        grad = grad.astype(mx.float32)
        if f"{name}/t" in self.state:
            m, v, t = (self.state[f"{name}/{key}"] for key in "mvt")
        else:
            m, v, t = mx.zeros_like(grad), mx.zeros_like(grad), mx.array(0, mx.int32)
        m, v, t = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad.square(), t + 1
        self.state |= {f"{name}/m": m, f"{name}/v": v, f"{name}/t": t}
        step = (m / (1 - b1**t)) / (mx.sqrt(v / (1 - b2**t)) + self.eps)
        return self._moved(param, step, lr)

    def _moved(self, param: mx.array, step: mx.array, lr: float | mx.array) -> mx.array:
        """`param` after one step, decayed if it is a matrix."""
        decay = self.weight_decay if param.ndim > 1 else 0.0
        value = param.astype(mx.float32)
        return (value - lr * (step + decay * value)).astype(param.dtype)


class Muon(AdamW):
    """Momentum made orthogonal by Newton and Schulz (https://kellerjordan.github.io/posts/muon)
    for the matrices inside layers and for convolutions, AdamW for everything else.

    The step of a matrix [rows cols] is that of ``mlx.optimizers.Muon``, its learning rate times
    sqrt(max(1, rows / cols)): whatever the gradient's size, an element moves by about
    lr / sqrt(cols), where AdamW's moves by 0.2 to 0.4 lr (arXiv 2502.16982). So a matrix wants
    about 0.2 sqrt(cols) times the learning rate that AdamW would get, 3 to 6 times in small
    models: raise the stage's `lr` so much and scale the rest down in `trainable`. Weight decay is
    decoupled, as in AdamW; MLX adds it to the gradient, whose size then does not count.
    """

    #: Momentum, and steps of the iteration, which brings singular values to 0.7 .. 1.2.
    momentum, iterations = 0.95, 5

    def _update_one(
        self, name: str, param: mx.array, grad: mx.array, lr: float | mx.array
    ) -> mx.array:
        if not is_hidden_matrix(name, param):
            return super()._update_one(name, param, grad, lr)
        grad, keep = grad.astype(mx.float32), self.momentum
        m = self.state.get(f"{name}/m", mx.zeros_like(grad))
        m = keep * m + (1 - keep) * grad
        self.state[f"{name}/m"] = m
        ahead = (1 - keep) * grad + keep * m  # Nesterov
        step = orthogonalized(ahead.reshape(param.shape[0], -1), self.iterations)
        stretch = math.sqrt(max(1.0, step.shape[0] / step.shape[1]))
        return self._moved(param, step.reshape(param.shape), lr * stretch)


def is_hidden_matrix(name: str, param: mx.array) -> bool:
    """True for what Muon orthogonalises: weights of linear layers (2-D) and of 2-D convolutions.

    Not embeddings, position tables, the output layer, adapters or the stacked weights of experts.
    """
    return name.endswith(".weight") and param.ndim in (2, 4) and not _ENDS.search(name)


def orthogonalized(x: mx.array, iterations: int) -> mx.array:
    """The nearest orthogonal matrix of `x` [rows cols], roughly: U V^T of its SVD U S V^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (mx.linalg.norm(x, keepdims=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = mx.addmm(a * x, mx.addmm(b * gram, gram, gram, alpha=c), x)
    return x.T if tall else x
