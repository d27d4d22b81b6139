"""What a run will take: memory on this machine and on a Mac, time, and room on the disk.

Predicted from one or two measured forward and backward passes of a few images of real data: what a
pass needs beside the model grows linearly with the images. The rest is arithmetic.
"""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..data.batches import Batch, Batches, TextGroup
from ..models.recompute import recomputed
from .build import Job
from .objective import Totals, loss_and_gradients
from .optim import is_hidden_matrix, make_optimizer
from .rules import named_parameters, parameter_scales, set_trainable
from .stages import Stage, compute_dtype
from .text_memory import MOST_BYTES, text_memory

#: Seconds that a measured pass may take; a larger batch is measured in part.
PATIENCE = 4.0
#: Batches among which the one with the longest texts is looked for.
LOOKED_AT = 16
#: Parameters with which the optimiser's time is measured.
_SAMPLE = 1 << 24
#: Bytes that an update needs for each of the gradients; measured with 15 and 58 M parameters.
_UPDATE = 1.5
#: Memory of Macs to predict for, in GiB.
MACS = (16, 32, 64)


def metal_limit(gib: float) -> float:
    """Bytes that Metal lets a process use by default on a Mac with `gib` GiB of memory.

    Its ``recommendedMaxWorkingSetSize``: two thirds below 36 GiB and three quarters from there on,
    as llama.cpp's users have reported (10.67 GiB of 16 in abetlen/llama-cpp-python#687, 21.33 of
    32 in ggml-org/llama.cpp#2011, 48 of 64 in ggml-org/llama.cpp#1870). Newer systems give more
    (macOS 26: 11.84 of 16, AlexsJones/llmfit#754), and ``sysctl iogpu.wired_limit_mb`` raises it.
    """
    return gib * 2**30 * (2 / 3 if gib < 36 else 3 / 4)


def usable_memory() -> int:
    """Bytes that training may use here: what Metal or the GPU has, else what the machine has."""
    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if isinstance(size := info.get(key), int):
                return size
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may allow less ("max": all)
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size


@dataclass(frozen=True)
class Cost:
    """What a stage's forward and backward pass takes: ``fixed + each * images``, and the rest.

    passes: bytes beside the model and the optimiser, gradients included; of a batch with long
    texts. seconds: of a pass, of a mean batch. update: seconds of the optimiser. images: how many
    were measured at most.
    """

    stage: Stage
    images: int
    passes: tuple[float, float]
    seconds: tuple[float, float]
    update: float
    batch: Batch

    def step_seconds(self, micro: int | None) -> float:
        """Seconds of a step on one machine, `micro` images at a time, without waiting for data."""
        parts = -(-self.stage.batch_size // (micro or self.stage.batch_size))
        fixed, each = self.seconds
        return parts * fixed + self.stage.batch_size * each + self.update


@dataclass(frozen=True)
class Memory:
    """Bytes that are in use at the highest point of a step."""

    weights: float
    #: float32 copies of what is trained, where it is computed with in less.
    masters: float
    moments: float
    #: The running mean of the weights (``train.ema``).
    mean: float
    #: Gradients, and what the backward pass needs of the forward pass.
    passes: float
    #: The lower layers' states of texts, where nothing trains these (`text_memory`).
    texts: float

    @property
    def total(self) -> float:
        kept = self.weights + self.masters + self.moments + self.mean + self.texts
        return kept + self.passes


def measure(job: Job, stage: Stage, images: int | None = None) -> Cost:
    """Run what a step of `stage` runs, on some `images` of a batch with long texts: by default on
    as many as are done in `PATIENCE`."""
    train = job.recipe.train
    scales = parameter_scales(job.model, stage)
    set_trainable(job.model, scales)
    dtype = compute_dtype(train)
    params = {
        name: value.astype(mx.float32)
        for name, value in named_parameters(job.model, trainable=True).items()
    }
    mx.eval(params)
    parts = -(-stage.batch_size // (train.micro_batch or stage.batch_size))
    batches = job.batches(stage)
    step, share = _longest(batches, stage)
    batch = batches.part(step, 0, parts)

    def run(count: int) -> tuple[float, float]:
        cut = first_images(batch, count)
        totals = Totals.of([cut])
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        seconds: list[float] = []
        # The first pass also pays for what MLX sets up once.
        while len(seconds) < 2 or (len(seconds) < 4 and sum(seconds) < PATIENCE / 4):
            start = time.perf_counter()
            with recomputed(job.model) if train.grad_checkpoint else contextlib.nullcontext():
                mx.eval(loss_and_gradients(job.model, params, cut, stage.losses, totals, dtype))
            seconds.append(time.perf_counter() - start)
            if seconds[0] > PATIENCE / 2:
                break
        return mx.get_peak_memory() - before, min(seconds)

    there = len(batch.pixels)
    if images is None:
        images = max(2, int(PATIENCE / run(1)[1]))
    large = min(images, there)
    small = large // 2
    # Few images need little beside the gradients, so a line through their cost is too flat.
    low, high = run(small) if small else (0.0, 0.0), run(large)
    each = [max(b - a, 0.0) / (large - small) for a, b in zip(low, high, strict=True)]
    fixed = [max(b - e * large, 0.0) for b, e in zip(high, each, strict=True)]
    update = _update_seconds(job, params)
    seconds = fixed[1], each[1] * share
    return Cost(stage, large, (fixed[0], each[0]), seconds, update, batch)


def _longest(batches: Batches, stage: Stage) -> tuple[int, float]:
    """The step with the longest texts of the first ones, and the mean length by that length.

    Texts of about one length are put together, so that one image of each batch tells.
    """
    steps = range(min(stage.steps, LOOKED_AT))
    parts = (batches.part(step, 0, stage.batch_size) for step in steps)
    lengths = [sum(group.ids.size for group in part.groups) for part in parts]
    longest = int(np.argmax(lengths))
    return longest, sum(lengths) / len(lengths) / lengths[longest]


def first_images(batch: Batch, images: int) -> Batch:
    """The first `images` of a batch, padded as the whole."""

    def cut(group: TextGroup) -> TextGroup:
        rows = images * group.ids.shape[1]
        own = group.rows < rows
        # As many rows as are asked for on average, of the images' own if there are as many.
        count = max(1, len(group.rows) * images // len(batch.pixels))
        kept = np.argsort(~own, kind="stable")[:count]
        return replace(
            group,
            ids=group.ids[:images],
            labels=group.labels[:images],
            loss_mask=group.loss_mask[:images],
            segments=None if group.segments is None else group.segments[:images],
            rows=np.where(own[kept], group.rows[kept], 0),
            cols=group.cols[kept],
            target=group.target[kept],
            weight=group.weight[kept] * own[kept],
            absent=None if group.absent is None else group.absent[kept] * own[kept],
        )

    features = batch.sam_features
    return replace(
        batch,
        pixels=batch.pixels[:images],
        groups=tuple(cut(group) for group in batch.groups),
        sam_features=None if features is None else features[:images],
    )


def _update_seconds(job: Job, params: dict[str, mx.array]) -> float:
    """Seconds of one update by the optimiser, from that of a sample of the parameters."""
    sample: dict[str, mx.array] = {}
    for name, value in params.items():
        sample[name] = value
        if sum(v.size for v in sample.values()) > _SAMPLE:
            break
    optimizer = make_optimizer(job.recipe.train)
    grads = {name: mx.ones_like(value) for name, value in sample.items()}
    mx.eval(grads)
    start = 0.0
    for _ in range(2):  # the first makes the moments
        start = time.perf_counter()
        new = optimizer.update(sample, grads, 1e-3, dict.fromkeys(sample, 1.0))
        mx.eval(new, optimizer.state)
    share = sum(v.size for v in sample.values()) / sum(v.size for v in params.values())
    return (time.perf_counter() - start) / share


def predict(job: Job, cost: Cost, dtype: mx.Dtype, micro: int | None) -> Memory:
    """The memory of a step of a stage that computes in `dtype`, `micro` images at a time."""
    train = job.recipe.train
    sizes = {name: v.size for name, v in named_parameters(job.model).items()}
    trained = parameter_scales(job.model, cost.stage)
    full = 4 * sum(sizes[name] for name in trained)  # bytes of all that is trained, in float32
    parts = -(-cost.stage.batch_size // (micro or cost.stage.batch_size))
    images = -(-cost.stage.batch_size // parts)
    passes = cost.passes[0] + cost.passes[1] * images
    here = compute_dtype(train)
    if dtype != here:  # gradients are float32 whatever the pass is computed in
        passes = full + max(passes - full, 0.0) * dtype.size / here.size
    if parts > 1:
        passes += full  # the sum of the gradients so far
    own = named_parameters(job.model)
    quantised = sum(v.nbytes for v in own.values() if not mx.issubdtype(v.dtype, mx.floating))
    floats = sum(v.size for v in own.values() if mx.issubdtype(v.dtype, mx.floating))
    return Memory(
        weights=quantised + floats * dtype.size,
        masters=full if dtype != mx.float32 else 0,
        moments=_moments(job, cost.stage),
        mean=4 * sum(sizes[name] for name in _trained_so_far(job, cost.stage)) * bool(train.ema),
        # An update overwrites most of what it needs in place, not all at once.
        passes=max(passes, _UPDATE * full),
        texts=_text_states(job, cost, dtype),
    )


def _text_states(job: Job, cost: Cost, dtype: mx.Dtype) -> float:
    """Bytes of the states of texts that are kept, as if every text of the stage were another."""
    if text_memory(job.model, cost.stage) is None:
        return 0
    positions = sum(group.ids.size for group in cost.batch.groups) / len(cost.batch.pixels)
    each = positions * job.model.args.hidden_size * dtype.size
    return min(each * cost.stage.batch_size * cost.stage.steps, MOST_BYTES)


def _moments(job: Job, stage: Stage) -> int:
    """Bytes of what the optimiser remembers."""
    own, muon = named_parameters(job.model), job.recipe.train.optimizer == "muon"
    return sum(
        4 * own[name].size * (1 if muon and is_hidden_matrix(name, own[name]) else 2)
        for name in parameter_scales(job.model, stage)
    )


def _trained_so_far(job: Job, stage: Stage) -> set[str]:
    stages = job.recipe.stages
    before = stages[: stages.index(stage) + 1]
    return {name for s in before for name in parameter_scales(job.model, s)}


def fitting_micro_batch(job: Job, cost: Cost, dtype: mx.Dtype, limit: float) -> int | None:
    """The most images at a time with which a stage fits into `limit` bytes; None: not even one."""
    batch = cost.stage.batch_size
    for images in dict.fromkeys(-(-batch // parts) for parts in range(1, batch + 1)):
        if predict(job, cost, dtype, images).total <= limit:
            return images
    return None


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint, of all that a run keeps at a time, and free where it goes."""

    checkpoint: int
    most: int
    free: int


def disk(job: Job) -> Disk:
    """The room that the checkpoints of a run take, those of its largest stage."""
    train, dtype = job.recipe.train, compute_dtype(job.recipe.train)
    own = named_parameters(job.model)
    size = 0
    for stage in job.recipe.stages:
        trained = parameter_scales(job.model, stage)
        weights = sum(v.nbytes for name, v in own.items() if name not in trained)
        weights += 4 * sum(own[name].size for name in trained)
        if dtype == mx.float32:
            weights = sum(v.nbytes for v in own.values())
        mean = 4 * sum(own[name].size for name in _trained_so_far(job, stage))
        size = max(size, weights + _moments(job, stage) + mean * bool(train.ema))
    # Those kept, the best one, and the one that is being written.
    count = train.keep + (job.recipe.data.val is not None) + 1
    folder = train.out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return Disk(size, count * size, shutil.disk_usage(folder).free)
