"""Compare the tensors of two checkpoint folders: keys, shapes, dtypes and values.

The exit status is 0 when they are equal (within --atol), 1 when they differ.

example:
  agevlm-convert verify runs/demo/guided guided-copy
"""

import argparse
from pathlib import Path
from typing import cast

import mlx.core as mx

from agevlm_mlx.weights import read_weights

#: Lines of each kind that are printed before "and N more".
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="checkpoint folder")
    parser.add_argument("b", type=Path, metavar="B", help="checkpoint folder")
    parser.add_argument("--atol", type=float, default=0.0, help="largest difference allowed (0)")


def differences(
    a: dict[str, mx.array], b: dict[str, mx.array], atol: float = 0.0
) -> tuple[list[str], float]:
    """What differs, a line each, and the largest absolute difference of the shared tensors."""
    lines = [f"only in A: {key}" for key in a if key not in b]
    lines += [f"only in B: {key}" for key in b if key not in a]
    largest = 0.0
    for key in a:
        if key not in b:
            continue
        if a[key].shape != b[key].shape:
            lines.append(f"shape: {key} is {a[key].shape} in A and {b[key].shape} in B")
            continue
        if a[key].dtype != b[key].dtype:
            lines.append(f"dtype: {key} is {a[key].dtype} in A and {b[key].dtype} in B")
        x, y = a[key].astype(mx.float32), b[key].astype(mx.float32)
        gap = mx.where((x == y) | (mx.isnan(x) & mx.isnan(y)), 0.0, mx.abs(x - y))
        # A NaN against a number is a difference of any size.
        gap = mx.where(mx.isnan(gap), mx.inf, gap)
        worst = cast(float, gap.max().item()) if gap.size else 0.0
        largest = max(largest, worst)
        if worst > atol:
            lines.append(f"value: {key} differs by up to {worst:.3g}")
    return lines, largest


def run(args: argparse.Namespace) -> int:
    a, b = read_weights(args.a), read_weights(args.b)
    lines, largest = differences(a, b, args.atol)
    for line in lines[:_SHOWN]:
        print(line)
    if len(lines) > _SHOWN:
        print(f"and {len(lines) - _SHOWN} more")
    shared = len(set(a) & set(b))
    print(
        f"{'different' if lines else 'equal'}: {shared} shared tensors, "
        f"largest absolute difference {largest:.3g}"
    )
    return 1 if lines else 0
