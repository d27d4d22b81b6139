"""What each phrase of each picture looked at, measured map by map and gathered.

One row of numbers for each phrase, of the mean map over layers and heads and of its baselines, and
one array of numbers for its single heads and layers. `looking` says what they come to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..data.scene_texts import presence_question
from ..errors import UserError
from ..evaluation import pointing
from ..evaluation.metrics import divide
from ..evaluation.respondent import Looked
from .examples import Example

#: Of each head, in this order.
HEADS = (
    "on_image",
    "null",
    "in_mask",
    "energy",
    "hit",
    "auroc",
    "iou_half",
    "entropy",
    "sink",
    "specificity",
)
#: A map is compared with a mask of at most this side for each head, as cells are coarse.
_SIDE = 96


@dataclass(frozen=True, eq=False)
class Seen:
    """One phrase that can be measured: its mask, and where it looked."""

    phrase: str
    mask: np.ndarray
    looked: Looked

    @cached_property
    def mean(self) -> np.ndarray:
        """f64[Gh Gw]: over layers and heads."""
        return self.looked.attention.mean((0, 1), dtype=np.float64)

    @cached_property
    def maps(self) -> np.ndarray:
        """f64[L*N + L + 1, Gh, Gw]: every head, the mean of each layer, the mean of all."""
        attention = self.looked.attention.astype(np.float64)
        heads = attention.reshape(-1, *attention.shape[2:])
        return np.concatenate([heads, attention.mean(1), attention.mean((0, 1))[None]])

    @cached_property
    def target(self) -> pointing.Target:
        Gh, Gw = self.looked.attention.shape[2:]
        return pointing.Target(self.mask, self.looked.geometry, (Gh, Gw))


class Looks:
    """What has been measured so far: a row and an array of heads for each phrase."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.rows: list[dict[str, Any]] = []
        self.images: list[int] = []
        self.heads: list[np.ndarray] = []  # f64[len(HEADS), maps] of each row
        self.kept: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.skipped = {"out of view": 0, "unusable mask": 0}
        self.shape: tuple[int, int] = (0, 0)  # L, N
        self.even: float | None = None
        self.numbers: dict[Path, int] = {}
        self.grids: set[tuple[int, ...]] = set()
        self.shares: Any = 0.0  # f64[maps, S]: the sum of all maps, each of sum 1
        self.tops: Any = 0.0  # f64[maps, S]: how often each cell was the strongest

    def add(self, example: Example, looks: Sequence[Looked | None]) -> None:
        """Measure the phrases of one picture."""
        seen = list(self._usable(example, looks))
        if not seen:
            return
        number = self.numbers.setdefault(example.image, len(self.numbers))
        every = np.stack([one.maps for one in seen])
        sums = every.sum((2, 3), keepdims=True)
        shares = np.divide(every, sums, out=np.zeros_like(every), where=sums > 0)
        coverage = np.stack([one.target.coverage for one in seen])
        # Of each phrase's maps on each phrase's mask: [whose maps, whose mask, maps]
        energies = np.einsum("kmyx,jyx->kjm", shares, coverage)
        for n, one in enumerate(seen):
            row = self._row(example, one, [other for other in seen if other is not one], seen)
            others = np.delete(energies[:, n], n, 0)
            specificity = energies[n, n] - others.mean(0) if len(others) else np.nan
            self.heads.append(of_heads(one, every[n], energies[n, n], specificity))
            row["specificity"] = float(self.heads[-1][-1, -1]) if len(others) else None
            if number < self.keep:
                self.kept.append(_kept(example, one, len(self.rows)))
            self.rows.append(row)
            self.images.append(number)
        self._add_sinks(shares)
        L, N = seen[0].looked.attention.shape[:2]
        self.shape = (L, N)

    def _usable(self, example: Example, looks: Sequence[Looked | None]) -> Iterator[Seen]:
        for (phrase, mask), looked in zip(example.objects.items(), looks, strict=True):
            if looked is None:
                continue
            try:
                pixels = mask()
                wide, high = looked.geometry.width, looked.geometry.height
                if pixels.shape != (high, wide):
                    got = "x".join(map(str, pixels.shape[::-1]))
                    raise UserError(f"expected a mask of {wide}x{high} px, got {got}")
                if not pixels.any():
                    raise UserError("expected a mask with something in it, got an empty one")
            except UserError as error:
                self.skipped["unusable mask"] += 1
                self.problems.append(f"{example.image}: {phrase}: {error}")
                continue
            one = Seen(phrase, pixels, looked)
            if one.target.visible:
                yield one
            else:
                self.skipped["out of view"] += 1

    def _row(
        self, example: Example, one: Seen, others: Sequence[Seen], seen: Sequence[Seen]
    ) -> dict[str, Any]:
        target, geometry = one.target, one.looked.geometry
        numbers = pointing.measures(one.looked.attention, one.mask, geometry, one.looked.null)
        baselines: dict[str, dict[str, Any]] = {
            "uniform": {
                "energy": target.uniform,
                "hit": target.uniform,
                "auroc": None if numbers["auroc"] is None else 0.5,
                "iou_half": float(one.mask[target.seen].mean()),
            },
            "centre": {**compared(target, target.gaussian), "energy": target.centre},
        }
        baselines["centre"]["hit"] = target.centre_hit
        if others:
            each = [compared(target, other.mean) for other in others]
            baselines["shuffled"] = {
                name: None if each[0][name] is None else float(np.mean([e[name] for e in each]))
                for name in each[0]
            }
            average = np.mean([s.mean for s in seen], 0)
            baselines["image_only"] = compared(target, average)
        asked = {"image": str(example.image), "phrase": one.phrase}
        question = {"question": presence_question(one.phrase, True)}
        in_mask = {"in_mask": numbers["on_image"] * numbers["energy"]}
        return asked | question | numbers | in_mask | {"baselines": baselines}

    def _add_sinks(self, shares: np.ndarray) -> None:
        """shares: f64[phrases maps Gh Gw]."""
        self.grids.add(shares.shape[2:])
        if len(self.grids) > 1:
            return
        flat = shares.reshape(*shares.shape[:2], -1)
        self.even = 1 / flat.shape[-1]
        self.shares = self.shares + flat.sum(0)
        top = flat.argmax(-1)[..., None] == np.arange(flat.shape[-1])
        # A map without any attention has no strongest cell.
        self.tops = self.tops + (top & (flat.sum(-1, keepdims=True) > 0)).sum(0)


def compared(target: pointing.Target, attention: np.ndarray) -> dict[str, Any]:
    """What a baseline's map f[Gh Gw] scores."""
    return {
        "energy": target.energy(attention),
        "hit": target.hit(attention),
        "auroc": target.auroc(attention),
        "iou_half": target.iou_half(attention),
    }


def of_heads(
    one: Seen, maps: np.ndarray, energy: np.ndarray, specificity: np.ndarray | float
) -> np.ndarray:
    """f64[len(HEADS), maps]; nan where a number does not exist."""
    target = one.target
    small = pointing.Target(*pointing.shrunk(one.mask, one.looked.geometry, _SIDE), target.grid)
    on_image, null = maps.sum((1, 2)), np.full(len(maps), np.nan)
    if one.looked.null is not None:
        slot = np.asarray(one.looked.null, np.float64)
        null = np.concatenate([slot.ravel(), slot.mean(1), [slot.mean()]])
    return np.stack(
        [
            on_image,
            null,
            on_image * energy,
            energy,
            [target.hit(m) for m in maps],
            [np.nan if (found := target.auroc(m)) is None else found for m in maps],
            [small.iou_half(m) for m in maps],
            [pointing.entropy(m) for m in maps],
            [divide(m.max(), m.sum()) for m in maps],
            np.broadcast_to(specificity, on_image.shape),
        ]
    )


def _kept(example: Example, one: Seen, number: int) -> dict[str, Any]:
    return {
        "image": str(example.image),
        "phrase": one.phrase,
        "question": presence_question(one.phrase, True),
        "map": one.mean.tolist(),
        "geometry": asdict(one.looked.geometry),
        "number": number,
    }
