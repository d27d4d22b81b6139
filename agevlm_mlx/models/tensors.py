"""Tensors of a checkpoint by name: other people's names made ours, and given to a module.

Of a foreign checkpoint every key must match exactly one rule, so that nothing is silently
left out.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError, one_line

#: Keys that an error message lists before "and N more".
_SHOWN = 8


@dataclass(frozen=True)
class Rule:
    """What becomes of the keys that `pattern` matches in full.

    Such a tensor gets the name `to` (with groups as in ``re.Match.expand``), after `change`;
    or it is left out for the reason `drop`.
    """

    pattern: str
    to: str | None = None
    change: Callable[[mx.array], mx.array] | None = None
    drop: str | None = None

    def __post_init__(self) -> None:
        if (self.to is None) == (self.drop is None):
            raise ValueError(f"{self.pattern}: expected either a name or a reason to drop it")


def channels_last(kernel: mx.array) -> mx.array:
    """A convolution kernel in MLX's order: [out in h w] -> [out h w in]."""
    return kernel.transpose(0, 2, 3, 1)


def known_keys(config_class: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a foreign configuration that `config_class` has a field for. The others
    (dropout, dtype, versions) do not change the forward pass."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in table.items() if name in names - {"model_type"}}


def apply_rules(
    tensors: Mapping[str, mx.array], rules: Iterable[Rule], where: object
) -> tuple[dict[str, mx.array], Counter[str]]:
    """Our tensors (lazy, as the given ones are), and how many were left out for which reason.

    ``UserError`` lists the keys that no rule matches, or more than one, and names that two
    keys lead to, or the first key kept whose numbers are no floating-point ones.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    ours: dict[str, mx.array] = {}
    dropped: Counter[str] = Counter()
    wrong: list[str] = []
    for key, value in tensors.items():
        matches = [(m, rule) for p, rule in compiled if (m := p.fullmatch(key))]
        if len(matches) != 1:
            wrong.append(f"{key} ({len(matches)} rules)")
            continue
        match, rule = matches[0]
        if rule.to is None:
            dropped[rule.drop or ""] += 1
            continue
        if not mx.issubdtype(value.dtype, mx.floating):  # FP8 reads as uint8
            raise unreadable(where, key, value.dtype)
        name = match.expand(rule.to)
        if name in ours:
            raise UserError(f"{where}: two keys name one tensor, {name}; the second is {key}")
        try:
            ours[name] = value if rule.change is None else rule.change(value)
        except (ValueError, IndexError) as error:  # a kernel with other dimensions, for example
            raise UserError(f"{where}: {key} of shape {value.shape}: {one_line(error)}") from None
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"{where}: expected exactly one rule for every key, got: "
            f"{', '.join(wrong[:_SHOWN])}{more}; "
            "this is another architecture than its config says"
        )
    return ours, dropped


def unreadable(where: object, key: object, dtype: object) -> UserError:
    """What to say of a tensor whose values are no plain floating-point numbers."""
    return UserError(
        f"{where}: expected floating-point numbers, got {key} as "
        f"{str(dtype).rpartition('.')[2]} (FP8 or quantised weights are not read); take the "
        "bfloat16 or full-precision checkpoint"
    )


def check_shapes(module: nn.Module, weights: Mapping[str, mx.array], where: object) -> None:
    """``UserError`` lists what is missing, extra or of another shape than `module` has."""
    own = dict(tree_flatten(module.parameters()))
    problems = [f"missing {k}" for k in own if k not in weights]
    problems += [f"unexpected {k}" for k in weights if k not in own]
    problems += [
        f"{k} expected {own[k].shape}, got {weights[k].shape}"
        for k in own
        if k in weights and own[k].shape != weights[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{where}: weights of another architecture: {'; '.join(problems[:4])}{more}"
        )


def assign(module: nn.Module, weights: Mapping[str, mx.array], where: object) -> None:
    """Give `module` exactly these weights; ``UserError`` as `check_shapes` raises it."""
    check_shapes(module, weights, where)
    module.load_weights(list(weights.items()))
