"""``table.md``: what came out, for every entry and test, good or bad."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..evaluation.compare import Difference
from . import statistics
from .plan import Cell, Plan, RunsSpec
from .results import ANALYSIS, BY_NAME, HEADLINE, METRICS, Metric, Results, headline
from .tuning import Tuned

Sizes = dict[tuple[str, str], tuple[int, int]]


@dataclass(frozen=True)
class Compared:
    """Two cells of an entry on a test: number -> its paired difference, over these seeds."""

    entry: str
    test: str
    first: str
    second: str
    length: str
    #: "" where the two differ in their variation, which is then in `first` and `second`.
    vary: str
    seeds: tuple[int, ...]
    found: dict[str, Difference]


Differences = tuple[tuple[int, ...], dict[str, Difference]]


class Pairs:
    """Paired differences of cells on a test, each computed once."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._known: dict[tuple[str, ...], Differences] = {}

    def __call__(self, a: Cell, b: Cell, test: str) -> Differences:
        """(seeds that both have, number -> its paired difference a - b)."""
        key = (test, *(run.name for cell in (a, b) for run in cell.runs))
        if key not in self._known:
            self._known[key] = self._compute(a, b, test)
        return self._known[key]

    def _compute(self, a: Cell, b: Cell, test: str) -> Differences:
        results = self.results
        there = [{run.seed: run for run in results.judged(cell.runs, test)} for cell in (a, b)]
        seeds = tuple(seed for seed in there[0] if seed in there[1])
        if not seeds:
            return (), {}
        values = [[results.values(of[seed].name, test) for seed in seeds] for of in there]
        drawn = [[results.drawn(of[seed].name, test) for seed in seeds] for of in there]
        shared = set.intersection(*(set(one) for side in (*drawn, *values) for one in side))
        found = {}
        for name in (metric.name for metric in METRICS if metric.name in shared):
            plain = [[one[name] for one in side] for side in values]
            under = [[one[name] for one in side] for side in drawn]
            found[name] = statistics.paired(plain[0], plain[1], under[0], under[1])
        return seeds, found


def compared(plan: Plan, pairs: Pairs, cells: Sequence[Cell]) -> list[Compared]:
    """Every pair that the experiment compares, where both have been judged."""
    found = []
    for entry in plan.experiment.runs:
        mine = {(c.arm, c.vary, c.length): c for c in cells if c.entry == entry.name}
        for test in entry.tests:
            for pair in entry.compare:
                for first, second, vary, length in _sides(entry, pair):
                    a, b = mine.get((*first, length)), mine.get((*second, length))
                    if a is None or b is None:
                        continue
                    seeds, numbers = pairs(a, b, test)
                    if numbers:
                        found.append(
                            Compared(
                                entry.name, test, _name(*first, vary), _name(*second, vary),
                                length, vary, seeds, numbers,
                            )
                        )  # fmt: skip
    return found


def _sides(
    entry: RunsSpec, pair: tuple[str, str]
) -> Iterator[tuple[tuple[str, str], tuple[str, str], str, str]]:
    """((arm, variation), (arm, variation), the variation they share or "", length)."""
    sides = [side.partition("/") for side in pair]
    for length in entry.lengths:
        if sides[0][1]:
            yield (sides[0][0], sides[0][2]), (sides[1][0], sides[1][2]), "", length
        else:
            for vary in entry.vary:
                yield (pair[0], vary), (pair[1], vary), vary, length


def _name(arm: str, vary: str, shared: str) -> str:
    return arm if vary == shared else f"{arm}/{vary}"


# --- the page --------------------------------------------------------------------------------


def page(
    plan: Plan,
    results: Results,
    cells: Sequence[Cell],
    tuned: dict[str, Tuned],
    sizes: Sizes,
    pairs: Pairs,
    listed: Sequence[Compared],
) -> str:
    """table.md. listed: the differences that stand below the numbers."""
    lines = [f"# {plan.name}", ""]
    if plan.experiment.about:
        lines += [plan.experiment.about, ""]
    lines += _about(plan, tuned)
    for entry in plan.experiment.runs:
        mine = [cell for cell in cells if cell.entry == entry.name]
        judged = [test for test in entry.tests if any(results.judged(c.runs, test) for c in mine)]
        lines += ["", f"## {entry.name}"]
        lines += ["", entry.about] if entry.about else []
        if not judged:
            lines += ["", "Nothing has been judged yet."]
        for test in judged:
            lines += _entry(plan, pairs, entry, mine, test, sizes)
            own = [one for one in listed if one.entry == entry.name and one.test == test]
            lines += _differences(own)
        lines += _analysis(plan, results, entry, mine)
    return "\n".join(lines) + "\n"


def _about(plan: Plan, tuned: dict[str, Tuned]) -> Iterator[str]:
    yield "| arm | what it is | overrides of the recipe |"
    yield "|---|---|---|"
    for name, arm in plan.experiment.arms.items():
        yield f"| {name} | {_cell(arm.about)} | {_cell(', '.join(f'`{one}`' for one in arm.set))} |"
    yield ""
    yield "| test | scenes | split, style | seed | what it is |"
    yield "|---|---|---|---|---|"
    for name, test in plan.experiment.tests.items():
        look = f"{test.split}, {test.style}"
        yield f"| {name} | {test.n} | {look} | {test.seed} | {_cell(test.about)} |"
    yield ""
    spec = plan.experiment.tuning
    yield "Every test is asked once, of finished runs; its scenes have no part in training or"
    if spec is None:
        yield "validation. Nothing was tuned: no choice was made on any test."
    else:
        yield f"validation. No choice was made on any of them but `{spec.test}`, which judges"
        yield f"nothing else: the same {len(spec.trials)} trials of every arm, seed {spec.seed}, by"
        numbers = ", ".join(f"`{name}`" for name in spec.metrics)
        yield f"{'the mean of ' if len(spec.metrics) > 1 else ''}{numbers};"
        yield "the best (bold) is used in all runs of the arm."
        yield ""
        yield f"| arm | {' | '.join(spec.trials)} |"
        yield f"|---|{'---:|' * len(spec.trials)}"
        for arm, one in tuned.items():
            values = [
                "-" if t not in one.values else _bold(f"{one.values[t]:.3f}", t == one.best)
                for t in spec.trials
            ]
            yield f"| {arm} | {' | '.join(values)} |"
        yield ""
        yield "Trials: " + "; ".join(f"{n}: {_change(c)}" for n, c in spec.trials.items()) + "."
    yield ""
    yield "Numbers are the mean over seeds +- the standard deviation of a sample. Bold: better than"
    yield "each other column by the paired interval. Seconds are those of training steps, without"
    yield "validation. Differences are first - second with their 95 % interval by bootstrap over"
    yield "scenes and seeds (the same draws for both); with three seeds its part of the seeds is"
    yield "coarse. A star marks an interval that leaves out zero; nothing is corrected for the"
    yield "number of comparisons."


def _entry(
    plan: Plan, pairs: Pairs, entry: RunsSpec, cells: Sequence[Cell], test: str, sizes: Sizes
) -> Iterator[str]:
    results = pairs.results
    scenes = plan.experiment.tests[test]
    yield ""
    yield f"### {entry.name}: {test}"
    yield ""
    yield (
        f"{scenes.n} scenes, split {scenes.split}, style {scenes.style}, seed {scenes.seed}"
        + (f": {scenes.about}." if scenes.about else ".")
    )
    for title, group in groups(entry, cells):
        there = [cell for cell in group if results.judged(cell.runs, test)]
        if not there:
            continue
        columns = column_names(there)
        yield ""
        if title:
            yield f"**{title}**"
            yield ""
        yield f"| | {' | '.join(columns)} |"
        yield f"|---|{'---:|' * len(columns)}"
        for metric in METRICS:
            if not any(_values(results, cell, test, metric.name) for cell in there):
                continue
            best = _best(pairs, there, test, metric)
            values = [
                _bold(_mean(_values(results, cell, test, metric.name), metric.digits), cell is best)
                for cell in there
            ]
            yield f"| {metric.label} | {' | '.join(values)} |"
        seconds = [
            _mean([results.training(run.name)[1] for run in results.judged(cell.runs, test)], 0)
            for cell in there
        ]
        yield f"| training, s | {' | '.join(seconds)} |"
        yield f"| parameters | {' | '.join(f'{sizes[c.arm, c.vary][0]:,}' for c in there)} |"
        seeds = [_seeds([run.seed for run in results.judged(c.runs, test)]) for c in there]
        yield f"| seeds | {' | '.join(seeds)} |"


def groups(entry: RunsSpec, cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """(title, cells that stand side by side): all arms of a variation and length, or, of an entry
    with one arm, all its variations of a length."""
    for length in entry.lengths:
        own = f"training {length}" if len(entry.lengths) > 1 else ""
        if len(entry.arms) == 1:
            yield own, [cell for cell in cells if cell.length == length]
            continue
        for vary in entry.vary:
            title = ", ".join(filter(None, (vary if len(entry.vary) > 1 else "", own)))
            yield title, [c for c in cells if (c.length, c.vary) == (length, vary)]


def column_names(cells: Sequence[Cell]) -> list[str]:
    """What tells these cells apart: the arm, or the variation."""
    arms = {cell.arm for cell in cells}
    varied = {cell.vary for cell in cells}
    return [
        cell.vary if len(arms) == 1 and len(varied) > 1
        else cell.arm if len(varied) == 1
        else f"{cell.arm}/{cell.vary}"
        for cell in cells
    ]  # fmt: skip


def _values(results: Results, cell: Cell, test: str, name: str) -> list[float]:
    found = [results.values(run.name, test) for run in results.judged(cell.runs, test)]
    return [one[name] for one in found if name in one]


def _best(pairs: Pairs, cells: Sequence[Cell], test: str, metric: Metric) -> Cell | None:
    """The cell whose number is surely better than that of each other one; None without any."""
    means = {
        id(cell): metric.better * statistics.spread(values)[0]
        for cell in cells
        if (values := _values(pairs.results, cell, test, metric.name))
    }
    if not metric.better or len(means) < 2:
        return None
    best = max((c for c in cells if id(c) in means), key=lambda c: means[id(c)])
    for other in cells:
        if other is not best and id(other) in means:
            found = pairs(best, other, test)[1].get(metric.name)
            if found is None or not statistics.sure(found, metric.better):
                return None
    return best


def _differences(pairs: Sequence[Compared]) -> Iterator[str]:
    """The headline numbers of the compared pairs."""
    if not pairs:
        return
    names = [n for n in HEADLINE if any(headline(one.found, n) for one in pairs)]
    yield ""
    yield f"| first - second | {' | '.join(BY_NAME[name].label for name in names)} |"
    yield f"|---|{'---:|' * len(names)}"
    for one in pairs:
        where = ", ".join(
            part
            for part in (
                one.vary if one.vary not in ("", "base") else "",
                one.length if one.length != "1x" else "",
                f"seeds {_seeds(one.seeds)}",
            )
            if part
        )
        found = [headline(one.found, name) for name in names]
        cells = [f"{difference(number[0])}{number[1]}" if number else "-" for number in found]
        yield f"| {one.first} - {one.second} ({where}) | {' | '.join(cells)} |"


def difference(one: Difference) -> str:
    """A difference and its interval, with a star where that leaves out zero."""
    if one.interval is None:
        return f"{one.value:+.3f}"
    low, high = one.interval
    return f"{one.value:+.3f} [{low:+.3f}, {high:+.3f}]{'*' if low > 0 or high < 0 else ''}"


def _analysis(
    plan: Plan, results: Results, entry: RunsSpec, cells: Sequence[Cell]
) -> Iterator[str]:
    """Specificity and the separation of each layer."""
    spec = plan.experiment.analysis
    found = {id(c): [one for r in c.runs if (one := results.analysis(r.name))] for c in cells}
    if spec is None or spec.test not in entry.tests or not any(found.values()):
        return
    yield ""
    yield f"### {entry.name}: analysis of {spec.limit} pictures of {spec.test}"
    yield ""
    yield "Layer N: AUROC of matching above mismatching pairs by the cosine of the centred states"
    yield "of text and image after N layers; hard: the same caption with one noun exchanged."
    for title, group in groups(entry, cells):
        there = [cell for cell in group if found[id(cell)]]
        if not there:
            continue
        yield ""
        if title:
            yield f"**{title}**"
            yield ""
        columns = column_names(there)
        yield f"| | {' | '.join(columns)} |"
        yield f"|---|{'---:|' * len(columns)}"
        names = dict.fromkeys(name for c in there for one in found[id(c)] for name in one)
        known = {metric.name: metric.label for metric in ANALYSIS}
        layers = sorted((n for n in names if n not in known), key=_layer)
        for name in [*(n for n in known if n in names), *layers]:
            label = known.get(name) or "layer {1}, {2}".format(*name.split("."))
            values = [_mean([o[name] for o in found[id(c)] if name in o], 3) for c in there]
            yield f"| {label} | {' | '.join(values)} |"


def _layer(name: str) -> tuple[bool, int]:
    _, number, kind = name.split(".")
    return kind != "random", int(number)


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    mean, deviation = statistics.spread(values)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" +- {deviation:.{digits}f}")


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _change(change: object) -> str:
    if isinstance(change, float):
        return "as it is" if change == 1 else f"learning rates x {change:g}"
    return ", ".join(f"`{one}`" for one in change) or "as it is"  # pyright: ignore[reportGeneralTypeIssues]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
