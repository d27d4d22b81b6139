"""Quantise the language model of a checkpoint (its vision tower and projector stay as they are).

A recipe gives the layers that suffer most 8 (or 6) bits: the output layer, and in the first and
last eighth of the decoder and every third layer between them v_proj and down_proj.

examples:
  agevlm-convert quantize --model runs/demo/guided --mlx-path guided-8bit --q-bits 8
  agevlm-convert quantize --mlx-path embedded-mixed --q-recipe mixed_4_8
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.quantization import GROUP_SIZES, RECIPES, layers_by_bits, nbytes, quantize_model
from agevlm_mlx.weights import load, save_model

from . import source

#: Layers that are named when they could not be quantised, before "and N more".
_SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the demo's model)")
    parser.add_argument("--mlx-path", required=True, type=Path, help="folder to make")
    add_quantization_arguments(parser)


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags for the arguments of `quantize_model`."""
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--q-bits", type=int, choices=(4, 8), default=4, help="default: 4")
    bits.add_argument("--q-recipe", choices=tuple(RECIPES), help="instead of --q-bits")
    parser.add_argument(
        "--q-group-size",
        type=int,
        choices=sorted(GROUP_SIZES),
        default=64,
        help="weights that share a scale; a layer whose width is no multiple stays as it is (64)",
    )


def quantize_as_asked(
    model: AgeVLM, bits: int, group_size: int, recipe: str | None
) -> dict[str, Any]:
    """`quantize_model`, with errors that name the flags."""
    try:
        return quantize_model(model, bits, group_size, recipe)
    except UserError as error:
        raise UserError(str(error).replace("group_size:", "--q-group-size:", 1)) from None


def describe(settings: Mapping[str, Any], layers: Mapping[int, list[str]]) -> str:
    """What was done to which layers, in a line."""
    parts = [f"{len(layers[bits])} layers in {bits} bits" for bits in sorted(layers) if bits]
    text = f"{' and '.join(parts)}, groups of {settings['group_size']}"
    kept = sorted(layers.get(0, []))
    if kept:
        more = f" and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else ""
        text += f"; {len(kept)} kept, their width is no multiple: {', '.join(kept[:_SHOWN])}{more}"
    return text


def run(args: argparse.Namespace) -> int:
    source.check_free(args.mlx_path)
    loaded = load(args.model, lazy=True)
    before = nbytes(loaded.model)
    settings = quantize_as_asked(loaded.model, args.q_bits, args.q_group_size, args.q_recipe)
    after, layers = nbytes(loaded.model), layers_by_bits(loaded.model)
    card = source.read_card(loaded.path)
    with source.new_folder(args.mlx_path) as folder:
        save_model(
            folder,
            loaded.model,
            loaded.tokenizer,
            loaded.preprocessor,
            f"{card}\n\nLanguage model quantised: {describe(settings, layers)}.\n",
            quantization=settings,
            donate=True,
        )
    print(
        f"{args.mlx_path}: {describe(settings, layers)}; "
        f"{before / 1e6:.1f} MB became {after / 1e6:.1f} MB"
    )
    return 0
