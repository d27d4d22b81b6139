"""What all runs share, made before the first of them: the tests, the training data, the labels."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

from .. import config
from ..data.scenes import write_scenes
from ..training import build
from ..training.stages import Recipe
from .plan import Plan, Run


def prepare(plan: Plan, runs: Sequence[Run], say: Callable[[str], None] = print) -> None:
    """Draw the scenes of the tests that `runs` need, and make their data and the teacher's stores
    where they do not exist; what exists is checked."""
    for name in dict.fromkeys(test for run in runs for test in run.tests):
        test, folder = plan.experiment.tests[name], plan.test_folder(name)
        progress = _Progress(name)
        if write_scenes(folder, test.n, test.seed, test.split, progress, test.style):
            progress.end()
            say(f"{folder}: {test.n} scenes drawn")
    for recipe in _distinct([run.recipe for run in runs]):
        # As the training itself would, but once, and alone.
        build.prepare(recipe, say=say)


def _distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """One recipe for every set of data and labels; those with features first, as the others can
    use their stores, too."""
    found: dict[str, Recipe] = {}
    for recipe in sorted(recipes, key=lambda r: not _features(r)):
        data = config.to_dict(recipe.data)
        places = [data.get(key) for key in ("train", "val", "store", "val_store", "scenes")]
        student = dataclasses.asdict(recipe.model)["vision_config"], str(recipe.model.init)
        same = json.dumps([places, student, _features(recipe)], default=str)
        if same not in found and (_features(recipe) or _with_features(same) not in found):
            found[same] = recipe
    return list(found.values())


def _features(recipe: Recipe) -> bool:
    return any(stage.losses.features > 0 for stage in recipe.stages)


def _with_features(same: str) -> str:
    return json.dumps([*json.loads(same)[:-1], True])


class _Progress:
    """One line on a terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.start = name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            left = (time.monotonic() - self.start) * (total - done) / done
            text = f"\r{self.name}: scenes {done}/{total}, {left:.0f} s left "
            print(text, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)
