"""How large the models of an experiment are, counted before anything is trained."""

import json
from collections.abc import Iterable
from typing import Any

from .. import config, weights
from ..errors import UserError
from ..models.agevlm import AgeVLM
from ..training import adapters
from ..training.rules import named_parameters, parameter_scales
from ..training.stages import Recipe
from .plan import Cell, Plan


def count(recipe: Recipe) -> tuple[int, int]:
    """(all parameters of the recipe's model, those that some stage trains).

    Adapters (LoRA) count; what training alone needs (the adaptor of distilled features) does not.
    """
    spec = recipe.model
    if spec.init is not None:
        model = weights.load(spec.init).model
    else:
        table: dict[str, Any] = {
            "text_config": spec.text_config,
            "vision_config": spec.vision_config,
        }
        if spec.fusion_config is not None:
            table["fusion_config"] = config.to_dict(spec.fusion_config)
        model = AgeVLM(config.from_dict(config.ModelConfig, table, "model"))
    if spec.lora is not None:
        adapters.add(model, spec.lora)
    trained = {name for stage in recipe.stages for name in parameter_scales(model, stage)}
    sizes = {name: value.size for name, value in named_parameters(model).items()}
    return sum(sizes.values()), sum(sizes[name] for name in trained)


def counts(cells: Iterable[Cell]) -> dict[tuple[str, str], tuple[int, int]]:
    """(arm, variation) -> `count` of its model."""
    known: dict[str, tuple[int, int]] = {}
    found = {}
    for cell in cells:
        recipe = cell.runs[0].recipe
        rules = [stage.trainable for stage in recipe.stages]
        same = json.dumps([config.to_dict(recipe.model), rules])
        if same not in known:
            known[same] = count(recipe)
        found[cell.arm, cell.vary] = known[same]
    return found


def check(plan: Plan, cells: Iterable[Cell], found: dict[tuple[str, str], tuple[int, int]]) -> None:
    """``UserError`` for a model that is not as large as the others of its entry."""
    cells = list(cells)
    for entry in plan.experiment.runs:
        keys = dict.fromkeys((c.arm, c.vary) for c in cells if c.entry == entry.name)
        mean = sum(found[key][0] for key in keys) / max(len(keys), 1)
        for arm, vary in keys:
            off = found[arm, vary][0] / mean - 1
            if abs(off) > entry.parameters:
                name = arm if vary == "base" else f"{arm}/{vary}"
                raise UserError(
                    f"{plan.file}: runs '{entry.name}': expected models within "
                    f"{entry.parameters:.0%} of {mean:,.0f} parameters, their mean, got {name} "
                    f"with {found[arm, vary][0]:,} ({off:+.1%}); match the sizes, or set "
                    "parameters in the entry to say that they may differ"
                )
