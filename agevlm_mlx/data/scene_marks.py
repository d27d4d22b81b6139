"""What phrases of an embedded picture's records can say beside their boxes, where it is asked for.

Records are those of `scene_texts` and `scene_dialogues`, as JSON; they are changed in place.
"""

import re
from typing import Any

from ..sam.targets import rle_encode
from .nouns import ALL_NOUNS
from .painting import Scene

_NOUN = re.compile(rf"\b({'|'.join(ALL_NOUNS)})\b")


def mark_masks(records: list[dict[str, Any]], scene: Scene) -> None:
    """Give each phrase the exact mask of its object (COCO RLE)."""
    masks = {n: rle_encode(mask) for n, mask in zip(scene.nouns, scene.masks, strict=True)}
    for record in records:
        for phrase in record.get("phrases", []):
            phrase["mask"] = masks[phrase["text"]]


def mark_absent(records: list[dict[str, Any]], scene: Scene) -> None:
    """Give each noun that a text names and the picture does not show a phrase that says so."""
    for record in records:
        found = [
            {
                "text": noun[0],
                "turn": turn,
                "start": noun.start(),
                "end": noun.end(),
                "absent": True,
            }
            for turn, message in enumerate(record["conversations"])
            for noun in _NOUN.finditer(message["value"].removeprefix("<image>\n"))
            if noun[0] not in scene.nouns
        ]
        if found:
            record["phrases"] = [*record.get("phrases", []), *found]
