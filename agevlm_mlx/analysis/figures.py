"""The report's figures: drawn by matplotlib as SVG whose colours are the page's own.

matplotlib (``agevlm-mlx[analyze]``) is imported only here, and only when a figure is drawn. It is
given stand-in colours, which become CSS variables in the SVG, so that one figure serves light and
dark. `Model` i is drawn in ``--m{i}``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import numpy as np

from ..errors import UserError, one_line

#: How many models have a colour of their own.
MODELS = 6
#: Stand-in colour -> the CSS variable it becomes.
_INK, _QUIET, _LINE = "#010101", "#020202", "#030303"
_KINDS = {"matching": "#040404", "mismatching": "#050505", "hard": "#060606"}
_MODELS = [f"#0707{n:02x}" for n in range(MODELS)]
_SHADES = [f"#0808{n:02x}" for n in range(4)]
_VARIABLES = {
    _INK: "--ink",
    _QUIET: "--quiet",
    _LINE: "--line",
    **{colour: f"--{kind}" for kind, colour in _KINDS.items()},
    **{colour: f"--m{n}" for n, colour in enumerate(_MODELS)},
    **{colour: f"--shade{n}" for n, colour in enumerate(_SHADES)},
}
KIND_NAMES = {
    "matching": "its own caption",
    "mismatching": "another picture's caption",
    "hard": "one noun exchanged",
}
_WIDTH, _COLUMN = 10.2, 2.9  # inches, of a figure and at least of a column
#: Pixels of an inch below which a figure is not shrunk; the page is 10.2 x 100 pixels wide.
_LEAST = 65
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a folder's name is a $
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.labelcolor": _QUIET,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _QUIET,
    "ytick.labelcolor": _QUIET,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "image.cmap": "viridis",
}

#: Name of a model and the number of its colour.
Title = tuple[str, int]
#: value, low, high; the interval may be missing.
Number = tuple[float, float | None, float | None]


def require() -> None:
    """``UserError`` without matplotlib: said before minutes of work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the report's figures need matplotlib: pip install 'agevlm-mlx[analyze]' "
            f"({one_line(error)})"
        ) from None


@contextmanager
def _figure(rows: int, columns: int, height: float, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure of the page's width, or wider for many columns, and its axes [rows columns]."""
    require()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.05)
        figure = Figure(figsize=(max(_WIDTH, _COLUMN * columns), height), layout=layout)
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an element of the page; `name` keeps its ids apart from other figures'."""
    from matplotlib import rc_context

    out = StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None}, dpi=150)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # A style in a figure is one of the whole page: what it says, the page says of figures.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    # Only what is referred to keeps its id: figure_1 would stand in the page many times.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"font-family: [^;\"]+;?|'DejaVu Sans'[^;\"]*sans-serif", "", text)
    # In tags alone: a model may be called like one of the colours.
    colours = "|".join(_VARIABLES)
    text = re.sub(
        r"<[^>]*>", lambda tag: re.sub(colours, lambda m: f"var({_VARIABLES[m[0]]})", tag[0]), text
    )
    least = f"min-width: {_LEAST * figure.get_figwidth():.0f}px"
    tag = f'<svg class="plot" style="{least}" role="img" aria-label="{escape(label)}" '
    return text.replace("<svg ", tag, 1)


# --- matching --------------------------------------------------------------------------------


def distributions(
    name: str,
    titles: Sequence[Title],
    rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
) -> str:
    """Rows of (what the score is, per model a ``separation.distribution``), a column a model."""
    with _figure(len(rows), len(titles), 0.5 + 1.75 * len(rows), sharex="row") as (figure, axes):
        for r, (label, columns) in enumerate(rows):
            for c, table in enumerate(columns):
                ax = axes[r, c]
                edges = np.array(table["edges"])
                for kind, shares in table["shares"].items():
                    colour = _KINDS[kind]
                    if kind == "hard":
                        ax.stairs(shares, edges, color=colour, linewidth=1.4, linestyle=(0, (3, 2)))
                    else:
                        ax.stairs(shares, edges, color=colour, fill=True, alpha=0.28)
                        ax.stairs(shares, edges, color=colour, linewidth=1.4)
                ax.set_yticks([])
                ax.spines["left"].set_visible(False)
                ax.set_ylim(bottom=0)
                ax.set_xlabel(label)
                if r == 0:
                    _title(ax, titles[c])
        _legend(figure, [(KIND_NAMES[kind], colour, kind) for kind, colour in _KINDS.items()])
        return _svg(figure, name, "Distributions of scores of matching and mismatching pairs")


def by_layer(
    name: str,
    panels: Sequence[tuple[str, Sequence[Sequence[Number]]]],
    models: Sequence[Title],
    label: str,
    chance: float,
) -> str:
    """A panel each with one line a model, over the layers; bands are the intervals."""
    with _figure(1, len(panels), 2.9, sharey=True) as (figure, axes):
        for ax, (title, lines) in zip(axes[0], panels, strict=True):
            ax.axhline(chance, color=_QUIET, linewidth=1, linestyle=(0, (2, 3)))
            for (_, n), line in zip(models, lines, strict=True):
                at = np.arange(len(line))
                values = np.array([[np.nan if v is None else v for v in one] for one in line])
                ax.fill_between(at, values[:, 1], values[:, 2], color=_MODELS[n], alpha=0.16, lw=0)
                marker = "os^Dvx"[n]
                ax.plot(at, values[:, 0], color=_MODELS[n], marker=marker, markersize=4)
            ax.set_title(title)
            ax.set_ylim(0, 1.02)
            ax.grid(axis="y")
            ax.set_axisbelow(True)
            _layer_axis(ax, max(len(line) for line in lines))
        axes[0, 0].set_ylabel(label)
        _legend(figure, [(name, _MODELS[n], "line") for name, n in models])
        return _svg(figure, name, f"{label} by layer")


def bands(
    name: str, titles: Sequence[Title], rows: Sequence[tuple[str, Sequence[Sequence[Any]]]]
) -> str:
    """Rows of (label, per model a distribution for each layer): medians and 5-95 % bands of
    matching and mismatching pairs."""
    with _figure(len(rows), len(titles), 0.5 + 2.1 * len(rows)) as (figure, axes):
        for r, (label, columns) in enumerate(rows):
            for c, layers in enumerate(columns):
                ax, at = axes[r, c], np.arange(len(layers))
                for kind in ("mismatching", "matching"):
                    known = [layer["quantiles"].get(kind, [np.nan] * 5) for layer in layers]
                    low, _, middle, _, high = np.array(known, float).T
                    ax.fill_between(at, low, high, color=_KINDS[kind], alpha=0.2, lw=0)
                    ax.plot(at, middle, color=_KINDS[kind], marker="o", markersize=3)
                ax.axhline(0, color=_LINE, linewidth=0.8)
                ax.set_ylabel(label if c == 0 else "")
                _layer_axis(ax, len(layers))
                if r == 0:
                    _title(ax, titles[c])
        kinds = ("matching", "mismatching")
        _legend(figure, [(KIND_NAMES[kind], _KINDS[kind], kind) for kind in kinds])
        return _svg(figure, name, "Cosines between text and image states by layer")


def _layer_axis(ax: Any, count: int) -> None:
    """State 0 is the embedding, state i what layer i - 1 hands on."""
    step = max(1, -(-count // 10))
    ax.set_xticks(
        range(0, count, step), ["emb." if i == 0 else str(i) for i in range(0, count, step)]
    )
    ax.set_xlabel("after layer")


# --- attention -------------------------------------------------------------------------------


def heat_maps(
    name: str,
    titles: Sequence[Title],
    rows: Sequence[tuple[str, Sequence[tuple[Sequence[Any], Sequence[Any] | None]]]],
) -> str:
    """Rows of (measure, per model (layers' numbers, [[heads] * layers] or None)); the models of
    a row share their scale."""
    tallest = max(len(layers) for _, columns in rows for layers, _ in columns)
    height = 0.45 + len(rows) * min(1.1 + 0.2 * tallest, 4.2)
    with _figure(len(rows), len(titles), height) as (figure, axes):
        for r, (label, columns) in enumerate(rows):
            tables = [np.array(table, float) if table else None for _, table in columns]
            known = [table for table in tables if table is not None]
            top = max((float(np.nanmax(t)) for t in known if np.isfinite(t).any()), default=1.0)
            drawn = None
            for c, table in enumerate(tables):
                ax = axes[r, c]
                _title(ax, titles[c], f"\n{label}")
                for spine in ax.spines.values():
                    spine.set_visible(False)
                if table is None:
                    ax.set_axis_off()
                    continue
                drawn = ax.imshow(table, aspect="auto", vmin=0, vmax=top, interpolation="nearest")
                layers = columns[c][0]
                step = max(1, len(layers) // 12)
                ax.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
                heads = max(1, table.shape[1] // 12)
                ax.set_xticks(range(0, table.shape[1], heads))
                ax.tick_params(length=0)
                ax.set_xlabel("head")
                ax.set_ylabel("layer")
            if drawn is not None:
                bar = figure.colorbar(drawn, ax=list(axes[r]), fraction=0.03, pad=0.01)
                bar.outline.set_visible(False)
                bar.ax.tick_params(length=0)
        return _svg(figure, name, "Measures by layer and head")


@dataclass(frozen=True)
class Bar:
    """model: whose colour it has; None for a baseline, in one of the greys `shade`."""

    label: str
    number: Number
    model: int | None
    shade: int = 0


Panel = tuple[str, Sequence[Bar], tuple[float, float] | None]


def bars(name: str, panels: Sequence[Panel]) -> str:
    """Panels (title, horizontal bars, ends of the axis or None for those of the bars), two beside
    each other; lines are the intervals."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len(items) for _, items, _ in panels)
    with _figure(rows, columns, rows * (0.6 + 0.22 * most)) as (figure, axes):
        for ax in axes.ravel()[len(panels) :]:
            ax.set_axis_off()
        for ax, (title, items, ends) in zip(axes.ravel(), panels, strict=False):
            for y, bar in enumerate(items):
                _bar(ax, y, bar)
            ax.set_yticks(range(len(items)), [bar.label for bar in items])
            ax.set_ylim(len(items) - 0.4, -0.6)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.axvline(0, color=_QUIET, linewidth=0.8)
            ax.margins(x=0.12)
            if ends is not None:
                ax.set_xlim(*ends)
            ax.set_title(title)
        return _svg(figure, name, "; ".join(title for title, *_ in panels))


def _bar(ax: Any, y: int, bar: Bar) -> None:
    value, low, high = bar.number
    if not np.isfinite(value):
        return
    colour = _SHADES[bar.shade] if bar.model is None else _MODELS[bar.model]
    ax.barh(y, value, color=colour, height=0.66)
    if low is not None and high is not None:
        ax.plot([low, high], [y, y], color=_INK, linewidth=1.1)
    end = max(0.0, *(v for v in bar.number if v is not None))
    text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")
    where = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
    ax.annotate(text, (end, y), fontsize=8, color=_QUIET, **where)


def _title(ax: Any, title: Title, more: str = "") -> None:
    ax.set_title(title[0] + more, color=_MODELS[title[1]])


def _legend(figure: Any, items: Sequence[tuple[str, str, str]]) -> None:
    """Above the figure: (label, colour, kind); a kind of pairs is an area, else a line."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = []
    for label, colour, kind in items:
        if kind in ("matching", "mismatching"):
            handles.append(Patch(facecolor=colour, alpha=0.5, edgecolor=colour, label=label))
        else:
            dash = (0, (3, 2)) if kind == "hard" else "-"
            handles.append(Line2D([], [], color=colour, linestyle=dash, label=label))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
