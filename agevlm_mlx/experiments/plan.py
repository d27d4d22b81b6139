"""An ``experiment.toml``, strictly read, and the list of runs that it asks for."""

import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import config
from ..data.nouns import Split
from ..data.styles import Style
from ..errors import UserError
from ..training.stages import Recipe, recipe_tables, shipped_recipes

#: A list of ``key=value`` for the recipe, or a number that multiplies every learning rate.
Change = tuple[str, ...] | float

FILE = "experiment.toml"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*(-[A-Za-z0-9_.]+)*")
_DATA = ("train", "val", "store", "val_store")


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """What makes an arm: overrides of the recipe that all arms share."""

    set: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class ScenesTest:
    """Held-out scenes, drawn once; see ``agevlm scenes``."""

    split: Split
    n: int
    seed: int
    style: Style = "plain"
    about: str = ""

    def __post_init__(self) -> None:
        if self.n < 2:
            raise UserError(f"tests: expected n >= 2, got {self.n}")


@dataclass(frozen=True, kw_only=True)
class TuningSpec:
    """The same trials for every arm; the best of an arm is used in all its runs."""

    #: Name -> what is changed. Of equal ones the first counts as the best.
    trials: dict[str, Change]
    seed: int
    #: One of the tests, which nothing else uses.
    test: str
    #: Judged by the mean of these numbers, of which more is better.
    metrics: tuple[str, ...] = ("text.pope.adversarial.accuracy",)
    #: Of the trials' training.
    length: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RunsSpec:
    """Arms x variations x lengths x seeds, judged by the same tests."""

    name: str
    arms: tuple[str, ...]
    tests: tuple[str, ...]
    about: str = ""
    #: In place of the experiment's.
    seeds: tuple[int, ...] | None = None
    vary: dict[str, Change] = field(default_factory=lambda: {"base": ()})
    #: Name -> factor of the steps and the warm-up of every stage.
    lengths: dict[str, float] = field(default_factory=lambda: {"1x": 1.0})
    #: Pairs of arms ("ARM", in every variation and length; or both "ARM/VARIATION").
    compare: tuple[tuple[str, str], ...] = ()
    #: How far the number of parameters of a model may be from the mean of the entry's.
    parameters: float = 0.05


@dataclass(frozen=True, kw_only=True)
class AnalysisSpec:
    """`agevlm analyze` on some pictures of one test."""

    test: str
    limit: int = 100
    only: tuple[str, ...] = ("matching", "attention")
    others: int = 7


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole ``experiment.toml``."""

    recipe: str
    arms: dict[str, ArmSpec]
    tests: dict[str, ScenesTest]
    runs: tuple[RunsSpec, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning: TuningSpec | None = None
    analysis: AnalysisSpec | None = None
    about: str = ""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs: expected at least one [[runs]] table")
        names = [("arms", self.arms), ("tests", self.tests)]
        names += [(f"runs '{r.name}' vary", r.vary) for r in self.runs]
        names += [(f"runs '{r.name}' lengths", r.lengths) for r in self.runs]
        names += [("tuning.trials", self.tuning.trials)] if self.tuning else []
        names.append(("runs", [r.name for r in self.runs]))
        for where, given in names:
            if not given:
                raise UserError(f"{where}: expected at least one, got none")
            for name in given:
                if not _NAME.fullmatch(name):
                    raise UserError(
                        f"{where}: expected a name of letters, digits, '_', '.' and single '-' "
                        f"(it becomes a file's), got {name!r}"
                    )
        _different("runs", [r.name for r in self.runs])
        for entry in self.runs:
            self._check(entry)
        if self.tuning is not None:
            _known("tuning.test", [self.tuning.test], self.tests)
            _positive("tuning.length", self.tuning.length)
            users = [f"runs '{r.name}'" for r in self.runs if self.tuning.test in r.tests]
            if self.analysis is not None and self.analysis.test == self.tuning.test:
                users.append("analysis")
            if users:
                raise UserError(
                    f"tuning.test: expected a test that nothing else uses, got "
                    f"{self.tuning.test!r}, which {users[0]} uses; what was chosen on a test must "
                    "not be judged by it"
                )
        if self.analysis is not None:
            _known("analysis.test", [self.analysis.test], self.tests)

    def _check(self, entry: RunsSpec) -> None:
        where = f"runs '{entry.name}'"
        for key, names, known in (
            ("arms", entry.arms, self.arms),
            ("tests", entry.tests, self.tests),
        ):
            if not names:
                raise UserError(f"{where} {key}: expected at least one, got none")
            _known(f"{where} {key}", names, known)
            _different(f"{where} {key}", names)
        seeds = self.seeds_of(entry)
        if not seeds:
            raise UserError(f"{where} seeds: expected at least one, got none")
        _different(f"{where} seeds", seeds)
        for name, length in entry.lengths.items():
            _positive(f"{where} lengths.{name}", length)
        for name, change in entry.vary.items():
            if isinstance(change, int | float):
                _positive(f"{where} vary.{name}", change)
        for pair in entry.compare:
            parts = [side.split("/") for side in pair]
            for arm, *rest in parts:
                _known(f"{where} compare", [arm], dict.fromkeys(entry.arms))
                _known(f"{where} compare", rest, entry.vary)
            if len({len(part) for part in parts}) > 1 or len(parts[0]) > 2:
                raise UserError(
                    f"{where} compare: expected two arms or two ARM/VARIATION, got {list(pair)}"
                )

    def seeds_of(self, entry: RunsSpec) -> tuple[int, ...]:
        """The seeds of an entry."""
        return self.seeds if entry.seeds is None else entry.seeds


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: its name is that of its folder."""

    name: str
    arm: str
    seed: int
    #: For `agevlm train --recipe`.
    base: str
    overrides: tuple[str, ...]
    recipe: Recipe
    #: Tests that judge it; and whether it is analysed.
    tests: tuple[str, ...]
    analysed: bool
    vary: str = "base"
    length: str = "1x"
    #: Of tuning; "" in other runs.
    trial: str = ""


@dataclass(frozen=True)
class Cell:
    """The runs of an arm in one variation and length of an entry, one a seed."""

    entry: str
    arm: str
    vary: str
    length: str
    runs: tuple[Run, ...]


class Plan:
    """An experiment in its folder, and where its results go."""

    def __init__(self, name: str, out: Path | None = None) -> None:
        """name: a folder, or the name of a shipped experiment. ``UserError`` for all that is
        wrong in its files, in whichever run it would show."""
        self.folder = find(name)
        self.file = self.folder / FILE
        try:
            self.experiment = config.from_dict(Experiment, config.read_toml(self.file))
        except UserError as error:
            raise UserError(f"{self.file}: {error}" if str(self.file) not in str(error)
                            else str(error)) from None  # fmt: skip
        self.name = self.folder.resolve().name
        self.out = Path("runs") / self.name if out is None else out
        self.base = self._base()
        try:
            self._tables = recipe_tables(self.base)
        except UserError as error:
            raise UserError(f"{self.file}: recipe: {error}") from None
        self._recipes: dict[tuple[str, tuple[Change, ...], float], tuple[list[str], Recipe]] = {}
        #: What every entry would be without tuning: checks all overrides.
        self.cells(dict.fromkeys(self.experiment.arms, ""))
        self.trials()
        self._check_data()

    def _base(self) -> str:
        name = self.experiment.recipe
        if name in shipped_recipes():
            return name
        if not name.endswith(".toml") or Path(name).name != name:
            raise UserError(
                f"{self.file}: recipe: expected a .toml file beside it or one of "
                f"{', '.join(shipped_recipes())}, got {name!r}"
            )
        return str(self.folder / name)

    # --- runs --------------------------------------------------------------------------------

    def trials(self) -> list[Run]:
        """The runs of tuning, arm by arm: every arm that is used, the same trials for each."""
        tuning = self.experiment.tuning
        if tuning is None:
            return []
        used = dict.fromkeys(arm for entry in self.experiment.runs for arm in entry.arms)
        return [
            self._run(
                ("tuning", arm, trial), arm, tuning.seed, [tuning.trials[trial]], tuning.length,
                tests=(tuning.test,), trial=trial,
            )
            for trial in tuning.trials
            for arm in used
        ]  # fmt: skip

    def cells(self, chosen: Mapping[str, str]) -> list[Cell]:
        """All cells of all entries. chosen: arm -> its best trial ("" for none as yet)."""
        found, names = [], dict[str, Run]()
        for entry in self.experiment.runs:
            for vary in entry.vary:
                for length in entry.lengths:
                    for arm in entry.arms:
                        runs = []
                        for seed in self.experiment.seeds_of(entry):
                            run = self._of_entry(entry, arm, vary, length, seed, chosen)
                            known = names.setdefault(run.name, run)
                            if known.recipe != run.recipe:
                                raise UserError(
                                    f"{self.file}: runs '{entry.name}': {run.name} is another run "
                                    "in an earlier entry; give the variation or length another "
                                    "name"
                                )
                            runs.append(run)
                        found.append(Cell(entry.name, arm, vary, length, tuple(runs)))
        return found

    def queue(self, cells: Sequence[Cell]) -> list[Run]:
        """Every run once, in the order in which they are run: entry by entry, within an entry
        seed by seed. A run that several entries share has the tests of all of them."""
        order: dict[str, Run] = {}
        for entry in self.experiment.runs:
            mine = [cell for cell in cells if cell.entry == entry.name]
            for place in range(len(self.experiment.seeds_of(entry))):
                for cell in mine:
                    run = cell.runs[place]
                    known = order.get(run.name, run)
                    tests = tuple(dict.fromkeys((*known.tests, *run.tests)))
                    order[run.name] = replace(known, tests=tests)
        return list(order.values())

    def _of_entry(
        self, entry: RunsSpec, arm: str, vary: str, length: str, seed: int,
        chosen: Mapping[str, str],
    ) -> Run:  # fmt: skip
        change, factor = entry.vary[vary], entry.lengths[length]
        best = chosen.get(arm, "")
        trial = self.experiment.tuning.trials[best] if self.experiment.tuning and best else ()
        # What changes nothing has no part in the name: entries share such runs.
        parts = [arm, vary if change not in ((), 1.0) else "", length if factor != 1 else ""]
        return self._run(
            parts, arm, seed, [change, trial], factor, tests=entry.tests, vary=vary, length=length
        )

    def _run(
        self, parts: Sequence[str], arm: str, seed: int, changes: Sequence[Change],
        factor: float, *, tests: tuple[str, ...], **about: str,
    ) -> Run:  # fmt: skip
        name = "-".join([*filter(None, parts), f"s{seed}"])
        analysis, out = self.experiment.analysis, self.run_folder(name)
        try:
            overrides, shared = self._recipe(arm, tuple(changes), factor)
            overrides += [f"train.seed={seed}", f"train.out={json.dumps(str(out))}"]
            recipe = replace(shared, train=replace(shared.train, seed=seed, out=out))
        except UserError as error:
            raise UserError(f"{self.file}: arm '{arm}', run {name}: {error}") from None
        analysed = analysis is not None and analysis.test in tests
        return Run(
            name=name, arm=arm, seed=seed, base=self.base, overrides=tuple(overrides),
            recipe=recipe, tests=tests, analysed=analysed, **about,
        )  # fmt: skip

    def _recipe(
        self, arm: str, changes: tuple[Change, ...], factor: float
    ) -> tuple[list[str], Recipe]:
        """The overrides and the recipe that runs of all seeds share; made once."""
        key = arm, changes, factor
        if key not in self._recipes:
            overrides = list(self.experiment.arms[arm].set)
            for change in changes:
                overrides += _overrides(self._tables, overrides, change)
            overrides += _longer(self._tables, overrides, factor)
            overrides += self._placed(config.override(self._tables, overrides).get("data", {}))
            tables = config.override(self._tables, overrides)
            self._recipes[key] = overrides, config.from_dict(Recipe, tables)
        overrides, recipe = self._recipes[key]
        return list(overrides), recipe

    def _placed(self, data: Mapping[str, Any]) -> Iterator[str]:
        """Overrides that put the recipe's data below the experiment's folder."""
        for key in _DATA:
            path = data.get(key)
            if isinstance(path, str) and not Path(path).is_absolute() and path[:3] != "hf:":
                yield f"data.{key}={json.dumps(str(self.out / 'data' / Path(path).name))}"

    # --- places ------------------------------------------------------------------------------

    def run_folder(self, name: str) -> Path:
        """Of one training."""
        return self.out / "runs" / name

    def test_folder(self, test: str) -> Path:
        """The scenes of a test."""
        return self.out / "data" / test

    def result(self, test: str, run: str) -> Path:
        """What `agevlm evaluate` writes; its answers lie beside it."""
        return self.out / "results" / test / f"scenes-{run}.json"

    def analysis(self, run: str) -> Path:
        """What `agevlm analyze` writes."""
        return self.out / "analysis" / run / "report.json"

    def _check_data(self) -> None:
        """No test has the pictures, or the folder, of what is trained or validated on."""
        runs = [*self.trials(), *(r for c in self.cells({}) for r in c.runs)]
        for recipe in {json.dumps(config.to_dict(r.recipe.data)): r.recipe for r in runs}.values():
            data = recipe.data
            for key in _DATA:
                path = getattr(data, key)
                if path is not None and path in map(self.test_folder, self.experiment.tests):
                    raise UserError(
                        f"{self.file}: tests.{path.name}: has the folder of data.{key}; choose "
                        "another name for the test"
                    )
            if data.scenes is None:
                continue
            split = getattr(data.scenes, "split", "train")
            drawn = {(split, data.scenes.seed): "data.train"}
            drawn[("val" if split == "train" else split, data.scenes.seed + 1)] = "data.val"
            for name, test in self.experiment.tests.items():
                if (test.split, test.seed) in drawn:
                    raise UserError(
                        f"{self.file}: tests.{name}: split {test.split} with seed {test.seed} has "
                        f"the pictures of {drawn[test.split, test.seed]}; choose another seed"
                    )


def find(name: str) -> Path:
    """The folder of an experiment: a path, or the name of a shipped one."""
    shipped = importlib.resources.files("agevlm_mlx") / "recipes"
    for folder in (Path(name), Path(str(shipped)) / name):
        if (folder / FILE).is_file():
            return folder
    known = ", ".join(shipped_experiments())
    raise UserError(
        f"experiment {name!r}: expected a folder with an {FILE} or one of: {known or 'none'}"
    )


def shipped_experiments() -> list[str]:
    """Names of the experiments in the package."""
    folder = Path(str(importlib.resources.files("agevlm_mlx") / "recipes"))
    return sorted(path.parent.name for path in folder.glob(f"*/{FILE}"))


def _overrides(tables: Mapping[str, Any], before: Sequence[str], change: Change) -> list[str]:
    """A change as overrides, on top of those `before` it."""
    if not isinstance(change, int | float):
        return list(change)
    if change == 1:
        return []
    stages = config.override(dict(tables), before).get("stages", [])
    found = []
    for n, stage in enumerate(stages):
        for key in ("lr", "lr_end"):
            if key in stage:
                found.append(f"stages.{n}.{key}={float(stage[key]) * change:.6g}")
    return found


def _longer(tables: Mapping[str, Any], before: Sequence[str], factor: float) -> list[str]:
    """Overrides that multiply the steps and the warm-up of every stage."""
    if factor == 1:
        return []
    stages = config.override(dict(tables), before).get("stages", [])
    found = []
    for n, stage in enumerate(stages):
        for key, least in (("steps", 1), ("warmup", 0)):
            if key in stage:
                found.append(f"stages.{n}.{key}={max(least, round(stage[key] * factor))}")
    return found


def _known(where: str, names: Sequence[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{where}: expected some of {', '.join(known)}, got {name!r}")


def _different(where: str, values: Sequence[Any]) -> None:
    twice = next((value for value in values if list(values).count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: expected each once, got {twice!r} twice")


def _positive(where: str, value: float) -> None:
    if not 0 < value < 1000:
        raise UserError(f"{where}: expected a number above 0, got {value}")
