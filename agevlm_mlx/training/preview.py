"""What ``agevlm train --dry-run`` prints: data, parameters, memory, time, the first texts."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import mlx.core as mx
import numpy as np

from ..data.batches import TextGroup
from ..data.record_set import Records
from .build import Job
from .forecast import (
    MACS,
    Cost,
    disk,
    fitting_micro_batch,
    measure,
    metal_limit,
    predict,
    usable_memory,
)
from .log import clock, memory_text
from .rules import named_parameters, parameter_scales
from .stages import compute_dtype

GREEN, UNDERLINE, RESET = "\x1b[32m", "\x1b[4m", "\x1b[0m"


def lines(job: Job, colour: bool) -> Iterator[str]:
    """All of it, line by line; measures while it is read."""
    yield from data_lines(job)
    yield f"\n{parameter_table(job)}\n"
    yield from cost_lines(job, [measure(job, stage) for stage in job.recipe.stages])
    yield "\nThe first image of each stage; [the loss is on this], ^ attention is guided here:"
    yield from batch_text(job, colour)


def parameter_table(job: Job) -> str:
    """Parameters by part of the model, and the learning-rate scale of each part in each stage."""
    stages = job.recipe.stages
    scales = [parameter_scales(job.model, stage) for stage in stages]
    sizes = {name: value.size for name, value in named_parameters(job.model).items()}
    parts: dict[tuple[str, tuple[float, ...]], int] = {}
    for name, size in sizes.items():
        key = (_part(name), tuple(s.get(name, 0.0) for s in scales))
        parts[key] = parts.get(key, 0) + size
    rows = [["part", "parameters", *(stage.name for stage in stages)]]
    for (part, row), size in parts.items():
        rows.append([part, f"{size:,}", *("frozen" if s == 0 else f"lr x {s:g}" for s in row)])
    trained = [f"{sum(sizes[name] for name in s):,}" for s in scales]
    rows.append(["trained", f"{sum(sizes.values()):,}", *trained])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _part(name: str) -> str:
    if ".cross_attn." in name:
        return "cross-attention"
    head, _, rest = name.partition(".")
    return "token embedding" if head == "language_model" and "embed_tokens" in rest else head


def data_lines(job: Job) -> Iterator[str]:
    """What there is to train on, and what is left out."""
    records = job.records
    Gh, Gw = job.model.grid
    yield f"{len(records):,} records of {len(records.images):,} images: {_kinds(records)}"
    yield f"the model sees an image as {Gh} x {Gw} tokens"
    bad = {p.record or p.where for p in job.problems}
    if records.excluded or bad:
        yield (
            f"left out: {records.excluded:,} records whose image is on an exclusion list, "
            f"{len(bad):,} bad records or images"
        )
    if job.val_records is not None:
        used = min(job.recipe.train.val_images, len(job.val_records.images))
        yield f"validation: {used:,} of {len(job.val_records.images):,} images"


def _kinds(records: Records) -> str:
    counts = np.bincount(records.kind_of, minlength=len(records.kinds))
    return ", ".join(f"{n:,} {kind}" for kind, n in zip(records.kinds, counts, strict=True))


def cost_lines(job: Job, costs: Sequence[Cost]) -> Iterator[str]:
    """Time, memory and texts of every stage, then whether it fits: here, on Macs, on the disk."""
    micro, here = job.recipe.train.micro_batch, compute_dtype(job.recipe.train)
    rows = [["stage", "steps", "images", "s a step", "in all", "peak", "padding", "guided texts"]]
    total = 0.0
    for cost in costs:
        stage, seconds = cost.stage, cost.step_seconds(micro)
        total += stage.steps * seconds
        padding, guided = text_shares(job, cost)
        rows.append([
            stage.name, f"{stage.steps:,}", f"{stage.batch_size:,}", f"{seconds:.2f}",
            clock(stage.steps * seconds), memory_text(predict(job, cost, here, micro).total),
            f"{padding:.0%}", f"{guided:.0%}",
        ])  # fmt: skip
    yield _table(rows)
    yield (
        f"predicted from a few images; {clock(total)} in all on this machine, without validation "
        "and checkpoints"
    )
    yield from _memory_lines(job, costs)
    yield from _disk_lines(job)


def text_shares(job: Job, cost: Cost) -> tuple[float, float]:
    """Padding among the text positions of a batch; texts with a guided phrase among all
    that the stage draws from."""
    filled = positions = 0
    for group in cost.batch.groups:
        learnt = group.loss_mask > 0
        # A text ends where the last token that is learnt from it ends.
        ends = learnt.shape[-1] - learnt[..., ::-1].argmax(-1)
        filled += int(np.where(learnt.any(-1), ends, 0).sum())
        positions += learnt.size
    records = job.records
    kinds = {kind for spec in cost.stage.texts for kind in spec.kinds}
    numbers = [n for n, kind in enumerate(records.kinds) if kind in kinds]
    drawn = np.isin(records.kind_of, numbers)
    guided = records.guided[drawn].mean() if drawn.any() else 0.0
    return 1 - filled / max(positions, 1), float(guided)


def _memory_lines(job: Job, costs: Sequence[Cost]) -> Iterator[str]:
    """The forecast for the stage that needs most, and for whom it is enough."""
    train = job.recipe.train
    here = compute_dtype(train)
    mac = mx.float32 if train.dtype == "float32" else mx.bfloat16
    largest = max(costs, key=lambda c: predict(job, c, here, train.micro_batch).total)
    at_once = min(train.micro_batch or largest.stage.batch_size, largest.stage.batch_size)
    yield f"\nmemory, predicted for stage '{largest.stage.name}', {at_once} images at a time:"
    columns = {f"this machine, {_name(here)}": here, f"a Mac, {_name(mac)}": mac}
    found = [predict(job, largest, dtype, train.micro_batch) for dtype in columns.values()]
    rows = {
        "weights": [m.weights for m in found],
        "float32 copies": [m.masters for m in found],
        f"moments ({train.optimizer})": [m.moments for m in found],
        "running mean": [m.mean for m in found],
        "gradients, activations": [m.passes for m in found],
        "states of texts": [m.texts for m in found],
        "together": [m.total for m in found],
    }
    texts = [
        [name, *(memory_text(v) if v else "-" for v in values)]
        for name, values in rows.items()
        if any(values)
    ]
    yield _table([["", *columns], *texts])
    limit = usable_memory()
    yield f"this machine ({memory_text(limit)}): {_fits(job, costs, here, limit)}"
    for size in MACS:
        limit = metal_limit(size)
        verdict = _fits(job, costs, mac, limit)
        yield f"a {size} GB Mac ({memory_text(limit)} for Metal by default): {verdict}"


def _fits(job: Job, costs: Sequence[Cost], dtype: mx.Dtype, limit: float) -> str:
    """Whether every stage fits into `limit` bytes, else what to change."""
    micro = job.recipe.train.micro_batch
    needs = [(predict(job, cost, dtype, micro).total, cost) for cost in costs]
    most, worst = max(needs, key=lambda pair: pair[0])
    if most <= limit:
        return f"fits ({most / limit:.0%})"
    text = f"does NOT fit, stage '{worst.stage.name}' needs {memory_text(most)}: "
    sizes = [fitting_micro_batch(job, cost, dtype, limit) for cost in costs]
    smaller = [n for n, cost in zip(sizes, costs, strict=True) if n != cost.stage.batch_size]
    if None not in smaller:
        return f"{text}set train.micro_batch={min(n for n in smaller if n)}"
    return text + (" or ".join(_savings(job, dtype)) or "take a smaller model")


def _savings(job: Job, dtype: mx.Dtype) -> Iterator[str]:
    """What takes less memory than the recipe does, when one image at a time is too much."""
    train = job.recipe.train
    if not train.grad_checkpoint:
        yield "train.grad_checkpoint=true"
    if dtype == mx.float32:
        yield "train.dtype=bfloat16"
    if job.recipe.model.lora is None:
        yield "model.lora"
    if train.optimizer != "muon":
        yield "train.optimizer=muon"
    if train.ema:
        yield "train.ema=0"


def _disk_lines(job: Job) -> Iterator[str]:
    room = disk(job)
    short = "" if room.most < room.free else "; NOT enough: free some or lower train.keep"
    yield (
        f"\ndisk: {memory_text(room.checkpoint)} a checkpoint, up to {memory_text(room.most)} at "
        f"a time, {memory_text(room.free)} free for {job.recipe.train.out}{short}"
    )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def batch_text(job: Job, colour: bool) -> Iterator[str]:
    """The texts of the first image in the first batch of every stage.

    What the loss is on stands in [brackets] (green with `colour`), a position whose attention is
    guided is followed by ^ (underlined).
    """
    for stage in job.recipe.stages:
        batch = job.batches(stage).part(0, 0, stage.batch_size)
        yield f"{stage.name}, record {batch.record_ids[0]}:"
        for group in batch.groups:
            for row, columns in _texts(group):
                yield f"  {_text(job, group, row, columns, colour)}"


def _texts(group: TextGroup) -> Iterator[tuple[int, np.ndarray]]:
    """(row, columns) of every text of the first image; its padding is left out."""
    for row, mask in enumerate(group.loss_mask[0]):
        segments = np.zeros(mask.shape, int) if group.segments is None else group.segments[0, row]
        for number in range(segments.max() + 1):
            own = np.flatnonzero(segments == number)
            if mask[own].any():
                yield row, own[: int(mask[own].nonzero()[0][-1]) + 1]


def _text(job: Job, group: TextGroup, row: int, columns: np.ndarray, colour: bool) -> str:
    ids, labels, mask = group.ids[0, row], group.labels[0, row], group.loss_mask[0, row]
    guided = {
        int(c)
        for r, c, w in zip(group.rows, group.cols, group.weight, strict=True)
        if r == row and w > 0
    }
    tokens = [(int(ids[columns[0]]), False, False)]
    tokens += [(int(labels[t]), bool(mask[t]), int(t) + 1 in guided) for t in columns]
    out = ""
    for (supervised, looked), run in groupby(tokens, key=lambda token: token[1:]):
        text = job.tokenizer.decode([token for token, _, _ in run])
        if colour:
            out += f"{GREEN * supervised}{UNDERLINE * looked}{text}{RESET}"
        else:
            text = f"{text}^" if looked else text
            out += f"[{text}]" if supervised else text
    return out.replace("\n", "\\n")
