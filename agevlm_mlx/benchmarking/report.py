"""What `agevlm benchmark` writes: facts of the machine, targets, a table."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..evaluation.machine import machine
from ..openblas import preload
from .traffic import CHIPS

#: What limits the threads of a BLAS.
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def facts() -> dict[str, Any]:
    """The machine and whatever else decides a time."""
    info = mx.device_info()
    return {
        **machine(),
        "os": platform.platform(),
        "chip": info.get("device_name"),
        "architecture": info.get("architecture"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "blas": preload(),
        "threads": {name: os.environ.get(name) for name in _THREADS},
        "load_average": list(os.getloadavg()),
    }


def progress(text: str) -> None:
    """Show what is being measured, in a line of the terminal that rewrites itself."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def model_line(model: Mapping[str, Any]) -> str:
    size = model["language_model_bytes"] / 1e6
    layers = ", ".join(map(str, model["looking_layers"]))
    kinds = "/".join(model["dtypes"])
    return f"{model['name']}: language model {size:.0f} MB ({kinds}), looks in layers {layers}"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The facts that a reader of a table needs."""
    memory = machine["memory_bytes"] / 2**30
    threads = [f"{name}={value}" for name, value in machine["threads"].items() if value]
    parts = [
        machine["processor"],
        f"{machine['cores']} cores",
        f"{memory:.0f} GB",
        f"MLX on {machine['device']}",
        f"BLAS {machine['blas'] or 'built in'}",
        ", ".join(threads) or "threads not limited",
    ]
    return "; ".join(parts)


def target(name: str, value: float, limit: float, at_least: bool) -> dict[str, Any]:
    """A figure with what it should be."""
    met = value >= limit if at_least else value <= limit
    return {"name": name, "value": value, "target": limit, "at_least": at_least, "met": met}


def targets(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets of this project that `measured` says something about."""
    found = []
    for tokens, figures in measured["first_token"].items():
        value = figures["second_question_over_text"]
        found.append(
            target(f"second question / text only, {tokens} image tokens", value, 1.1, False)
        )
    decode = measured["decode"]
    where = f"{decode['image_tokens']} image tokens"
    for name, label, limit in (
        ("maps_off_over_text", "maps off", 0.9),
        ("maps_on_over_text", "maps on", 0.8),
    ):
        found.append(
            target(f"decode rate, {label} / text only, {where}", decode[name], limit, True)
        )
    grown = measured["memory"]["bytes_per_text_token"]
    found.append(
        target("bytes per text token / text only", grown["agevlm"] / grown["text_only"], 1.0, False)
    )
    batch = measured["batch"]
    if batch["size"] == 8:
        value = batch["together_over_alone"]
        found.append(target("batch of 8 images / one at a time", value, 3.0, True))
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_tables(measured: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    rows = []
    for tokens, figures in measured["first_token"].items():
        times = figures["seconds"]
        rows.append(
            [
                str(tokens),
                *(f"{times[name]['median'] * 1e3:.0f}" for name in times),
                f"{figures['first_question_over_text']:.2f}",
                f"{figures['second_question_over_text']:.2f}",
            ]
        )
    header = ["image tokens", "text only (mlx-lm), ms", "no image, ms", "first question, ms"]
    header += ["second question, ms", "first / text", "second / text"]
    first = table(header, rows)
    decode, batch = measured["decode"], measured["batch"]
    limits = measured["limit"]
    rows = [
        [
            name.replace("_", " "),
            f"{rate['median']:.1f}",
            f"{decode.get(f'{name}_over_text', 1.0):.2f}",
            f"{limits[name]['share_of_bandwidth']:.0%}",
        ]
        for name, rate in decode["tokens_per_second"].items()
    ]
    rates = batch["tokens_per_second"]
    second = table(
        [f"decode, {decode['image_tokens']} image tokens", "tokens/s", "/ text", "of bandwidth"],
        rows,
    )
    third = (
        f"batch of {batch['size']} images: {rates['together']['median']:.1f} tokens/s, one at a "
        f"time {rates['alone']['median']:.1f}: {batch['together_over_alone']:.2f} times"
    )
    return "\n\n".join(["time to first token", first, second, third])


def memory_lines(measured: Mapping[str, Any]) -> str:
    """What takes memory and what a token moves."""
    memory, moved = measured["memory"], measured["bytes_per_token"]
    grown = memory["bytes_per_text_token"]
    images = ", ".join(f"{n / 1e6:.2f} MB for {t} tokens" for t, n in memory["image_bytes"].items())
    lines = [
        f"bytes per text token: {grown['agevlm']} (text only {grown['text_only']})",
        f"image: {images}; "
        + ("constant" if memory["image_bytes_constant"] else "GROWS WITH THE TEXT"),
        *(
            f"moved per token, {name.replace('_', ' ')}: {bytes['total'] / 1e6:.1f} MB "
            f"(weights {bytes['weights'] / 1e6:.1f}, text {bytes['text'] / 1e6:.1f}, "
            f"image {bytes['image'] / 1e6:.1f})"
            for name, bytes in moved.items()
        ),
    ]
    return "\n".join(lines)


def target_table(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            item["name"],
            f"{item['value']:.2f}",
            f"{'>=' if item['at_least'] else '<='} {item['target']:g}",
            "met" if item["met"] else "MISSED",
        ]
        for item in found
    ]
    return table(["target", "measured", "wanted", ""], rows)


def predicted_table(predicted: Mapping[str, Any]) -> str:
    """Predictions for Apple's chips, said to be such."""
    formats = predicted["formats"]
    if not formats:
        return (
            "predicted for Apple's chips: nothing; the model is so small that launching kernels, "
            "not bandwidth, decides"
        )
    rows = [
        [
            chip,
            f"{bandwidth:g}",
            *(f"{figures['tokens_per_second'][chip]:.0f}" for figures in formats.values()),
        ]
        for chip, bandwidth in CHIPS.items()
    ]
    header = ["predicted tokens/s, not measured", "GB/s", *formats]
    return f"{predicted['assumption']}\n\n" + table(header, rows)
