"""Which parameters a stage trains, and how fast: ordered rules ``[regex, scale]``.

The first regex that matches a whole parameter name decides. Scale 0 freezes, anything else
multiplies the stage's learning rate. Nothing is left to chance: a parameter without a rule and a
rule without a parameter are errors.
"""

import re
from collections.abc import Iterable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError
from .stages import Stage


def match_rules(
    names: Iterable[str], rules: Sequence[tuple[str, float]], where: str
) -> dict[str, float]:
    """The learning-rate scale of every parameter name: that of the first rule that matches it.

    Raises ``UserError`` for a name that no rule matches, a rule that matches no name, an invalid
    regex or a negative scale.
    """
    try:
        compiled = [(re.compile(regex), scale) for regex, scale in rules]
    except re.error as error:
        raise UserError(
            f"{where}: {error.pattern!r} is not a regular expression: {error}"
        ) from None
    if any(scale < 0 for _, scale in compiled):
        raise UserError(f"{where}: expected learning-rate scales >= 0, got {list(rules)}")
    scales: dict[str, float] = {}
    unused = {regex for regex, _ in rules}
    unmatched = []
    for name in names:
        hits = [(regex, scale) for regex, scale in compiled if regex.fullmatch(name)]
        unused -= {regex.pattern for regex, _ in hits}
        if hits:
            scales[name] = hits[0][1]
        else:
            unmatched.append(name)
    if unmatched:
        shown = ", ".join(unmatched[:5]) + (", ..." if len(unmatched) > 5 else "")
        raise UserError(
            f"{where}: no rule matches {len(unmatched)} parameters: {shown}; add a rule, "
            "[regex, 0] to freeze them"
        )
    if unused:
        raise UserError(
            f"{where}: {sorted(unused)[0]!r} matches no parameter; rules match whole names, "
            "so end a prefix with '.*'"
        )
    return scales


def named_parameters(model: nn.Module, *, trainable: bool = False) -> dict[str, mx.array]:
    """All parameters of `model`, or those not frozen, by their dotted names."""
    tree = model.trainable_parameters() if trainable else model.parameters()
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def parameter_scales(model: nn.Module, stage: Stage) -> dict[str, float]:
    """The learning-rate scale of every parameter that the stage trains, by name."""
    where = f"stage '{stage.name}' trainable"
    parameters = named_parameters(model)
    scales = match_rules(parameters, stage.trainable, where)
    trained = {name: scale for name, scale in scales.items() if scale > 0}
    if not trained:
        raise UserError(f"{where}: every parameter is frozen; give at least one rule a scale > 0")
    for name in trained:
        if not mx.issubdtype(parameters[name].dtype, mx.floating):
            raise UserError(
                f"{where}: {name} is quantised ({parameters[name].dtype}) and cannot be trained; "
                "freeze it or start from an unquantised model"
            )
    return trained


def trainable_names(model: nn.Module, stage: Stage) -> list[str]:
    """Names of exactly the parameters that `stage` trains."""
    return list(parameter_scales(model, stage))


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze all of `model` but the named parameters."""
    model.freeze()
    modules = dict(model.named_modules())
    for name in names:
        owner, _, key = name.rpartition(".")
        # Straight to the module: QuantizedLinear.unfreeze would freeze its bias again.
        modules[owner].unfreeze(keys=[key], recurse=False)
