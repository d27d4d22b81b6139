"""Line charts as inline SVG, coloured by the page's CSS so that they follow light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 34, 40


@dataclass(frozen=True)
class Line:
    """One curve: `style` is the CSS class that colours it, `points` (x, y)."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """A running mean over `window` points, shorter at the ends, each x kept."""
    if window < 2 or len(points) < 3:
        return list(points)
    values = np.array([y for _, y in points], float)
    total = np.concatenate([[0.0], np.cumsum(values)])
    half = window // 2
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    means = (total[high] - total[low]) / (high - low)
    return [(x, float(m)) for (x, _), m in zip(points, means, strict=True)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    marks: Sequence[tuple[float, str]] = (),
    span: tuple[float, float] | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
    log: bool = False,
) -> str:
    """An SVG of the curves; `marks` are named vertical lines (where a stage begins).

    `span` are the ends of the x axis, `floor` and `ceiling` of the y axis (default: those of the
    points); `log` makes the y axis logarithmic. A chart without any point to draw says so.
    """
    kept = [
        Line(
            line.label,
            line.style,
            [p for p in line.points if np.isfinite(p).all() and (p[1] > 0 or not log)],
        )
        for line in lines
    ]
    kept = [line for line in kept if line.points]
    head = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">'
        f'<text class="title" x="{_LEFT - 40}" y="18">{escape(title)}</text>'
    )
    if not kept:
        middle = f'x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle"'
        return f'{head}<text class="tick" {middle}>not recorded</text></svg>'
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    x0, x1 = span or (min(xs), max(xs))
    x1 = max(x1, x0 + 1e-9)
    low, high = min(ys) if floor is None else floor, max(ys) if ceiling is None else ceiling
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    scale = np.log10 if log else float
    y0, y1 = float(scale(ticks[0])), float(scale(ticks[-1]))

    def sx(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def sy(y: float) -> float:
        share = (min(max(float(scale(y)), y0), y1) - y0) / (y1 - y0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [head]
    for tick in ticks:
        y = sy(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(x0, x1, inside=True):
        parts.append(
            f'<text class="tick" x="{sx(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    last, row = -100.0, 0
    for x, name in marks:
        if x0 <= x <= x1:
            # A short stage leaves no room for its name: the next one goes a line lower.
            row = row + 1 if sx(x) - last < 7 * len(name) + 8 else 0
            last = sx(x)
            parts.append(f'<path class="mark" d="M{last:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
            parts.append(
                f'<text class="stage" x="{last + 3:.1f}" y="{_TOP + 9 + 12 * row}">'
                f"{escape(name)}</text>"
            )
    for line in kept:
        path = " ".join(f"{sx(x):.1f},{sy(y):.1f}" for x, y in line.points)
        if len(line.points) == 1:
            x, y = line.points[0]
            parts.append(
                f'<circle class="dot {line.style}" cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="3"/>'
            )
        else:
            parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
    x = _WIDTH - _RIGHT
    for line in reversed(kept):
        parts.append(
            f'<text class="key {line.style}" x="{x}" y="18" text-anchor="end">'
            f"{escape(line.label)}</text>"
        )
        x -= 9 * len(line.label) + 14
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text></svg>'
    )
    return "".join(parts)


def _ticks(low: float, high: float, inside: bool = False) -> list[float]:
    """Four or so round numbers that span low..high (or lie inside it)."""
    span = max(high - low, 1e-6 * max(abs(high), 1))
    raw = span / 4
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = np.ceil(low / step - 1e-9) if inside else np.floor(low / step + 1e-9)
    last = np.floor(high / step + 1e-9) if inside else np.ceil(high / step - 1e-9)
    last = max(last, first + (not inside))
    return [float(round(n * step, 10)) for n in np.arange(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten around low..high; at least two."""
    powers = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 2)
    ticks = [float(f"{m * 10.0**power:.12g}") for power in powers for m in (1, 2, 5)]
    first = max(n for n, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(n for n, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[first : max(last, first + 1) + 1]
