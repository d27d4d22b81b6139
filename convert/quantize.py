"""Quantise the language model of a checkpoint (its vision tower and projector stay as they are).

A recipe gives the layers that suffer most 8 (or 6) bits: the output layer, and in the first and
last eighth of the decoder and every third layer between them v_proj and down_proj. Cross-attention
is treated as any other attention: measured on the embedded model, keeping it in full precision
changes the next word about as rarely as quantising it does.

examples:
  agevlm-convert quantize --model runs/demo/guided --mlx-path guided-8bit --q-bits 8
  agevlm-convert quantize --mlx-path embedded-mixed --q-recipe mixed_4_8
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.weights import load, save_model

from . import source

#: Name -> bits of most layers, bits of those that suffer most.
RECIPES = {"mixed_4_6": (4, 6), "mixed_4_8": (4, 8)}
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
        choices=(32, 64),
        default=64,
        help="weights that share a scale; a layer whose width is no multiple stays as it is (64)",
    )


def quantize_model(
    model: AgeVLM, bits: int = 4, group_size: int = 64, recipe: str | None = None
) -> dict[str, Any]:
    """Quantise the language model in place, without evaluating anything.

    recipe: a name of `RECIPES`, which then replaces `bits`. Returns the ``quantization`` table
    for ``config.json`` as mlx-lm writes it: ``group_size`` and ``bits`` of most layers, and
    under the path of a layer what is different there. ``UserError`` when the model is quantised
    already, or no layer's width is a multiple of `group_size`.
    """
    if model.config.quantization:
        raise UserError("the model is quantised already; start from the full-precision one")
    bits, high = RECIPES[recipe] if recipe else (bits, bits)
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits}
    sensitive = _sensitive(model)
    done = 0

    def choose(path: str, module: nn.Module) -> bool | dict[str, int]:
        nonlocal done
        if not _can_be_quantised(path, module) or module["weight"].shape[-1] % group_size:
            return False
        done += 1
        if high == bits or not sensitive(path):
            return True
        settings[path] = {"group_size": group_size, "bits": high}
        return dict(settings[path])

    nn.quantize(model, group_size, bits, class_predicate=choose)
    if not done:
        raise UserError(
            f"no layer's width is a multiple of --q-group-size {group_size}"
            + ("; try --q-group-size 32" if group_size > 32 else "; keep the full precision")
        )
    return settings


def _can_be_quantised(path: str, module: nn.Module) -> bool:
    return path.startswith("language_model.") and hasattr(module, "to_quantized")


def _sensitive(model: AgeVLM) -> Callable[[str], bool]:
    """Whether the layer at a path gets a recipe's higher bits (the choice of llama.cpp's
    Q4_K_M and of mlx-lm's mixed recipes, and an embedding that is the output layer, too)."""
    depth = len(model.layers)
    eighth = depth // 8
    tied = not any(path.endswith("lm_head") for path, _ in model.named_modules())

    def sensitive(path: str) -> bool:
        if path.endswith("lm_head") or (tied and path.endswith("embed_tokens")):
            return True
        layer = re.search(r"\.layers\.(\d+)\..*(v_proj|down_proj)$", path)
        if not layer:
            return False
        index = int(layer[1])
        return index < eighth or index >= 7 * depth // 8 or (index - eighth) % 3 == 2

    return sensitive


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters, evaluated or not."""
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


def layers_by_bits(model: AgeVLM) -> dict[int, list[str]]:
    """Paths of the language model's layers by their bits; 0 for those in full precision."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "bits") and "scales" in module:
            found.setdefault(module.bits, []).append(path)
        elif _can_be_quantised(path, module):
            found.setdefault(0, []).append(path)
    return found


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
    settings = quantize_model(loaded.model, args.q_bits, args.q_group_size, args.q_recipe)
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
