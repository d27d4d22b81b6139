"""The figures of an experiment, drawn by matplotlib as PNG for a column of 900 pixels.

matplotlib (``agevlm-mlx[analyze]``) is imported only when something is drawn.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import write_file
from ..curves import STYLE
from ..errors import UserError
from ..evaluation.answers import Row, read_rows
from ..training.log import metrics_rows
from .plan import Cell, Plan, RunsSpec
from .results import BY_NAME, HEADLINE, Results, headline
from .tables import Compared, column_names

#: Inches and dots of a figure: 1800 pixels, shown at 900 on a page.
_WIDTH, _DPI = 9.0, 200
#: Of arms or variations: Okabe and Ito's, which colour-blind eyes tell apart, then greys.
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#000000",
    "#7f7f7f", "#bcbd22", "#9467bd", "#c49c94",
)  # fmt: skip
#: More arms or variations side by side cannot be told apart.
MOST = len(_COLOURS)
_KINDS = {
    "its own caption": "#0072b2",
    "another picture's": "#8a8f98",
    "a noun exchanged": "#d55e00",
}
#: Numbers of the validation rows, and the titles of their panels.
_CURVES = {
    "val_lm": "validation loss, nats a token",
    "val_answers": "validation answers right",
    "val_pointing": "pointing, share of peaks",
}


def curves(results: Results, cells: Sequence[Cell], path: Path, title: str) -> bool:
    """Validation over steps and over seconds of training: mean and range over seeds, by arm.

    False, and no figure, where there is nothing to draw; so of all functions here.
    """
    names = column_names(cells)
    read = [[_validations(results, run.name) for run in cell.runs] for cell in cells]
    shown = [k for k in _CURVES if any(k in one for runs in read for one in runs)]
    if not shown:
        return False
    with _figure(path, 2 * 2.3 + 0.7) as figure:
        grid = figure.subplots(2, len(shown), squeeze=False)
        for row, unit in enumerate(("steps", "seconds of training")):
            for column, key in enumerate(shown):
                axes = grid[row][column]
                for n, (name, runs) in enumerate(zip(names, read, strict=True)):
                    _band(axes, [one[key] for one in runs if key in one], row, name, _COLOURS[n])
                axes.set_xlabel(unit)
                axes.set_title(_CURVES[key] if row == 0 else "")
                axes.margins(x=0.02)
        _legend(figure, grid[0][0], title)
    return True


def _validations(results: Results, run: str) -> dict[str, np.ndarray]:
    """Number -> f64[n 3] of a run: step, seconds of training until then, value."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    path, seconds = results.plan.run_folder(run) / "metrics.jsonl", 0.0
    for row in metrics_rows(path) if path.is_file() else ():
        seconds += row.get("seconds") or 0.0
        for key in _CURVES:
            if isinstance(row.get(key), int | float):
                found.setdefault(key, []).append((row["step"], seconds, row[key]))
    return {key: np.array(rows) for key, rows in found.items()}


def _band(axes: Any, runs: Sequence[np.ndarray], by: int, name: str, colour: str) -> None:
    """The mean line of runs f64[n 3] and their range, as far as all of them reach."""
    if not runs:
        return
    least = min(map(len, runs))
    table = np.stack([one[:least] for one in runs])
    x, y = table[:, :, by].mean(0), table[:, :, 2]
    axes.plot(x, y.mean(0), color=colour, label=name)
    axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def sizes(
    results: Results, entry: RunsSpec, cells: Sequence[Cell], test: str, path: Path, title: str
) -> bool:
    """Numbers against the pictures trained on: a line an arm, longer training dashed."""
    names = [*HEADLINE[:3], "text.chair_i"]
    there = [cell for cell in cells if results.judged(cell.runs, test)]
    images = sorted({_images(cell) for cell in there if _images(cell)})
    if len(images) < 2:
        return False
    with _figure(path, 2 * 2.4 + 0.7) as figure:
        grid = figure.subplots(2, 2)
        for axes, name in zip(grid.flat, names, strict=True):
            for n, arm in enumerate(entry.arms):
                for style, length in zip(("-", "--", ":", "-."), entry.lengths, strict=False):
                    mine = [c for c in cells if (c.arm, c.length) == (arm, length)]
                    label = arm if len(entry.lengths) == 1 else f"{arm}, {length}"
                    look = {"color": _COLOURS[n], "linestyle": style, "label": label}
                    _size_line(results, axes, sorted(mine, key=_images), test, name, **look)
            axes.set_xscale("log")
            axes.set_xticks(images, [f"{n:,}" for n in images])
            axes.set_xticks([], minor=True)
            axes.set_title(BY_NAME[name].label)
            axes.set_xlabel("pictures")
        _legend(figure, grid.flat[0], title)
    return True


def _size_line(
    results: Results, axes: Any, cells: Sequence[Cell], test: str, name: str, **style: Any
) -> None:
    found = [
        (_images(cell), [results.values(run.name, test).get(name) for run in cell.runs])
        for cell in cells
    ]
    points = [(x, np.array([v for v in values if v is not None])) for x, values in found if x]
    points = [(x, values) for x, values in points if len(values)]
    if points:
        x = [one[0] for one in points]
        axes.plot(x, [values.mean() for _, values in points], marker="o", markersize=4, **style)
        for at, values in points:
            axes.plot([at, at], [values.min(), values.max()], color=style["color"], linewidth=1)


def _images(cell: Cell) -> int:
    """Pictures that a cell's runs are trained on; 0 where the recipe does not say."""
    data = cell.runs[0].recipe.data
    return data.images or (data.scenes.n if data.scenes else 0)


def forest(pairs: Sequence[Compared], path: Path, title: str) -> bool:
    """Paired differences with their intervals, a row a pair, a panel a number."""
    names = [name for name in HEADLINE if any(headline(one.found, name) for one in pairs)]
    if not names:
        return False
    with _figure(path, 0.32 * len(pairs) + 1.4, top=0.6) as figure:
        grid = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for column, (axes, name) in enumerate(zip(grid, names, strict=True)):
            axes.axvline(0, color="#8a8f98", linewidth=1)
            for row, one in enumerate(pairs):
                known = headline(one.found, name)
                if known is None:
                    continue
                difference, better = known[0], BY_NAME[name].better
                low, high = difference.interval or (difference.value, difference.value)
                good = low > 0 if better > 0 else high < 0
                bad = high < 0 if better > 0 else low > 0
                colour = "#009e73" if good else "#d55e00" if bad else "#8a8f98"
                axes.plot([low, high], [row, row], color=colour, linewidth=2)
                axes.plot([difference.value], [row], "o", color=colour, markersize=5)
            axes.set_title(textwrap.fill(BY_NAME[name].label, 12), pad=4, fontsize=8)
            axes.set_yticks(range(len(pairs)), [_pair(one) for one in pairs])
            axes.set_ylim(len(pairs) - 0.5, -0.5)
            axes.tick_params(axis="x", labelsize=7)
            axes.tick_params(axis="y", length=0, labelleft=column == 0)
            axes.xaxis.set_major_locator(_few_ticks())
        note = "green: the first is better, red: worse, grey: not told apart (95 % intervals)"
        _heading(figure, title, note)
    return True


def _pair(one: Compared) -> str:
    where = [one.vary if one.vary not in ("", "base") else "", one.length]
    told = ", ".join(part for part in where if part and part != "1x")
    return f"{one.first} - {one.second}" + (f" ({told})" if told else "")


def similarity(results: Results, cells: Sequence[Cell], test: str, path: Path, title: str) -> bool:
    """How likely the true, another picture's and the hard caption are: one panel an arm."""
    shown = [(n, c) for n, c in zip(column_names(cells), cells, strict=True)
             if results.judged(c.runs, test)]  # fmt: skip
    tables = {name: _log_p(results, cell, test) for name, cell in shown}
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        return False
    every = np.concatenate([table.ravel() for table in tables.values()])
    low, high = np.nanpercentile(every, [0.5, 100])
    columns = min(4, len(tables))
    rows = -(-len(tables) // columns)
    with _figure(path, 1.9 * rows + 0.8) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for n, axes in enumerate(grid.flat):
            if n >= len(tables):
                axes.set_visible(False)
                continue
            name, table = list(tables.items())[n]
            for (label, colour), values in zip(_KINDS.items(), table.T, strict=True):
                values = values[np.isfinite(values)]
                axes.hist(values, np.linspace(low, high, 40), density=True, color=colour,
                          alpha=0.25)  # fmt: skip
                axes.hist(values, np.linspace(low, high, 40), density=True, color=colour,
                          histtype="step", linewidth=1.4, label=label)  # fmt: skip
            cell = dict(shown)[name]
            hard = [results.values(r.name, test).get("logits.matching_auroc_hard")
                    for r in results.judged(cell.runs, test)]  # fmt: skip
            known = [value for value in hard if value is not None]
            told = f"{name}\nhard AUROC {np.mean(known):.3f}" if known else name
            axes.set_title(told, fontsize=9)
            axes.set_yticks([])
            if n + columns >= len(tables):
                axes.tick_params(labelbottom=True)
        figure.supxlabel("log p of a caption's token, nats", fontsize=9, color="#5f6368")
        _legend(figure, grid[0][0], title)
    return True


def _log_p(results: Results, cell: Cell, test: str) -> np.ndarray:
    """f64[n 3] of all seeds: of the true, another and the hard caption, nan without one."""
    found = []
    for run in results.judged(cell.runs, test):
        for row in read_rows(results.plan.result(test, run.name).with_suffix(".jsonl")):
            if row["kind"] == "likelihood" and len(row.get("scores", ())) in (2, 3):
                found.append([*row["scores"], np.nan][:3])
    return np.array(found, np.float64).reshape(-1, 3)


def maps(
    plan: Plan, results: Results, cells: Sequence[Cell], test: str, path: Path, title: str
) -> bool:
    """The same scenes and nouns, and where each arm looks: its first seed, a column an arm."""
    from ..config import read_json
    from ..data.image import Preprocessor
    from ..evaluation import gallery
    from ..evaluation.scene_folder import read_scene_folder

    rows: dict[str, list[Row]] = {}
    geometry: dict[str, tuple[Preprocessor, tuple[int, int]]] = {}
    for name, cell in zip(column_names(cells), cells, strict=True):
        judged = results.judged(cell.runs[:1], test)
        if not judged:
            continue
        result = plan.result(test, judged[0].name)
        source = plan.run_folder(judged[0].name) / "preprocessor_config.json"
        grid = tuple(read_json(result)["model"]["grid"])
        rows[name] = read_rows(result.with_suffix(".jsonl"))
        geometry[name] = Preprocessor.from_dict(read_json(source), str(source)), grid
    if not rows:
        return False
    cards = gallery.cards(read_scene_folder(plan.test_folder(test)).items, rows, geometry, 5)
    if not cards:
        return False
    columns = len(rows) + 1
    side = min(_WIDTH / columns, 1.8)
    with _figure(path, (side + 0.25) * len(cards) + 1.1, 0.6, side * columns) as figure:
        grid = figure.subplots(len(cards), columns, squeeze=False)
        for row, card in enumerate(cards):
            shown = {"": card.picture, **card.overlays}
            for axes, (name, picture) in zip(grid[row], shown.items(), strict=True):
                axes.imshow(np.asarray(picture))
                axes.axis("off")
                told = f"{card.energy[name]:.0%}" if name else card.noun
                axes.text(0.5, -0.04, told, ha="center", va="top", transform=axes.transAxes)
                if row == 0:
                    axes.set_title(textwrap.fill(name, 12), loc="center", fontsize=9)
        _heading(figure, title, "asked for the noun; %: of the attention on the thing")
    return True


# --- matplotlib ------------------------------------------------------------------------------


@contextmanager
def _figure(path: Path, height: float, top: float = 0.55, width: float = _WIDTH) -> Iterator[Any]:
    """A figure of `height` inches, its first `top` inches for the heading, written at the end."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install 'agevlm-mlx[analyze]'") from None
    with rc_context({**STYLE, "text.parse_math": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        # Pyright does not know which engine "constrained" is.
        engine: Any = figure.get_layout_engine()
        engine.set(rect=(0, 0, 1, 1 - top / height))
        yield figure
        write_file(path, lambda to: figure.savefig(to, dpi=_DPI, format="png"))


def _heading(figure: Any, title: str, note: str = "") -> None:
    height = figure.get_size_inches()[1]
    at = {"x": 0.01, "ha": "left", "va": "top"}
    figure.text(y=1 - 0.1 / height, s=title, fontsize=12, fontweight="bold", **at)
    figure.text(y=1 - 0.36 / height, s=note, fontsize=9, color="#5f6368", **at)


def _legend(figure: Any, axes: Any, title: str) -> None:
    """The heading, and what the colours are, below it."""
    _heading(figure, title)
    handles, labels = axes.get_legend_handles_labels()
    height = figure.get_size_inches()[1]
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.0, 1 - 0.3 / height),
        ncols=min(len(labels), 8), columnspacing=1.2, handlelength=2.6,
    )  # fmt: skip


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(2, prune="both")
