"""What happens to each key of a foreign checkpoint. Every key must match exactly one rule."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from agevlm_mlx.errors import UserError


@dataclass(frozen=True)
class Rule:
    """Keys that `pattern` matches in full are kept, or dropped for the reason `drop`."""

    pattern: str
    drop: str | None = None


#: ``vision_config.model_type`` -> its rules.
RULES: dict[str, tuple[Rule, ...]] = {
    "siglip_vision_model": (
        Rule(r"(vision_model\.)?embeddings\.(patch|position)_embedding\.(weight|bias)"),
        Rule(r"(vision_model\.)?encoder\.layers\.\d+\..+\.(weight|bias)"),
        Rule(r"(vision_model\.)?post_layernorm\.(weight|bias)"),
        Rule(r"(vision_model\.)?head\..+", drop="pooling head"),
        Rule(r"(vision_model\.)?embeddings\.position_ids", drop="index buffer"),
        Rule(r"text_model\..+|logit_(scale|bias)", drop="text tower"),
    ),
}


def sort_keys(keys: Iterable[str], rules: Iterable[Rule]) -> tuple[list[str], Counter[str]]:
    """The keys to keep, and how many were dropped for which reason.

    ``UserError`` lists the keys that no rule matches, or more than one.
    """
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    wrong: list[str] = []
    rules = tuple(rules)
    for key in keys:
        matches = [rule for rule in rules if re.fullmatch(rule.pattern, key)]
        if len(matches) != 1:
            wrong.append(f"{key} ({len(matches)} rules)")
        elif matches[0].drop is None:
            kept.append(key)
        else:
            dropped[matches[0].drop] += 1
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(
            f"expected exactly one rule for every key, got: {', '.join(wrong[:8])}{more}; "
            "this is another architecture than its config.json says"
        )
    return kept, dropped
