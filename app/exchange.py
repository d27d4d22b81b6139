"""A question and its answer, and where the words of both looked: plain data."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agevlm_mlx.data.image import Geometry
from agevlm_mlx.evaluation.grounding import NOT_GROUNDED, NOT_GROUNDED_MEANS
from agevlm_mlx.evaluation.words import Look

from .overlay import word_json
from .pictures import Shown


@dataclass(eq=False)
class Exchange:
    """One question of a tab and what became of it.

    layers: the numbers of the model's looking layers. unread: whether its pictures could not be
    read. state: waiting, reading, answering, done,
    stopped or failed. said: whether the model is told of it later; forgotten: not any more, for
    want of room. seen: the pictures that `looks` has maps of, in their order.
    """

    id: int
    question: str
    model: str
    layers: tuple[int, ...]
    pictures: tuple[Shown, ...] = ()
    unread: bool = False
    answer: str = ""
    state: str = "waiting"
    ahead: int = 0
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    stats: dict[str, Any] | None = None
    said: bool = False
    forgotten: bool = False
    seen: tuple[Shown, ...] = ()
    looks: tuple[Look, ...] = ()
    geometries: tuple[Geometry, ...] = ()
    no_looks: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it has all of its answer."""
        return self.state in ("done", "stopped")

    def describe(self) -> dict[str, Any]:
        """The exchange as the page shows it, without pictures and maps; JSON values."""
        names = ("id", "question", "answer", "state", "ahead", "error", "notes", "model", "stats")
        shown = [picture.id for picture in self.pictures]
        return {name: getattr(self, name) for name in names} | {"pictures": shown}

    def where(self, layer: Any = None, head: Any = None) -> dict[str, Any]:
        """Where its words looked, for a looking layer and a head as the page names them, by
        numbers from 0; what is no such number, or is not kept, stands for the mean. JSON values:
        "layer" and "head" say what is shown, a layer by its number in the model."""
        L, N = self.looks[0].values.shape[:2] if self.looks else (0, 0)
        chosen = _number(layer, L if L > 1 else 0), _number(head, N if N > 1 else 0)
        return {
            "exchange": self.id,
            "pictures": [shown.id for shown in self.seen],
            "words": [word_json(look, self.geometries, *chosen) for look in self.looks],
            "note": self.no_looks,
            "layer": None if chosen[0] is None else self.layers[chosen[0]],
            "head": chosen[1],
            "threshold": NOT_GROUNDED,
            "about": NOT_GROUNDED_MEANS,
        }

    def thin(self) -> None:
        """Keep of every map only the mean over layers and heads."""
        self.looks = tuple(
            replace(look, values=look.attention().astype(np.float16)[None, None])
            for look in self.looks
        )


def _number(value: Any, count: int) -> int | None:
    return value if type(value) is int and 0 <= value < count else None
