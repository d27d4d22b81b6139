"""What a training step of known size costs: its batch, the whole step, seconds and memory."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.batches import Batch
from ..data.text_rows import TextGroup
from ..models.agevlm import AgeVLM
from ..training.objective import loss_and_gradients, place
from ..training.optim import AdamW, clip, global_norm
from ..training.rules import named_parameters
from ..training.stages import Losses

Step = Callable[[], Any]


def random_batch(model: AgeVLM, images: int, tokens: int) -> Batch:
    """Random pixels, and for each image one random text of `tokens` tokens.

    The last three quarters of a text are supervised; an eighth of its positions is guided to a
    tenth of the image's tokens.
    """
    rng = np.random.default_rng(0)
    side = model.vision_tower.config.image_size
    ids = rng.integers(0, model.args.vocab_size, (images, 1, tokens + 1)).astype(np.int32)
    loss_mask = np.zeros((images, 1, tokens), np.float32)
    loss_mask[..., tokens // 4 :] = 1
    each = max(tokens // 8, 1)
    cols = np.stack([rng.permutation(tokens)[:each] for _ in range(images)])
    group = TextGroup(
        ids[..., :-1],
        ids[..., 1:],
        loss_mask,
        np.repeat(np.arange(images, dtype=np.int32), each),
        cols.astype(np.int32).reshape(-1),
        (rng.random((images * each, model.num_image_tokens)) < 0.1).astype(np.float32),
        np.ones(images * each, np.float32),
    )
    pixels = rng.standard_normal((images, side, side, 3)).astype(np.float32)
    return Batch(pixels, (group,), None, [str(i) for i in range(images)], 0)


class TrainingStep:
    """All that a step computes: loss, gradients, clipping, AdamW. Parameters move (a little).

    Trains what is not frozen when it is called. `seconds` is how long the last call took for loss
    and gradients, and for the rest; `loss` what it found.
    """

    def __init__(self, model: AgeVLM, batch: Batch, losses: Losses, lr: float = 1e-6) -> None:
        self.model, self.batch, self.losses, self.lr = model, batch, losses, lr
        self.optimizer = AdamW(weight_decay=0.02)
        self.loss, self.seconds = float("nan"), (0.0, 0.0)

    def gradients(self) -> dict[str, mx.array]:
        """Loss and gradients alone."""
        params = named_parameters(self.model, trainable=True)
        (loss, _), grads = loss_and_gradients(self.model, params, self.batch, self.losses)
        mx.eval(loss, grads)
        self.loss = loss.item()
        return grads

    def __call__(self) -> None:
        start = time.perf_counter()
        grads = self.gradients()
        middle = time.perf_counter()
        params = named_parameters(self.model, trainable=True)
        scales = dict.fromkeys(params, 1.0)
        grads = clip(grads, global_norm(grads), 1.0)
        params = self.optimizer.update(params, grads, self.lr, scales)
        del grads
        place(self.model, params, mx.float32)
        mx.eval(params, self.optimizer.state)
        self.seconds = middle - start, time.perf_counter() - middle


def seconds(step: Step) -> tuple[float, float]:
    """How long `step` takes: on the clock, and of processors (all threads of this process).

    The second hardly minds what else the machine does; threads that wait count while they spin.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak(step: Step, trials: int = 3) -> int:
    """Bytes of peak memory of a step: the most of `trials`, in which operations overlap
    differently."""
    most = 0
    for _ in range(trials):
        mx.clear_cache()
        mx.reset_peak_memory()
        step()
        most = max(most, mx.get_peak_memory())
    return most


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The range of the middle half of `values`."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
