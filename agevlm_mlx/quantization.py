"""Quantise a loaded model: its language model; vision tower and projector stay as they are.

A recipe gives the layers that suffer most 8 (or 6) bits: the output layer, and in the first and
last eighth of the decoder and every third layer between them v_proj and down_proj. Cross-attention
is treated as any other attention: measured on the embedded model, keeping it in full precision
changes the next word about as rarely as quantising it does.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from .errors import UserError
from .models.agevlm import AgeVLM

#: Name -> bits of most layers, bits of those that suffer most.
RECIPES = {"mixed_4_6": (4, 6), "mixed_4_8": (4, 8)}
#: Numbers of weights that may share a scale.
GROUP_SIZES = (64, 32)


def quantize_model(
    model: AgeVLM, bits: int = 4, group_size: int = 64, recipe: str | None = None
) -> dict[str, Any]:
    """Quantise the language model in place, without evaluating anything.

    recipe: a name of `RECIPES`, which then replaces `bits`. Returns the ``quantization`` table
    for ``config.json`` as mlx-lm writes it: ``group_size`` and ``bits`` of most layers, and
    under the path of a layer what is different there. ``UserError`` when the model is quantised
    already, or (it then begins with ``group_size:``) no layer's width is a multiple of it.
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
        advice = "try 32" if group_size > 32 else "keep the full precision"
        raise UserError(
            f"group_size: expected a divisor of some layer's width, got {group_size}; {advice}"
        )
    return settings


def fitting_group_size(model: AgeVLM) -> int:
    """The one of `GROUP_SIZES` that reaches more of the language model, 64 if both do alike.
    ``UserError`` if neither reaches any of it."""
    shapes = [
        module["weight"].shape
        for path, module in model.named_modules()
        if _can_be_quantised(path, module)
    ]
    reached = {
        size: sum(math.prod(shape) for shape in shapes if shape[-1] % size == 0)
        for size in GROUP_SIZES
    }
    if shapes and not any(reached.values()):
        raise UserError(
            f"expected a layer whose width is a multiple of {min(GROUP_SIZES)}, found none; keep "
            "the full precision"
        )
    return max(reached, key=lambda size: reached[size])


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
