"""`agevlm demo`: the embedded example from nothing to a report, as `make demo` runs it.

Draws scenes, has the SAM teacher label them, trains the guided and the concat arm, evaluates
both on held-out scenes and writes OUT/report.html and OUT/report.json. A step whose inputs and
code are unchanged is kept from an earlier run.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import atomic, config, errors, parallel
from .benchmarks import benchmark
from .data.image import Preprocessor
from .errors import UserError
from .evaluation import compare, files, gallery, report, report_page
from .evaluation.machine import machine, on_metal, versions
from .evaluation.scene_folder import read_scene_folder
from .models.agevlm import AgeVLM
from .steps import Steps, claim
from .training.log import read_metrics
from .training.stages import Recipe, read_recipe

#: Arm -> recipe. The first is the one whose data both use.
RECIPES = {"guided": "scenes", "concat": "scenes-concat"}
TEST_IMAGES = 500

EXAMPLES = """
examples:
  agevlm demo                        everything, about ten minutes on two cores
  agevlm demo                        again: only what has changed
  agevlm demo --fresh                everything again
  agevlm demo --out /tmp/try --steps-scale 0.05     a quick look that learns nothing
"""


@dataclass
class Demo:
    """One demo folder, and what is run in it."""

    out: Path
    scale: float
    steps: Steps
    #: The open lock file, inherited by every command so that none outlives the lock.
    lock: int
    #: What the steps run, for the report; also of steps that were kept.
    commands: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def test(self) -> Path:
        return self.data / "test"

    def plan(self, tasks: dict[str, list[str]]) -> dict[str, list[str]]:
        """Note the commands (by name -> [command, arguments ...]) that a step runs."""
        self.commands += [shlex.join(["agevlm", *words]) for words in tasks.values()]
        return tasks

    def run(
        self, tasks: dict[str, list[str]], status: Callable[[], str] = str, **options: Any
    ) -> dict[str, float]:
        """Run planned commands; the seconds of each by name."""
        return parallel.run(
            [
                parallel.Task(
                    name,
                    [sys.executable, "-m", f"agevlm_mlx.{words[0]}", *words[1:]],
                    self.out / "logs" / f"{name.replace(' ', '-')}.log",
                )
                for name, words in tasks.items()
            ],
            status=status,
            keep=[self.lock],
            **options,
        )


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``."""
    args = _parser().parse_args(argv)
    if not 0 < args.steps_scale <= 100:
        raise UserError(f"--steps-scale: expected more than 0, at most 100, got {args.steps_scale}")
    files.make_folder(args.out)
    with claim(args.out) as lock, parallel.terminate_as_interrupt():
        demo = Demo(args.out, args.steps_scale, Steps(args.out, args.fresh), lock)
        start = time.monotonic()
        try:
            _everything(demo)
        except KeyboardInterrupt:
            print(f"\nstopped; finished parts are kept in {args.out}, and {_again(args)} goes on")
            raise
        print(f"\n{args.out / 'report.html'}  ({time.monotonic() - start:.0f} s in all)")
    return 0


def _again(args: argparse.Namespace) -> str:
    same = "" if args.steps_scale == 1 else f" --steps-scale {args.steps_scale:g}"
    return f"'agevlm demo --out {args.out}{same}'"


def _everything(demo: Demo) -> None:
    recipes = {arm: _recipe(demo, arm) for arm in RECIPES}
    _draw(demo, recipes["guided"][1])
    _teach(demo, recipes["guided"][1])
    train_seconds = _train(demo, recipes)
    _evaluate(demo)
    _answer(demo)
    _report(demo, train_seconds)


# --- steps -----------------------------------------------------------------------------------


def _recipe(demo: Demo, arm: str) -> tuple[list[str], Recipe]:
    """The arm's recipe with this folder's paths and the chosen scale, and its overrides."""
    recipe = read_recipe(RECIPES[arm])
    changes = {"train.out": demo.out / arm}
    for key in ("train", "val", "store", "val_store"):
        path = getattr(recipe.data, key)
        if path is not None:
            changes[f"data.{key}"] = demo.data / path.name
    overrides = [f"{key}={json.dumps(str(path))}" for key, path in changes.items()]
    share, spec = min(demo.scale, 1), recipe.data.scenes
    if spec is None or recipe.data.val is None:
        raise UserError(f"recipe '{RECIPES[arm]}': expected data.val and data.scenes")
    if demo.scale != 1:
        overrides.append(f"data.scenes.n={max(64, round(spec.n * share))}")
        overrides.append(f"data.scenes.val={max(16, round(spec.val * share))}")
        for n, stage in enumerate(recipe.stages):
            overrides.append(f"stages.{n}.steps={max(1, round(stage.steps * demo.scale))}")
            overrides.append(f"stages.{n}.warmup={round(stage.warmup * demo.scale)}")
    return overrides, read_recipe(RECIPES[arm], overrides)


def _draw(demo: Demo, recipe: Recipe) -> None:
    spec, val = recipe.data.scenes, recipe.data.val
    assert spec is not None  # _recipe has checked both
    assert val is not None
    test = max(24, round(TEST_IMAGES * min(demo.scale, 1)))
    wanted = {
        recipe.data.train: ("train", spec.n, spec.seed),
        val: ("val", spec.val, spec.seed + 1),
        demo.test: ("test", test, spec.seed + 2),
    }

    tasks = demo.plan(
        {
            f"scenes {split}": [
                "scenes", "--out", str(folder), "--n", str(n), "--seed", str(seed),
                "--split", split,
            ]
            for folder, (split, n, seed) in wanted.items()
        }
    )  # fmt: skip

    def draw() -> None:
        for folder in wanted:
            shutil.rmtree(folder, ignore_errors=True)
        # One after the other: each draws on all cores.
        demo.run(
            tasks,
            lambda: "  ".join(_drawn(folder, n) for folder, (_, n, _) in wanted.items()),
            together=False,
        )

    demo.steps.do(
        "scenes",
        draw,
        inputs=list(wanted.values()),
        code=["data", "scenes.py", "assets/openmoji.png"],
        makes=[folder / "scenes.json" for folder in wanted],
    )


def _drawn(folder: Path, n: int) -> str:
    images = folder / "images"
    count = sum(1 for _ in images.glob("*.png")) if images.is_dir() else 0
    return f"{folder.name} {count}/{n}"


def _teach(demo: Demo, recipe: Recipe) -> None:
    stores = [(recipe.data.train, recipe.data.store), (recipe.data.val, recipe.data.val_store)]
    wanted = {store: data for data, store in stores if data is not None and store is not None}
    grid, preprocessor = _student(recipe)
    student = ["--image-size", str(preprocessor.image_size), "--grid", f"{grid[0]}x{grid[1]}"]
    tasks = demo.plan(
        {
            f"teach {data.name}": ["teach", "--data", str(data), "--out", str(store), *student]
            for store, data in wanted.items()
        }
    )

    def teach() -> None:
        for store in wanted:
            if not demo.steps.begun("teach"):
                shutil.rmtree(store, ignore_errors=True)
        demo.steps.mark("teach", True)
        # One after the other: each labels on all cores.
        demo.run(
            tasks, lambda: parallel.newest_line(demo.out / "logs", "teach-*.log"), together=False
        )

    demo.steps.do(
        "teach",
        teach,
        inputs=[demo.steps.key("scenes"), grid, preprocessor.to_dict()],
        code=["data", "sam", "teach.py", "assets/teacher"],
        makes=[store / "index.json" for store in wanted],
    )


def _student(recipe: Recipe) -> tuple[tuple[int, int], Preprocessor]:
    """The token grid and the preprocessing of the recipe's model."""
    spec = recipe.model
    table: dict[str, Any] = {"text_config": spec.text_config, "vision_config": spec.vision_config}
    if spec.fusion_config is not None:
        table["fusion_config"] = config.to_dict(spec.fusion_config)
    model = AgeVLM(config.from_dict(config.ModelConfig, table, "model"))
    return model.grid, Preprocessor.from_dict(model.vision_tower.preprocessing)


def _train(demo: Demo, recipes: dict[str, tuple[list[str], Recipe]]) -> dict[str, float]:
    fresh = demo.plan(
        {arm: ["train", "--recipe", RECIPES[arm], *recipes[arm][0]] for arm in recipes}
    )

    def train() -> dict[str, float]:
        tasks = dict(fresh)
        before = demo.steps.begun("train") or {}
        for arm in recipes:
            folder = demo.out / arm
            if arm in before and (folder / "config.toml").is_file():
                tasks[arm] = ["train", "--resume", str(folder)]
            else:
                shutil.rmtree(folder, ignore_errors=True)
        before = {arm: before.get(arm, 0.0) for arm in recipes}
        demo.steps.mark("train", before)
        start = time.monotonic()
        try:
            seconds = demo.run(
                tasks,
                lambda: _trained(demo, recipes),
                together=not on_metal(),
                env=parallel.ONE_THREAD,
            )
        except BaseException:
            spent = time.monotonic() - start
            demo.steps.mark("train", {arm: s + spent for arm, s in before.items()})
            raise
        for arm in recipes:
            if not (demo.out / arm / "config.json").is_file():
                raise UserError(
                    f"{arm}: training ended before its last step; run the same command again to "
                    f"go on, or see {demo.out / 'logs' / arm}.log"
                )
        return {arm: before[arm] + seconds[arm] for arm in recipes}

    return demo.steps.do(
        "train",
        train,
        inputs=[demo.steps.key("teach"), *(r.fingerprint() for _, r in recipes.values())],
        code=["data", "models", "sam", "training", "train.py", "assets/encoder"],
        makes=[
            demo.out / arm / name for arm in recipes for name in ("config.json", "metrics.jsonl")
        ],
    )


def _trained(demo: Demo, recipes: dict[str, tuple[list[str], Recipe]]) -> str:
    """Where both arms are: step, losses, and the time left of the slower one."""
    parts, left = [], 0.0
    for arm, (_, recipe) in recipes.items():
        path = demo.out / arm / "metrics.jsonl"
        row = _last_row(path)
        if row is None:
            parts.append(f"{arm} starting")
            continue
        text = f"{arm} {row['step']}/{recipe.steps} {row['stage']}"
        for key in ("lm", "attention"):
            if isinstance(row.get(key), float):
                text += f" {key} {row[key]:.3f}"
        left = max(left, row.get("seconds", 0.0) * (recipe.steps - row["step"]))
        parts.append(text)
    return " | ".join([*parts, f"{left / 60:.1f} min left"] if left else parts)


def _evaluate(demo: Demo) -> None:
    results = demo.out / "results"
    tasks = demo.plan(
        {
            f"evaluate {arm}": [
                "evaluate", "--benchmark", "scenes", "--data", str(demo.test),
                "--model", str(demo.out / arm), "--out", str(results),
                "--fresh",  # the code may have changed, which answers do not tell
            ]
            for arm in RECIPES
        }
    )  # fmt: skip
    demo.steps.do(
        "evaluate",
        lambda: demo.run(tasks, together=not on_metal(), env=parallel.ONE_THREAD),
        inputs=[demo.steps.key("scenes"), demo.steps.key("train")],
        code=[
            "benchmarks",
            "data",
            "models",
            "evaluation",
            "evaluate.py",
            "generation.py",
            "respondents.py",
        ],
        makes=[results / f"scenes-{arm}.{kind}" for arm in RECIPES for kind in ("json", "jsonl")],
    )


def _answer(demo: Demo) -> None:
    """One answer as `agevlm generate` shows it: the first scene of the test set."""
    item = read_scene_folder(demo.test).items[0]
    question = next(q.text for q in item.questions["random"] if q.label == "yes")
    words = ["generate", "--model", str(demo.out / "guided"), "--image", str(item.path)]
    words += ["--prompt", question, "--attention", str(demo.out / "answer.png")]
    tasks = demo.plan({"generate": words})
    demo.steps.do(
        "answer",
        lambda: demo.run(tasks),
        inputs=[demo.steps.key("scenes"), demo.steps.key("train")],
        code=["data", "models", "evaluation", "generate.py"],
        makes=[demo.out / "answer.png"],
    )


def _report(demo: Demo, train_seconds: dict[str, float]) -> None:
    folder = read_scene_folder(demo.test)
    evaluations, answers, geometry, curves = {}, {}, {}, {}
    for arm in report.ARMS:
        stem = demo.out / "results" / f"scenes-{arm}"
        evaluations[arm], answers[arm] = compare.read_result(stem)
        source = demo.out / arm / "preprocessor_config.json"
        preprocessor = Preprocessor.from_dict(config.read_json(source), str(source))
        geometry[arm] = (preprocessor, tuple(evaluations[arm]["model"]["grid"]))
        curves[arm] = read_metrics(demo.out / arm / "metrics.jsonl")
    cards = gallery.cards(folder.items, answers, geometry)
    result = report.assemble(
        benchmark("scenes"),
        evaluations,
        answers,
        train_seconds,
        scale=demo.scale,
        machine=machine(),
        versions=versions(),
        steps=demo.steps.record,
        commands=demo.commands,
    )
    files.write_json(demo.out / "report.json", result)
    atomic.write_text(demo.out / "report.html", report_page.render(result, curves, cards))
    print("\n" + report.summary(result))


# --- progress --------------------------------------------------------------------------------


def _last_row(path: Path) -> dict[str, Any] | None:
    """The newest training row of a ``metrics.jsonl``, read from its end."""
    for line in reversed(parallel.tail(path).splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and "lm" in row:
                return row
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the demo (runs/demo)"
    )
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="X times the training steps, and below 1 as much less data (1)",
    )
    parser.add_argument("--fresh", action="store_true", help="keep nothing from an earlier run")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
