"""Compare two checkpoints, or two encoder folders: their tensors, or what they compute.

Without --logits: keys, shapes, dtypes and values of the tensors, and the settings in config.json.
With --logits: the next-token predictions on held-out pictures with captions and questions (for
encoder folders: their output tokens), which also works between a model and its quantised copy.
The exit status is 0 when they are equal (within --atol, or with --min-top1 by the share of equal
predictions), 1 when they differ, 2 when they cannot be compared.

examples:
  agevlm-convert verify runs/demo/guided guided-copy
  agevlm-convert verify runs/demo/guided guided-4bit --logits --min-top1 0.95
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from agevlm_mlx.config import read_json
from agevlm_mlx.errors import UserError
from agevlm_mlx.weights import Loaded, load, read_weights

from . import outputs
from .dequantize import dequantize_model

#: Lines of each kind that are printed before "and N more".
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="checkpoint folder")
    parser.add_argument("b", type=Path, metavar="B", help="checkpoint folder")
    parser.add_argument("--atol", type=float, default=0.0, help="largest difference allowed (0)")
    parser.add_argument("--logits", action="store_true", help="compare what they compute")
    parser.add_argument("--images", type=int, default=16, help="pictures for --logits (16)")
    parser.add_argument(
        "--min-top1",
        type=float,
        help="with --logits: equal means that this share of answer tokens is predicted alike",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def differences(
    a: dict[str, mx.array], b: dict[str, mx.array], atol: float = 0.0
) -> tuple[list[str], float]:
    """What differs, a line each, and the largest absolute difference of the shared tensors.

    The dictionaries are emptied, so that lazy tensors are in memory two at a time.
    """
    lines = [f"only in A: {key}" for key in a if key not in b]
    lines += [f"only in B: {key}" for key in b if key not in a]
    largest = 0.0
    for key in [key for key in a if key in b]:
        x, y = a.pop(key), b.pop(key)
        if x.shape != y.shape:
            lines.append(f"shape: {key} is {x.shape} in A and {y.shape} in B")
            continue
        if x.dtype != y.dtype:
            lines.append(f"dtype: {key} is {x.dtype} in A and {y.dtype} in B")
        worst = _gap(x, y)
        largest = max(largest, worst)
        if worst > atol:
            lines.append(f"value: {key} differs by up to {worst:.3g}")
    return lines, largest


def _gap(x: mx.array, y: mx.array) -> float:
    """The largest absolute difference; any against a NaN is infinite."""
    if not x.size:
        return 0.0
    if x.dtype == y.dtype and not mx.issubdtype(x.dtype, mx.floating):
        # Packed weights have 32 bits that count, of which float32 would keep 24.
        return float(cast(int, (mx.maximum(x, y) - mx.minimum(x, y)).max().item()))
    x, y = x.astype(mx.float32), y.astype(mx.float32)
    gap = mx.where((x == y) | (mx.isnan(x) & mx.isnan(y)), 0.0, mx.abs(x - y))
    return cast(float, mx.where(mx.isnan(gap), mx.inf, gap).max().item())


def config_differences(a: Path, b: Path) -> list[str]:
    """What the two config.json say differently, a line for each setting."""
    x, y = (_flat(_config(folder)) for folder in (a, b))
    return [
        f"config: {key} is {x.get(key, 'absent')} in A and {y.get(key, 'absent')} in B"
        for key in sorted(x | y)
        if x.get(key) != y.get(key)
    ]


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    table = read_json(path) if path.is_file() else None
    if not isinstance(table, dict):
        raise UserError(f"{path}: missing or no table; expected a checkpoint or encoder folder")
    return table


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def run(args: argparse.Namespace) -> int:
    if args.min_top1 is not None and not args.logits:
        raise UserError("--min-top1: is about predictions; pass --logits, too")
    if args.images < 1:
        raise UserError(f"--images: expected at least 1, got {args.images}")
    return _run_logits(args) if args.logits else _run_tensors(args)


def _run_tensors(args: argparse.Namespace) -> int:
    configs = config_differences(args.a, args.b)
    a, b = read_weights(args.a), read_weights(args.b)
    shared = len(set(a) & set(b))
    lines, largest = differences(a, b, args.atol)
    lines = configs + lines
    verdict = "different" if lines else "equal"
    if args.json:
        table = {"equal": not lines, "tensors": shared, "largest": largest, "differences": lines}
        print(json.dumps(table))
        return int(bool(lines))
    for line in lines[:_SHOWN]:
        print(line)
    if len(lines) > _SHOWN:
        print(f"and {len(lines) - _SHOWN} more")
    print(f"{verdict}: {shared} shared tensors, largest absolute difference {largest:.3g}")
    return int(bool(lines))


def _run_logits(args: argparse.Namespace) -> int:
    encoders = [outputs.is_encoder(folder) for folder in (args.a, args.b)]
    if encoders[0] != encoders[1]:
        raise UserError(f"{args.a}, {args.b}: one is an encoder, the other a whole model")
    if encoders[0]:
        if args.min_top1 is not None:
            raise UserError("--min-top1: encoders predict no words; pass --atol")
        largest, relative = outputs.compare_tokens(args.a, args.b, args.images)
        equal = largest <= args.atol
        table: dict[str, Any] = {"largest": largest, "largest_relative": relative}
        lines = [f"output tokens: largest difference {largest:.3g}, {relative:.3g} of a token"]
    else:
        found = outputs.compare_logits(_whole(args.a), _whole(args.b), args.images)
        if args.min_top1 is None:
            equal = all(row.largest <= args.atol for row in found)
        else:
            equal = found[0].top1 >= args.min_top1
        table = {"logits": [asdict(row) for row in found]}
        lines = [
            f"{row.case + ':':27} top-1 agreement {row.top1:.2%} of {row.positions}, "
            f"largest difference {row.largest:.3g}, KL {row.kl:.2e}"
            for row in found
        ]
    if args.json:
        print(json.dumps({"equal": equal, **table}))
    else:
        print("\n".join([*lines, "equal" if equal else "different"]))
    return int(not equal)


def _whole(folder: Path) -> Loaded:
    """A checkpoint; on the CPU, where MLX multiplies packed weights some 15 times slower than
    plain ones, with the values that they stand for."""
    loaded = load(folder)
    if loaded.model.config.quantization and mx.default_device().type == mx.DeviceType.cpu:
        dequantize_model(loaded.model)
    return loaded
