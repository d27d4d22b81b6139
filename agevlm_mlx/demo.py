"""`agevlm demo`: the embedded example from nothing to a report, as `make demo` runs it.

Draws scenes, has the SAM teacher label them, trains the guided and the concat arm, evaluates
both on held-out scenes and writes OUT/report.html and OUT/report.json. A step whose inputs and
code are unchanged is kept from an earlier run.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import config, errors, parallel
from .data.image import Preprocessor
from .errors import UserError
from .evaluation import files, gallery, report, report_page
from .evaluation.machine import machine, on_metal, versions
from .evaluation.scene_folder import read_scene_folder
from .models.agevlm import AgeVLM
from .training.log import read_metrics
from .training.stages import Recipe, read_recipe

#: Arm -> recipe. The first is the one whose data both use.
RECIPES = {"guided": "scenes", "concat": "scenes-concat"}
TEST_IMAGES = 500
#: One thread for each of two processes side by side beats two threads for each.
ONE_THREAD = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}

EXAMPLES = """
examples:
  agevlm demo                        everything, about ten minutes on two cores
  agevlm demo                        again: only what has changed
  agevlm demo --fresh                everything again
  agevlm demo --out /tmp/try --steps-scale 0.05     a quick look that learns nothing
"""


@dataclass
class Demo:
    """One demo folder: what is in it, which steps were kept, how long each took."""

    out: Path
    scale: float
    fresh: bool
    #: The open lock file, inherited by every command so that none outlives the lock.
    lock: int = -1
    done: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.out / "data"

    def step(self, name: str, inputs: Any, code: Sequence[str], work: Callable[[], Any]) -> Any:
        """Do `work`, unless it was done with the same inputs and the same code of `code`.

        Returns what it returned (kept as JSON). `code` are files and folders of this package.
        """
        key = _digest([inputs, versions(), _code(code)])
        known = self.done.get(name, {})
        reused = not self.fresh and known.get("key") == key and "result" in known
        if reused:
            print(f"{name}: unchanged, kept ({known['seconds']:.0f} s when it was made)")
        else:
            print(f"{name} ...", flush=True)
            start = time.monotonic()
            if known.get("key") != key or self.fresh:
                self.done[name] = {"key": key}
                self._save()
            result = work()
            known = {"key": key, "seconds": time.monotonic() - start, "result": result}
            self.done[name] = known
            self._save()
            print(f"{name}: {known['seconds']:.0f} s", flush=True)
        self.steps.append({"name": name, "seconds": known["seconds"], "reused": reused})
        return known["result"]

    def begun(self, name: str) -> bool:
        """Was an earlier run of this step, with the same inputs, cut short?"""
        return not self.fresh and "begun" in self.done.get(name, {})

    def mark(self, name: str, key: str, value: Any) -> None:
        """Remember something about a step that is not finished."""
        self.done.setdefault(name, {})[key] = value
        self._save()

    def _save(self) -> None:
        files.write_json(self.out / "steps.json", self.done)

    def run(self, tasks: dict[str, list[str]], status: Callable[[], str], **options: Any) -> Any:
        """Run modules of this package by name -> [module, arguments ...]; seconds by name."""
        for words in tasks.values():
            self.commands.append(shlex.join(["agevlm", *words]))
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
    with _lock(args.out) as lock, parallel.terminate_as_interrupt():
        demo = Demo(args.out, args.steps_scale, args.fresh, lock)
        with contextlib.suppress(UserError):  # a missing or damaged note: do everything
            demo.done = dict(config.read_json(args.out / "steps.json"))
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
    _draw(demo, recipes["guided"])
    _teach(demo, recipes["guided"])
    train_seconds = _train(demo, recipes)
    _evaluate(demo)
    _report(demo, train_seconds)


# --- steps -----------------------------------------------------------------------------------


def _recipe(demo: Demo, arm: str) -> tuple[list[str], Recipe]:
    """The arm's recipe with this folder's paths and the chosen scale, and its overrides."""
    recipe = read_recipe(RECIPES[arm])
    changes = {
        "data.train": demo.data / "train",
        "data.val": demo.data / "val",
        "data.store": demo.data / "store",
        "train.out": demo.out / arm,
    }
    overrides = [f"{key}={json.dumps(str(path))}" for key, path in changes.items()]
    if demo.scale != 1:
        for n, stage in enumerate(recipe.stages):
            overrides.append(f"stages.{n}.steps={max(1, round(stage.steps * demo.scale))}")
            overrides.append(f"stages.{n}.warmup={round(stage.warmup * demo.scale)}")
    return overrides, read_recipe(RECIPES[arm], overrides)


def _draw(demo: Demo, recipe: tuple[list[str], Recipe]) -> None:
    spec = recipe[1].data.scenes
    if spec is None:
        raise UserError("recipe 'scenes': expected data.scenes to say how many scenes to draw")
    share = min(demo.scale, 1)
    wanted = {
        "train": (max(64, round(spec.n * share)), spec.seed),
        "val": (max(16, round(spec.val * share)), spec.seed + 1),
        "test": (max(24, round(TEST_IMAGES * share)), spec.seed + 2),
    }

    def draw() -> None:
        for split in wanted:
            shutil.rmtree(demo.data / split, ignore_errors=True)
        demo.run(
            {
                f"scenes {split}": [
                    "scenes", "--out", str(demo.data / split), "--n", str(n),
                    "--seed", str(seed), "--split", split,
                ]
                for split, (n, seed) in wanted.items()
            },
            lambda: _drawn(demo, wanted),
            together=False,  # each draws on all cores
        )  # fmt: skip

    demo.step("scenes", wanted, ["data", "scenes.py", "assets/openmoji.png"], draw)


def _drawn(demo: Demo, wanted: dict[str, tuple[int, int]]) -> str:
    counts = []
    for split, (n, _) in wanted.items():
        folder = demo.data / split / "images"
        count = sum(1 for _ in folder.glob("*.png")) if folder.is_dir() else 0
        counts.append(f"{split} {count}/{n}")
    return "  ".join(counts)


def _teach(demo: Demo, recipe: tuple[list[str], Recipe]) -> None:
    store = demo.data / "store"
    grid, preprocessor = _student(recipe[1])

    def teach() -> None:
        if not demo.begun("teach"):
            shutil.rmtree(store, ignore_errors=True)
        demo.mark("teach", "begun", True)
        words = ["teach", "--data", str(demo.data / "train"), "--out", str(store)]
        words += ["--image-size", str(preprocessor.image_size), "--grid", f"{grid[0]}x{grid[1]}"]
        demo.run({"teach": words}, lambda: _last_line(demo.out / "logs" / "teach.log"))

    inputs = [_made(demo, "scenes"), grid, preprocessor.to_dict()]
    demo.step("teach", inputs, ["data", "sam", "teach.py", "assets/teacher"], teach)


def _student(recipe: Recipe) -> tuple[tuple[int, int], Preprocessor]:
    """The token grid and the preprocessing of the recipe's model."""
    spec = recipe.model
    table: dict[str, Any] = {"text_config": spec.text_config, "vision_config": spec.vision_config}
    if spec.fusion_config is not None:
        table["fusion_config"] = config.to_dict(spec.fusion_config)
    model = AgeVLM(config.from_dict(config.ModelConfig, table, "model"))
    return model.grid, Preprocessor.from_dict(model.vision_tower.preprocessing)


def _train(demo: Demo, recipes: dict[str, tuple[list[str], Recipe]]) -> dict[str, float]:
    def train() -> dict[str, float]:
        tasks = {}
        for arm, (overrides, _) in recipes.items():
            folder = demo.out / arm
            if demo.begun("train") and (folder / "config.toml").is_file():
                words = ["train", "--resume", str(folder)]
            else:
                shutil.rmtree(folder, ignore_errors=True)
                words = ["train", "--recipe", RECIPES[arm], *overrides]
            tasks[arm] = words
        before = demo.done.get("train", {}).get("begun") or dict.fromkeys(recipes, 0.0)
        demo.mark("train", "begun", before)
        start = time.monotonic()
        together = not on_metal()
        try:
            seconds = demo.run(
                tasks, lambda: _trained(demo, recipes), together=together, env=ONE_THREAD
            )
        except BaseException:
            spent = time.monotonic() - start
            demo.mark("train", "begun", {arm: s + spent for arm, s in before.items()})
            raise
        for arm in recipes:
            if not (demo.out / arm / "config.json").is_file():
                raise UserError(
                    f"{arm}: training ended before its last step; run the same command again to "
                    f"go on, or see {demo.out / 'logs' / arm}.log"
                )
        return {arm: before[arm] + seconds[arm] for arm in recipes}

    inputs = [_made(demo, "teach"), *(recipe.fingerprint() for _, recipe in recipes.values())]
    code = ["data", "models", "sam", "training", "train.py", "assets/encoder"]
    return demo.step("train", inputs, code, train)


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
    return " | ".join([*parts, f"{left / 60:.1f} min left"])


def _evaluate(demo: Demo) -> None:
    def evaluate() -> None:
        demo.run(
            {
                f"evaluate {arm}": [
                    "evaluate", "--benchmark", "scenes", "--data", str(demo.data / "test"),
                    "--model", str(demo.out / arm), "--out", str(demo.out / "results"),
                ]
                for arm in RECIPES
            },
            lambda: "",
            together=not on_metal(),
            env=ONE_THREAD,
        )  # fmt: skip

    code = ["data", "models", "evaluation", "evaluate.py"]
    demo.step("evaluate", [_made(demo, "scenes"), _made(demo, "train")], code, evaluate)


def _report(demo: Demo, train_seconds: dict[str, float]) -> None:
    folder = read_scene_folder(demo.data / "test")
    evaluations, answers, geometry, curves = {}, {}, {}, {}
    for arm in report.ARMS:
        stem = demo.out / "results" / f"scenes-{arm}"
        evaluations[arm] = config.read_json(stem.with_name(stem.name + ".json"))
        text = stem.with_name(stem.name + ".jsonl").read_text(encoding="utf-8")
        answers[arm] = [json.loads(line) for line in text.splitlines()]
        source = demo.out / arm / "preprocessor_config.json"
        preprocessor = Preprocessor.from_dict(config.read_json(source), str(source))
        geometry[arm] = (preprocessor, tuple(evaluations[arm]["model"]["grid"]))
        curves[arm] = read_metrics(demo.out / arm / "metrics.jsonl")
    cards = gallery.cards(folder.items, answers, geometry)

    def show() -> None:
        # One answer as `agevlm generate` shows it, for the first scene of the sample.
        item = next(i for i in folder.items if i.name == answers["guided"][0]["image"])
        question = next(q.text for q in item.questions["random"] if q.label)
        words = ["generate", "--model", str(demo.out / "guided"), "--image", str(item.path)]
        words += ["--prompt", question, "--attention", str(demo.out / "answer.png")]
        demo.run({"generate": words}, lambda: "")

    demo.step("answer.png", _made(demo, "train"), ["evaluation", "generate.py", "models"], show)
    result = report.assemble(
        evaluations,
        answers,
        train_seconds,
        scale=demo.scale,
        machine=machine(),
        versions=versions(),
        steps=demo.steps,
        commands=demo.commands,
    )
    files.write_json(demo.out / "report.json", result)
    files.write_text(demo.out / "report.html", report_page.render(result, curves, cards))
    print("\n" + report.summary(result))


# --- what is done already ----------------------------------------------------------------------


def _made(demo: Demo, step: str) -> str:
    """Identifies the output of a finished step, for the steps that build on it."""
    return demo.done[step]["key"]


def _digest(value: Any) -> str:
    text = json.dumps(files.plain(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code(parts: Sequence[str]) -> str:
    """Hash of files and folders of this package (those that exist)."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for part in parts:
        path = root / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(file.relative_to(root).as_posix().encode() + b"\0")
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _last_row(path: Path) -> dict[str, Any] | None:
    """The newest training row of a ``metrics.jsonl``, read from its end."""
    for line in reversed(_tail(path).splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and "lm" in row:
                return row
    return None


def _last_line(path: Path) -> str:
    lines = _tail(path).replace("\r", "\n").strip().splitlines()
    return lines[-1].strip()[:100] if lines else ""


def _tail(path: Path, size: int = 4096) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[int]:
    """Hold the folder for this demo and the commands it starts; yields the lock's descriptor.

    The system frees the lock when the last process that holds it ends, so one left behind by a
    crash never blocks. The file names the process for the message.
    """
    path = out / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"{out}: another demo is running here (process {owner}); wait for it, stop it, or "
            "choose another --out"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


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
