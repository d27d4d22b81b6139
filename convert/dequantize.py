"""Give a quantised checkpoint full-precision weights again: the values it computes with.

What quantising rounded away does not come back, and quantising the result again need not give
the same integers (a group's range shrinks when its extremes were rounded inwards).

example:
  agevlm-convert dequantize --model guided-8bit --mlx-path guided-float --dtype float16
"""

import argparse
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model as mlx_lm_dequantize_model

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.quantization import layers_by_bits, nbytes
from agevlm_mlx.weights import load, save_model

from . import source
from .vision import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="quantised checkpoint folder or hub id")
    parser.add_argument("--mlx-path", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of all weights (default: that of each layer's scales)"
    )


def dequantize_model(model: AgeVLM, dtype: mx.Dtype | None = None) -> None:
    """Replace quantised layers by full-precision ones, in place and without evaluating.

    dtype: of all floating parameters; a quantised value is computed in it, not rounded to the
    scales' dtype first. ``UserError`` when nothing is quantised.
    """
    if not model.config.quantization:
        raise UserError("the model is not quantised; there is nothing to do")
    if dtype is not None:
        model.update(tree_map(lambda x: _cast(x, dtype), model.parameters()))
    mlx_lm_dequantize_model(model)
    model.config = replace(model.config, quantization=None)


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def run(args: argparse.Namespace) -> int:
    source.check_free(args.mlx_path)
    loaded = load(args.model, lazy=True)
    before = nbytes(loaded.model)
    count = sum(len(paths) for bits, paths in layers_by_bits(loaded.model).items() if bits)
    dequantize_model(loaded.model, getattr(mx, args.dtype) if args.dtype else None)
    after = nbytes(loaded.model)
    note = f"Language model dequantised: {count} layers hold the values that were left."
    with source.new_folder(args.mlx_path) as folder:
        save_model(
            folder,
            loaded.model,
            loaded.tokenizer,
            loaded.preprocessor,
            f"{source.read_card(loaded.path)}\n\n{note}\n",
            donate=True,
        )
    print(
        f"{args.mlx_path}: {count} layers dequantised; "
        f"{before / 1e6:.1f} MB became {after / 1e6:.1f} MB"
    )
    return 0
