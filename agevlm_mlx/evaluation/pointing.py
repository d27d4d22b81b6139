"""An attention map against an object's mask: does a look land on what it is about?

Pure numbers, no model. Each is checked against a table worked out by hand in
``tests/evaluation/test_pointing.py``. What the model does not see (what a crop removed) is left
out of the mask. Attention on padding is attention on nothing: it counts against the energy, while
the baselines (even attention, a centred Gaussian) know where the picture is.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data.image import Geometry
from .metrics import auroc, divide, energy_in_mask, pointing_hit
from .overlay import peak_point

#: TorchRay's tolerance of the pointing game: 15 pixels where the shorter side has 224.
TOLERANCE = 15 / 224
#: Standard deviation of the centred Gaussian, in sides of the picture.
CENTRE_SIGMA = 0.25


def measures(
    attention: np.ndarray, mask: np.ndarray, geometry: Geometry, null: np.ndarray | None = None
) -> dict[str, Any]:
    """Numbers of the mean map of `attention` f32[L N Gh Gw] over layers and heads, as JSON.

    mask: bool[h w], the object's pixels in the picture. null: f32[L N], the null slot's share.
    ``{}`` for a mask that covers nothing of what the model sees.

    peak: [x, y] px, the centre of the strongest cell (outside the picture if in the padding).
    hit: the peak is inside the mask; near: or nearer than `TOLERANCE` (TorchRay's rule).
    energy: share of the image's attention inside the mask; uniform: the same of even attention
    over the picture, that is, the mask's share of it; centre: the same of a centred Gaussian;
    centre_hit: the middle of the picture is inside the mask; ideal_hit: the centre of the cell that
    the mask covers most is (small and hollow things may miss it). gain: energy / uniform, 1 is no
    better than even; nepg: (energy - uniform) / (1 - uniform), 0 is no better than even, 1 is all
    (None when the mask is the whole picture). auroc: of cells at least half in the mask against
    all others (None when there are no others). iou_half: IoU of the mask and {map >= half its
    maximum}; best_iou: the same with the best threshold for this very mask, an upper bound. nss:
    mean over the mask of the z-scored map. These three are of the map over the picture, bilinear
    between cells. entropy: of the image's attention, over that of even attention; sink: share
    of the top cell; on_image: of all attention, the share on the image; null (absent without a
    slot): on the null slot. hit_half_heads, energy_half_heads: of the first half of the heads,
    the guided ones in our recipes.
    """
    heads = attention.shape[1]
    target = Target(mask, geometry, (attention.shape[2], attention.shape[3]))
    if not target.visible:
        return {}
    mean = attention.mean((0, 1), dtype=np.float64)
    half = attention[:, : max(1, heads // 2)].mean((0, 1), dtype=np.float64)
    peak, energy = peak_point(mean, geometry), target.energy(mean)
    return {
        "peak": list(peak),
        "hit": target.hit(mean),
        "near": pointing_hit(*peak, mask, TOLERANCE * min(mask.shape)),
        "energy": energy,
        "uniform": target.uniform,
        "gain": target.gain(energy),
        "nepg": target.nepg(energy),
        "auroc": target.auroc(mean),
        "iou_half": target.iou_half(mean),
        "best_iou": target.best_iou(mean),
        "nss": target.nss(mean),
        "entropy": entropy(mean),
        "sink": divide(mean.max(), mean.sum()),
        "on_image": float(mean.sum()),
        "hit_half_heads": target.hit(half),
        "energy_half_heads": target.energy(half),
        "centre": target.centre,
        "centre_hit": target.centre_hit,
        "ideal_hit": target.hit(target.coverage),
        **({} if null is None else {"null": float(np.mean(null))}),
    }


def entropy(attention: np.ndarray) -> float:
    """Of a map f[Gh Gw], normalised to sum to 1, over that of an even one: 0..1. A map without
    any attention says nothing of a place, as an even one."""
    a = np.asarray(attention, np.float64).ravel()
    if len(a) < 2 or not a.sum() > 0:
        return 1.0
    p = a[a > 0] / a.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(a)))


@dataclass(frozen=True, eq=False)
class Target:
    """A mask bool[h w] as maps f[Gh Gw] of that grid are compared with it."""

    mask: np.ndarray
    geometry: Geometry
    grid: tuple[int, int]

    @cached_property
    def coverage(self) -> np.ndarray:
        """f64[Gh Gw]: the share of each cell that the mask covers."""
        return self._on_grid(self.mask)

    @cached_property
    def shown(self) -> np.ndarray:
        """f64[Gh Gw]: the share of each cell that the picture covers; 0 is padding."""
        return self._on_grid(np.ones_like(self.mask))

    def _on_grid(self, mask: np.ndarray) -> np.ndarray:
        return self.geometry.mask_to_grid(mask, self.grid).reshape(self.grid).astype(np.float64)

    @cached_property
    def seen(self) -> tuple[slice, slice]:
        """Rows and columns of the pixels whose centres the model sees; a crop removes some."""
        (x0, y0), (x1, y1) = self.geometry.to_source(
            np.array([[0, 0], [self.geometry.image_size, self.geometry.image_size]])
        )
        first = [max(int(np.ceil(v - 0.5)), 0) for v in (y0, x0)]
        rows, columns = (
            slice(low, max(int(np.ceil(v - 0.5)), low))
            for low, v in zip(first, (y1, x1), strict=True)
        )
        return rows, columns

    @cached_property
    def visible(self) -> bool:
        """Whether the model sees any of the object."""
        return bool(self.mask[self.seen].any()) and bool(self.coverage.any())

    @cached_property
    def uniform(self) -> float:
        """The energy of even attention over the picture."""
        return divide(self.coverage.sum(), self.shown.sum())

    @cached_property
    def centre(self) -> float:
        """The energy of a Gaussian in the middle of the picture, `CENTRE_SIGMA` of each side."""
        weights = self.gaussian
        return divide((weights * self.coverage).sum(), (weights * self.shown).sum())

    @cached_property
    def gaussian(self) -> np.ndarray:
        """f64[Gh Gw]: the density of that Gaussian at the cells' centres, 1 in the middle."""
        g, (Gh, Gw) = self.geometry, self.grid
        side = g.image_size
        x = ((np.arange(Gw) + 0.5) / Gw * side - g.offset_x) / (g.width * g.scale_x) - 0.5
        y = ((np.arange(Gh) + 0.5) / Gh * side - g.offset_y) / (g.height * g.scale_y) - 0.5
        return np.exp(-(y[:, None] ** 2 + x[None] ** 2) / (2 * CENTRE_SIGMA**2))

    @cached_property
    def centre_hit(self) -> bool:
        """Whether the middle of the picture is inside the mask."""
        height, width = self.mask.shape
        return pointing_hit(width / 2, height / 2, self.mask)

    @cached_property
    def half_covered(self) -> np.ndarray:
        """bool[Gh Gw]: the cells at least half of whose picture the mask covers; if there is none,
        those that it covers most."""
        share = self.coverage / np.maximum(self.shown, 1e-9)
        return (share >= min(0.5, float(share.max()))) & (self.shown > 0)

    def hit(self, attention: np.ndarray) -> bool:
        """Pointing game: the centre of the strongest cell is inside the mask."""
        return pointing_hit(*peak_point(attention, self.geometry), self.mask)

    def energy(self, attention: np.ndarray) -> float:
        """The share of the image's attention inside the mask."""
        return energy_in_mask(attention, self.coverage)

    def gain(self, energy: float) -> float:
        """An energy over that of even attention."""
        return divide(energy, self.uniform)

    def nepg(self, energy: float) -> float | None:
        """An energy on a scale from even attention (0) to all of it (1)."""
        return (energy - self.uniform) / (1 - self.uniform) if self.uniform < 1 else None

    def auroc(self, attention: np.ndarray) -> float | None:
        """P(a cell in the mask has more attention than one outside), a tie counting one half."""
        inside, outside = self.half_covered, ~self.half_covered & (self.shown > 0)
        return auroc(attention[inside], attention[outside]) if outside.any() else None

    def iou_half(self, attention: np.ndarray) -> float:
        """IoU of the mask and the pixels of at least half the map's maximum."""
        over, mask = self._pixels(attention)
        lit = (over >= over.max() / 2) & (over > 0)
        return divide((lit & mask).sum(), (lit | mask).sum())

    def best_iou(self, attention: np.ndarray) -> float:
        """The highest IoU that any threshold gives."""
        over, mask = (v.ravel() for v in self._pixels(attention))
        order = np.argsort(-over)
        inside, values = np.cumsum(mask[order]), over[order]
        last = np.append(values[1:] != values[:-1], True)  # equal pixels are lit together
        lit = np.arange(1, len(values) + 1)[last]
        return float((inside[last] / (lit + mask.sum() - inside[last])).max())

    def nss(self, attention: np.ndarray) -> float:
        """Normalised scanpath saliency: the mean z-score inside the mask; 0 for an even map."""
        over, mask = self._pixels(attention)
        return divide(over[mask].mean() - over.mean(), over.std())

    def _pixels(self, attention: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The map f64[h' w'] and the mask bool[h' w'] over the pixels that the model sees."""
        # Scaled and rounded: where an even map differs in its last bits, that means nothing.
        scaled = attention / max(float(attention.max()), 1e-30)
        over = self.geometry.grid_to_source(scaled)[self.seen].astype(np.float64).round(6)
        return over, self.mask[self.seen]


def shrunk(mask: np.ndarray, geometry: Geometry, side: int) -> tuple[np.ndarray, Geometry]:
    """A mask, and its picture's geometry, at most `side` pixels long, for maps that are coarse
    anyway: each new pixel is the old one in its middle."""
    step = max(geometry.width, geometry.height) / side
    if step <= 1:
        return mask, geometry
    new = [max(1, round(length / step)) for length in mask.shape]
    rows, columns = (
        ((np.arange(n) + 0.5) / n * length).astype(int)
        for n, length in zip(new, mask.shape, strict=True)
    )
    height, width = new
    scales = geometry.scale_x * geometry.width / width, geometry.scale_y * geometry.height / height
    place = (geometry.image_size, *scales, geometry.offset_x, geometry.offset_y)
    return mask[np.ix_(rows, columns)], Geometry(width, height, *place)
