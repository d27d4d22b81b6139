"""The curves of a training run as one picture, drawn by matplotlib from ``metrics.jsonl``.

matplotlib (``agevlm-mlx[analyze]``) is imported only when they are drawn.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .training.log import metrics_rows

#: Points of a curve: a night has more steps than a picture has columns.
_MOST = 800
_TRAIN, _VALIDATION, _GREY = "#2f6bd8", "#d9730d", "#8a8f98"
#: matplotlib's settings of all pictures of runs.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4c7cc",
    "axes.labelcolor": "#5f6368",
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


class Curve:
    """One number over the steps, in bins of steps that get wider as the run gets longer.

    Takes the same little memory however long the run is.
    """

    def __init__(self, most: int = _MOST):
        self.most, self.width = most, 1
        self._bins: dict[int, np.ndarray] = {}  # [sum, count, lowest, highest]

    def add(self, step: int, value: float) -> None:
        """The value at a step, which is counted from 1."""
        self._merge((step - 1) // self.width, np.array([value, 1.0, value, value]))
        if len(self._bins) > self.most:
            old, self._bins, self.width = self._bins, {}, 2 * self.width
            for place, values in old.items():
                self._merge(place // 2, values)

    def _merge(self, place: int, values: np.ndarray) -> None:
        there = self._bins.get(place)
        if there is not None:
            low, high = min(there[2], values[2]), max(there[3], values[3])
            values = np.array([there[0] + values[0], there[1] + values[1], low, high])
        self._bins[place] = values

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(step in the middle of each bin, mean, lowest, highest), f64 [n] each."""
        places = np.array(sorted(self._bins))
        values = np.stack([self._bins[place] for place in places.tolist()])
        steps = 1 + places * self.width + (self.width - 1) / 2
        return steps, values[:, 0] / values[:, 1], values[:, 2], values[:, 3]


@dataclass(frozen=True)
class Panel:
    """What one set of axes shows."""

    title: str
    unit: str
    #: Names of numbers in the rows, and how the legend calls them.
    curves: dict[str, str]
    log: bool = False
    top: float | None = None


_PANELS = (
    Panel("Next-token loss", "nats a token", {"lm": "training", "val_lm": "validation"}),
    Panel("Attention loss", "mean of guided words", {"attention": "training", "absent": "absent"}),
    Panel("Pointing", "share of peaks on the object", {"val_pointing": "validation"}, top=1),
    Panel("Answers", "share that is right", {"val_answers": "validation"}, top=1),
    Panel("Feature loss", "mean of image tokens", {"features": "training"}),
    Panel("Gradient norm", "L2, before clipping", {"norm": "training"}, log=True),
    Panel("Learning rate", "", {"lr": "training"}),
    Panel("Time of a step", "seconds", {"seconds": "whole step", "waited": "waited for data"}),
)


@dataclass
class _Read:
    curves: dict[str, Curve] = field(default_factory=dict)
    #: Stage -> its first step.
    stages: dict[str, int] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    last: int = 0


def read_curves(metrics: Path) -> _Read:
    """The curves of a ``metrics.jsonl``, read row by row."""
    read = _Read()
    for row in metrics_rows(metrics):
        step = row["step"]
        read.last = max(read.last, step)
        read.stages.setdefault(str(row.get("stage", "")), step)
        if "skipped" in row and len(read.skipped) < _MOST:
            read.skipped.append(step)
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and name != "step" and np.isfinite(value):
                read.curves.setdefault(name, Curve()).add(step, value)
    return read


def draw_curves(metrics: Path, path: Path, title: str, clip: float | None = None) -> None:
    """Draw the curves of `metrics` into the PNG `path`; a line at `clip`, the gradient's limit.

    ``UserError`` without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install 'agevlm-mlx[analyze]'") from None
    read = read_curves(metrics)
    panels = [p for p in _PANELS if any(name in read.curves for name in p.curves)]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        height = 0.5 + 2.35 * rows
        figure = Figure(figsize=(5.4 * columns, height))
        # By hand: matplotlib's own layouts draw everything twice.
        figure.subplots_adjust(
            left=0.35 / columns * 0.4, right=0.985, bottom=0.45 / height, top=1 - 0.78 / height,
            hspace=0.42, wspace=0.2,
        )  # fmt: skip
        text = figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", fontsize=12)
        text.set_parse_math(False)  # a $ in a folder's name is a $
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for n, axes in enumerate(grid.flat):
            if n < len(panels):
                _draw(axes, panels[n], read, clip)
                axes.set_xlabel("step" if n + columns >= len(panels) else "")
                axes.tick_params(labelbottom=n + columns >= len(panels))
            else:
                axes.set_visible(False)
        figure.savefig(path, dpi=120, format="png")


def _draw(axes: Any, panel: Panel, read: _Read, clip: float | None) -> None:
    axes.set_title(panel.title, pad=14)
    axes.set_ylabel(panel.unit)
    highest = []
    for place, (name, label) in enumerate(panel.curves.items()):
        if name not in read.curves:
            continue
        steps, mean, low, high = read.curves[name].points()
        validation = name.startswith("val_")
        colour = _VALIDATION if validation or place else _TRAIN
        if validation:
            axes.plot(steps, mean, "o-", color=colour, markersize=3, label=label, zorder=3)
        elif name == "lr":
            power = math.floor(math.log10(max(mean.max(), 1e-30)))
            mean, high = mean / 10.0**power, high / 10.0**power
            axes.plot(steps, mean, color=colour)
            axes.set_ylabel(f"x 1e{power}")
        else:
            if read.curves[name].width > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            else:
                axes.plot(steps, mean, color=colour, alpha=0.3, linewidth=0.8)
            # A new stage begins anew: nothing is smoothed over its start.
            cuts = np.searchsorted(steps, list(read.stages.values())[1:])
            smooth = np.concatenate([_smooth(part) for part in np.split(mean, cuts)])
            axes.plot(steps, smooth, color=colour, label=label)
        highest.append(high)
    if panel.log and min(map(np.min, highest)) > 0:
        axes.set_yscale("log")
    else:
        # One outlier must not press the rest flat; log axes bear it.
        top = panel.top or 1.15 * max(np.percentile(values, 99) for values in highest)
        axes.set_ylim(0, top or 1)
    if "norm" in panel.curves and clip is not None:
        axes.axhline(clip, color=_GREY, linestyle="--", linewidth=1, label=f"clipped at {clip:g}")
    starts = [*read.stages.values(), read.last + 1]
    for n, (stage, first) in enumerate(read.stages.items()):
        if n:
            axes.axvline(first - 0.5, color=_GREY, linewidth=0.8, linestyle=":")
        if (starts[n + 1] - first) / read.last > 0.016 * len(stage):  # there is room for it
            axes.text(
                first - 0.5, 1.015, f" {stage}", transform=axes.get_xaxis_transform(),
                color=_GREY, fontsize=8, clip_on=False, parse_math=False,
            )  # fmt: skip
    for step in read.skipped:
        axes.axvline(step, color="#c5221f", linewidth=0.8, ymax=0.04)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a fortieth of the curve, narrower at its ends."""
    half = len(values) // 80
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
