"""Experiments without any training: runs whose answers are made up, each arm with its skill."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agevlm_mlx import config
from agevlm_mlx.benchmarks import benchmark
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.evaluation import files, scoring
from agevlm_mlx.evaluation.answers import AnswerFile
from agevlm_mlx.evaluation.run import begin_row
from agevlm_mlx.evaluation.source import Source
from agevlm_mlx.experiments.plan import Plan, Run
from agevlm_mlx.training import toml

RECIPE = Path(__file__).parents[1] / "training" / "tiny.toml"

EXPERIMENT = """
recipe = "recipe.toml"
seeds = [0, 1, 2]

[arms.guided]
about = "taught"

[arms.plain]
about = "not | taught"
set = ["stages.1.losses.attention.weight=0.0"]

[tests.test]
split = "test"
n = 12
seed = 11

[tests.chosen]
split = "val"
n = 6
seed = 12

[tuning]
trials = { low = 0.5, same = [] }
seed = 7
test = "chosen"

[analysis]
test = "test"

[[runs]]
name = "main"
arms = ["guided", "plain"]
tests = ["test"]
compare = [["guided", "plain"]]

[[runs]]
name = "sizes"
arms = ["guided", "plain"]
tests = ["test"]
seeds = [0]
vary = { all = [], few = ["data.images=8"] }
lengths = { 1x = 1.0, 2x = 2.0 }
compare = [["guided", "plain"]]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `EXPERIMENT` and the tiny recipe."""
    made = tmp_path / "tiny"
    made.mkdir()
    made.joinpath("recipe.toml").write_text(
        RECIPE.read_text().replace('train = "train"', 'train = "train"\nscenes = { n = 24 }')
    )
    made.joinpath("experiment.toml").write_text(EXPERIMENT)
    return made


@pytest.fixture
def plan(folder: Path, tmp_path: Path) -> Plan:
    """The plan of `folder`, in ``out``."""
    return Plan(str(folder), tmp_path / "out")


@pytest.fixture(scope="session")
def drawn_scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, Path], None]:
    """``drawn_scenes(test, folder)``: the scenes of a test, drawn once a session."""
    made: dict[Any, Path] = {}

    def draw(test: Any, folder: Path) -> None:
        key = tuple(sorted(config.to_dict(test).items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("scenes") / "scenes"
            write_scenes(made[key], test.n, test.seed, test.split, style=test.style)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(made[key])

    return draw


@pytest.fixture
def pretend(
    drawn_scenes: Callable[[Any, Path], None],
) -> Callable[..., None]:
    """``pretend(plan, run, skill)``: the folders of a run as if it had been trained and judged.

    skill 0 to 1: how often it answers right, how much it recalls, and how well it looks.
    """

    def write(plan: Plan, run: Run, skill: float, tests: tuple[str, ...] | None = None) -> None:
        train(plan, run, skill)
        for test in run.tests if tests is None else tests:
            drawn_scenes(plan.experiment.tests[test], plan.test_folder(test))
            judge(plan, run, test, skill)
        if run.analysed:
            path = plan.analysis(run.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, analysis(skill))

    return write


def train(plan: Plan, run: Run, skill: float) -> None:
    """A finished run folder, but for its weights."""
    folder = plan.run_folder(run.name)
    folder.mkdir(parents=True)
    folder.joinpath("config.toml").write_text(toml.dumps(config.to_dict(run.recipe)))
    folder.joinpath("config.json").write_text("{}")
    files.write_json(folder / "preprocessor_config.json", Preprocessor(image_size=32).to_dict())
    rng, rows = np.random.default_rng(run.seed), []
    for step in range(1, run.recipe.steps + 1):
        rows.append({"step": step, "stage": "guide", "lm": 3.0, "seconds": 0.5})
        if step % 5 == 0:
            done = step / run.recipe.steps
            rows.append(
                {
                    "step": step,
                    "val_lm": 3 - 2 * done * skill + 0.1 * rng.random(),
                    "val_answers": 0.5 + 0.4 * done * skill + 0.05 * rng.random(),
                    "val_pointing": 0.2 + 0.7 * done * skill + 0.05 * rng.random(),
                }
            )
    folder.joinpath("metrics.jsonl").write_text(
        "".join(f"{files.json.dumps(row)}\n" for row in rows)
    )


def judge(plan: Plan, run: Run, test: str, skill: float) -> None:
    """A result of `agevlm evaluate` whose answers are as good as `skill`, and its answers."""
    one, folder = benchmark("scenes"), plan.test_folder(test)
    with Source(folder) as source:
        items = one.read(source)
    rng = np.random.default_rng([run.seed, len(run.name)])
    rows = [begin_row(item, folder) | answer(item, skill, rng) for item in items]
    rows = files.plain(rows)
    path = plan.result(test, run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").unlink(missing_ok=True)
    with AnswerFile(path.with_suffix(".jsonl")) as kept:
        for row in rows:
            kept.add(row)
    scored = scoring.score(one, rows, scoring.units(rows), 20, 0)
    files.write_json(
        path,
        {
            "benchmark": "scenes",
            "items": test,
            "model": {"name": run.name, "grid": [4, 4]},
            "settings": {},
            "finished": "now",
            "counts": {"items": len(rows)},
            **scoring.report(scored),
        },
    )


def answer(item: Any, skill: float, rng: np.random.Generator) -> Mapping[str, Any]:
    """What such a model answers, with its picture and with another one."""
    right = rng.random() < 0.5 + skill / 2
    if item.kind == "choice":
        other = next(option for option in item.options if option != item.label)
        said = item.label if right else other
        chance = item.options[rng.integers(2)]
        scores = [float(option == said) + rng.normal() / 9 for option in item.options]
        return {"answer": said, "scores": scores, "shuffled_answer": chance, "blind_answer": chance}
    if item.kind == "likelihood":
        harder = (0.0, 2.0, 0.7)
        return {"scores": [-2 - skill * harder[n] + rng.normal() / 2
                           for n in range(len(item.options))]}  # fmt: skip
    if item.kind == "text":
        there = [noun for noun in item.about["objects"] if rng.random() < 0.4 + skill / 2]
        wrong = [] if rng.random() < skill else [str(rng.choice(item.about["nouns"]))]
        return {"answer": " and ".join(f"a {noun}" for noun in there + wrong)}
    place = rng.integers(4, size=2)
    peak = np.full((4, 4), 0.02) + 0.68 * (place == np.indices((4, 4)).T).all(-1).T
    energy = 0.05 + 0.6 * skill + rng.random() / 10
    return {"look": {
        "hit": right, "near": right, "hit_half_heads": right, "energy": energy,
        "energy_half_heads": energy, "uniform": 0.05, "centre_hit": False, "centre": 0.06,
        "on_image": 0.9, "map": peak.ravel().tolist(),
    }}  # fmt: skip


def analysis(skill: float) -> Mapping[str, Any]:
    """A report of `agevlm analyze`, as far as it is read."""

    def number(value: float) -> Mapping[str, Any]:
        return {"auroc": {"value": value, "interval": None}}

    layers = [{"centred": {"random": number(0.5 + skill * n / 6), "hard": None}} for n in range(3)]
    scores = {"log_p": {"random": number(0.5 + skill / 2), "hard": number(0.5 + skill / 4)}}
    return {
        "models": [
            {
                "attention": {"measures": {"specificity": {"value": skill / 2}}},
                "matching": {"scores": scores, "layers": layers},
            }
        ]
    }
