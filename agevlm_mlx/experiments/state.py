"""How far a run is, read from its folder alone, so that any call goes on where the last one was.

::

    OUT/data/           training data, the teacher's stores, and a folder of scenes for each test
    OUT/runs/RUN/       a run folder of `agevlm train`, at the end without its checkpoints; in it
                        finished.json, written last: what was trained and judged, and how long
    OUT/results/TEST/   scenes-RUN.json and .jsonl of `agevlm evaluate`
    OUT/analysis/RUN/   report.json and .html of `agevlm analyze`
    OUT/logs/           what every command printed
    OUT/report/         table, figures and all numbers
"""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import config, parallel
from ..errors import UserError
from ..evaluation import files
from ..steps import digest
from ..training.log import metrics_rows
from ..training.stages import Recipe, read_recipe
from .plan import Plan, Run

MARK = "finished.json"
#: Of a run folder: only training needs them.
_CHECKPOINTS = ("steps", "last", "best")


class State:
    """Asks the folders of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._done: set[tuple[str, tuple[str, ...]]] = set()

    def trained(self, run: Run) -> bool:
        """Whether the model of a run is there. ``UserError`` for that of another recipe."""
        folder = self.plan.run_folder(run.name)
        begun = folder / "config.toml"
        if not begun.is_file():
            return False
        found = read_recipe(str(begun))
        if _told(found) != _told(run.recipe):
            keys = _unlike(config.to_dict(found), config.to_dict(run.recipe))
            raise UserError(
                f"{folder}: expected a run of what {self.plan.file} says now, got one with other "
                f"{', '.join(keys[:4]) or 'settings'}; delete the folder to train it anew, or "
                "change that back"
            )
        return (folder / "config.json").is_file()

    def done(self, run: Run) -> bool:
        """Whether a run is trained, judged by all its tests, and analysed."""
        key = run.name, run.tests
        if key not in self._done and self.trained(run) and self.next(run) is None:
            self._done.add(key)
        return key in self._done

    def judged(self, run: Run, test: str) -> bool:
        """Whether a test's result is there."""
        return _read(self.plan.result(test, run.name)).get("finished") is not None

    def analysed(self, run: Run) -> bool:
        """Whether the analysis is there."""
        return bool(_read(self.plan.analysis(run.name)).get("models"))

    def next(self, run: Run) -> parallel.Task | None:
        """The next command of a run; None when nothing is left to do."""
        plan, folder = self.plan, self.plan.run_folder(run.name)
        if not self.trained(run):
            words = ["train", "--resume", str(folder)]
            if not (folder / "config.toml").is_file():
                words = ["train", "--recipe", run.base, *run.overrides]
            return self._task(run, "train", words)
        for test in run.tests:
            if not self.judged(run, test):
                words = [
                    "evaluate", "--benchmark", "scenes", "--data", str(plan.test_folder(test)),
                    "--model", str(folder), "--out", str(plan.result(test, run.name).parent),
                ]  # fmt: skip
                return self._task(run, f"evaluate {test}", words)
        if run.analysed and not self.analysed(run):
            spec = plan.experiment.analysis
            assert spec is not None
            words = [
                "analyze", "--data", str(plan.test_folder(spec.test)), "--model", str(folder),
                "--limit", str(spec.limit), "--only", ",".join(spec.only),
                "--others", str(spec.others), "--out", str(plan.analysis(run.name).parent),
                "--fresh",
            ]  # fmt: skip
            return self._task(run, "analyze", words)
        return None

    def _task(self, run: Run, what: str, words: list[str]) -> parallel.Task:
        log = self.plan.out / "logs" / f"{run.name}-{what.replace(' ', '-')}.log"
        command = [sys.executable, "-m", f"agevlm_mlx.{words[0]}", *words[1:]]
        return parallel.Task(f"{run.name} {what}", command, log)

    def before(self, run: Run) -> None:
        """Clear away what an earlier training of that name has left, before it is trained anew."""
        folder = self.plan.run_folder(run.name)
        if (folder / "config.toml").is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)  # at most a lock, a tokenizer
        shutil.rmtree(self.plan.analysis(run.name).parent, ignore_errors=True)
        for test in self.plan.experiment.tests:
            result = self.plan.result(test, run.name)
            for path in (result, result.with_suffix(".jsonl")):
                path.unlink(missing_ok=True)

    def finish(self, run: Run) -> None:
        """Free the disk of the checkpoints of a trained run, and mark one that is all done."""
        if not self.trained(run):
            return
        folder = self.plan.run_folder(run.name)
        for name in _CHECKPOINTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.done(run):
            steps, seconds = marked(folder) or cost(folder)
            tests = {test: self.plan.experiment.tests[test] for test in run.tests}
            value = {
                "recipe": run.recipe.fingerprint(),
                "tests": {name: digest(config.to_dict(test)) for name, test in tests.items()},
                "steps": steps,
                "train_seconds": seconds,
            }
            if _read(folder / MARK) != files.plain(value):
                files.write_json(folder / MARK, value)


def cost(folder: Path) -> tuple[int, float]:
    """(steps, seconds) of a run's training so far: of its steps alone, without validation."""
    path, steps, seconds = folder / "metrics.jsonl", 0, 0.0
    if path.is_file():
        for row in metrics_rows(path):
            if isinstance(row.get("seconds"), int | float):
                steps, seconds = steps + 1, seconds + row["seconds"]
    return steps, seconds


def marked(folder: Path) -> tuple[int, float] | None:
    """`cost` as the mark of a finished run tells it."""
    mark = _read(folder / MARK)
    steps, seconds = mark.get("steps"), mark.get("train_seconds")
    if isinstance(steps, int) and isinstance(seconds, int | float):
        return steps, float(seconds)
    return None


def latest(folder: Path) -> tuple[int, float] | None:
    """(step, seconds a step) of the newest rows of a run; None where there are none."""
    rows = []
    for line in parallel.tail(folder / "metrics.jsonl").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("seconds"), int | float):
                rows.append(row)
    if not rows or not isinstance(rows[-1].get("step"), int):
        return None
    return rows[-1]["step"], sum(row["seconds"] for row in rows) / len(rows)


def _told(recipe: Recipe) -> str:
    """What decides the parameters, wherever the experiment's folder lies."""
    names = {
        key: None if path is None else Path(path.name)
        for key in ("train", "val", "store", "val_store")
        for path in [getattr(recipe.data, key)]
    }
    return replace(recipe, data=replace(recipe.data, **names)).fingerprint()


def _unlike(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Dotted names of what two recipes do not share."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            name
            for key in dict.fromkeys((*wanted, *found))
            if f"{where}{key}" != "train.out"
            for name in _unlike(found.get(key), wanted.get(key), f"{where}{key}.")
        ]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [name for n, (a, b) in pairs for name in _unlike(a, b, f"{where}{n}.")]
    return [] if found == wanted else [where.rstrip(".")]


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's table; empty where there is none."""
    try:
        value = config.read_json(path)
    except (UserError, OSError):
        return {}
    return value if isinstance(value, dict) else {}
