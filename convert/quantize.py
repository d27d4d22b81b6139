"""Quantise the language model of a checkpoint (its vision tower stays as it is).

example:
  agevlm-convert quantize --model runs/demo/guided --mlx-path guided-8bit --q-bits 8
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from agevlm_mlx.errors import UserError
from agevlm_mlx.weights import Loaded, load, save_model

from . import source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the demo's model)")
    parser.add_argument("--mlx-path", required=True, type=Path, help="folder to make")
    parser.add_argument("--q-bits", type=int, choices=(4, 8), default=4, help="default: 4")
    parser.add_argument(
        "--q-group-size", type=int, choices=(32, 64), default=64, help="default: 64"
    )


def quantize(loaded: Loaded, bits: int, group_size: int) -> tuple[int, int]:
    """Quantise in place; returns how many layers were, and how many could not be.

    A layer whose width is no multiple of the group size stays as it is.
    """
    if loaded.model.config.quantization:
        raise UserError(f"{loaded.path}: already quantised; start from the full-precision model")
    done = skipped = 0

    def choose(path: str, module: nn.Module) -> bool:
        nonlocal done, skipped
        if not hasattr(module, "to_quantized"):
            return False
        width = module["weight"].shape[-1]
        fits = width % group_size == 0
        done, skipped = done + fits, skipped + (not fits)
        return fits

    nn.quantize(loaded.model.language_model, group_size, bits, class_predicate=choose)
    if not done:
        raise UserError(
            f"{loaded.path}: no layer's width is a multiple of --q-group-size {group_size}; "
            "try --q-group-size 32"
        )
    return done, skipped


def _bytes(model: nn.Module) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


def run(args: argparse.Namespace) -> int:
    source.check_free(args.mlx_path)
    loaded = load(args.model)
    before = _bytes(loaded.model)
    done, skipped = quantize(loaded, args.q_bits, args.q_group_size)
    mx.eval(loaded.model.parameters())
    card = loaded.path / "README.md"
    text = card.read_text(encoding="utf-8").rstrip() if card.is_file() else "# AgeVLM model"
    note = f"Language model quantised to {args.q_bits} bits in groups of {args.q_group_size}."
    with source.new_folder(args.mlx_path) as folder:
        save_model(
            folder,
            loaded.model,
            loaded.tokenizer,
            loaded.preprocessor,
            f"{text}\n\n{note}\n",
            quantization={"group_size": args.q_group_size, "bits": args.q_bits},
        )
    kept = f", {skipped} kept (width no multiple of {args.q_group_size})" if skipped else ""
    after = _bytes(loaded.model)
    print(
        f"{args.mlx_path}: {done} layers quantised{kept}; "
        f"{before / 1e6:.1f} MB became {after / 1e6:.1f} MB"
    )
    return 0
