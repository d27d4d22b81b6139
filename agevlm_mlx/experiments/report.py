"""OUT/report/: the table, the figures, and every number of every run, of what is there."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import config
from ..atomic import write_text
from ..errors import UserError
from ..evaluation import files
from ..evaluation.machine import machine, versions
from . import figures, parameters, tables
from .plan import Cell, Plan
from .results import Results, numbers
from .state import State
from .tuning import tuned


def write(plan: Plan, state: State) -> str:
    """Write the report; what a terminal is told of it."""
    trials = plan.trials()
    found = tuned(plan, state, trials)
    cells = plan.cells({arm: one.best for arm, one in found.items()})
    results, sizes = Results(plan), parameters.counts(cells)
    pairs = tables.Pairs(results)
    listed = tables.compared(plan, pairs, cells)
    runs = [*trials, *plan.queue(cells)]
    folder = files.make_folder(plan.out / "report")
    files.write_json(
        folder / "results.json",
        {
            "experiment": config.to_dict(plan.experiment),
            "machine": machine(),
            "versions": versions(),
            "parameters": {"/".join(key): value for key, value in sizes.items()},
            "tuning": {arm: {"best": t.best, "values": t.values} for arm, t in found.items()},
            "runs": {run.name: numbers(results, run) for run in runs if state.trained(run)},
            "differences": [
                {
                    **{key: value for key, value in vars(one).items() if key != "found"},
                    "numbers": {
                        name: {"first": d.first, "second": d.second, "interval": d.interval}
                        for name, d in one.found.items()
                    },
                }
                for one in listed
            ],
        },
    )
    write_text(folder / "table.md", tables.page(plan, results, cells, found, sizes, pairs, listed))
    written = [folder / "table.md", folder / "results.json"]
    try:
        written += _draw(plan, results, cells, listed, folder)
    except UserError as error:  # no matplotlib: the numbers are there all the same
        return f"written: {', '.join(map(str, written))}\nno figures: {error}"
    return f"written: {folder}/{{{', '.join(path.name for path in written)}}}"


def _draw(
    plan: Plan,
    results: Results,
    cells: Sequence[Cell],
    listed: Sequence[tables.Compared],
    folder: Path,
) -> Iterator[Path]:
    """Every figure for which there is something; their files."""
    for entry in plan.experiment.runs:
        mine = [cell for cell in cells if cell.entry == entry.name]
        own = [one for one in listed if one.entry == entry.name]
        for test in entry.tests:
            path, title = folder / f"sizes-{entry.name}-{test}.png", f"{entry.name}: {test}"
            if figures.sizes(results, entry, mine, test, path, title):
                yield path
            path = folder / f"differences-{entry.name}-{test}.png"
            if figures.forest([one for one in own if one.test == test], path, title):
                yield path
        for name, group in tables.groups(entry, mine):
            if len(group) > figures.MOST:  # the table and the differences say it
                continue
            stem = "-".join([entry.name, *name.replace(",", "").split()])
            title = ": ".join(filter(None, (entry.name, name)))
            path = folder / f"curves-{stem}.png"
            if figures.curves(results, group, path, title):
                yield path
            # The same scenes in the other variations say little more.
            first = group[0].vary == next(iter(entry.vary))
            for test in entry.tests[:2] if first else ():
                title = ": ".join(filter(None, (entry.name, name, test)))
                path = folder / f"similarity-{stem}-{test}.png"
                if figures.similarity(results, group, test, path, title):
                    yield path
                path = folder / f"maps-{stem}-{test}.png"
                if figures.maps(plan, results, group, test, path, title):
                    yield path
