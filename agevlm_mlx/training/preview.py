"""What ``agevlm train --dry-run`` prints: parameters, memory, time, and the first batch as text."""

import time
from collections.abc import Iterator
from itertools import groupby

import mlx.core as mx

from ..data.batches import TextGroup
from .build import Job
from .log import memory_text
from .objective import loss_and_gradients
from .rules import named_parameters, parameter_scales, set_trainable

GREEN, UNDERLINE, RESET = "\x1b[32m", "\x1b[4m", "\x1b[0m"


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line[0] = row[0].ljust(widths[0])
    return "\n".join("  ".join(line) for line in lines)


def _part(name: str) -> str:
    if ".cross_attn." in name:
        return "cross-attention"
    head, _, rest = name.partition(".")
    return "token embedding" if head == "language_model" and "embed_tokens" in rest else head


def measure(job: Job) -> Iterator[str]:
    """One forward and backward pass of every stage on real data: seconds and peak memory."""
    weights = sum(value.nbytes for _, value in named_parameters(job.model).items())
    for stage in job.recipe.stages:
        scales = parameter_scales(job.model, stage)
        set_trainable(job.model, scales)
        batch = job.batches(stage).batch(0)
        params = named_parameters(job.model, trainable=True)
        moments = 2 * sum(4 * value.size for value in params.values())

        mx.reset_peak_memory()
        for _ in range(2):  # the first pass also pays for what MLX sets up once
            start = time.perf_counter()
            mx.eval(loss_and_gradients(job.model, params, batch, stage.losses))
            seconds = time.perf_counter() - start
        peak = mx.get_peak_memory() + moments
        yield (
            f"{stage.name}: {stage.steps} steps of {stage.batch_size} images, {seconds:.2f} s "
            f"a step here, so about {stage.steps * seconds / 60:.1f} min; "
            f"peak memory {memory_text(peak)} (weights {memory_text(weights)}, "
            f"moments {memory_text(moments)})"
        )


def batch_text(job: Job, colour: bool) -> Iterator[str]:
    """The texts of the first image in the first batch of every stage.

    What the loss is on stands in [brackets] (green with `colour`), a position whose attention is
    guided is followed by ^ (underlined).
    """
    for stage in job.recipe.stages:
        batch = job.batches(stage).batch(0)
        yield f"{stage.name}, record {batch.record_ids[0]}:"
        for group in batch.groups:
            for row in range(group.ids.shape[1]):
                text = _row_text(job, group, row, colour)
                if text:
                    yield f"  {text}"


def _row_text(job: Job, group: TextGroup, row: int, colour: bool) -> str:
    ids, labels, mask = group.ids[0, row], group.labels[0, row], group.loss_mask[0, row]
    if not mask.any():
        return ""
    end = int(mask.nonzero()[0][-1]) + 1
    guided = {
        int(c)
        for r, c, w in zip(group.rows, group.cols, group.weight, strict=True)
        if r == row and w > 0
    }
    tokens = [(int(ids[0]), False, False)]
    tokens += [(int(labels[t]), bool(mask[t]), t + 1 in guided) for t in range(end)]
    out = ""
    for (supervised, looked), run in groupby(tokens, key=lambda token: token[1:]):
        text = job.tokenizer.decode([token for token, _, _ in run])
        if colour:
            out += f"{GREEN * supervised}{UNDERLINE * looked}{text}{RESET}"
        else:
            text = f"{text}^" if looked else text
            out += f"[{text}]" if supervised else text
    return out.replace("\n", "\\n")
