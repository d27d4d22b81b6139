"""Reading experiment.toml: the runs it asks for, and what is said of mistakes."""

import re
from pathlib import Path

import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.experiments import parameters
from agevlm_mlx.experiments.plan import Plan, find, shipped_experiments


def names(plan: Plan, **chosen: str) -> list[str]:
    return [run.name for run in plan.queue(plan.cells(chosen))]


def edited(folder: Path, old: str, new: str) -> Plan:
    file = folder / "experiment.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return Plan(str(folder), folder / "out")


def refused(folder: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        edited(folder, old, new)
    assert "\n" not in str(error.value)
    assert str(folder / "experiment.toml") in str(error.value)


def test_the_order_is_entry_by_entry_then_seed_by_seed(plan):
    assert names(plan) == [
        *("guided-s0", "plain-s0", "guided-s1", "plain-s1", "guided-s2", "plain-s2"),
        # all-1x of the second entry are the runs of the first.
        *("guided-2x-s0", "plain-2x-s0"),
        *("guided-few-s0", "plain-few-s0", "guided-few-2x-s0", "plain-few-2x-s0"),
    ]
    assert [run.name for run in plan.trials()] == [
        "tuning-guided-low-s7", "tuning-plain-low-s7", "tuning-guided-same-s7",
        "tuning-plain-same-s7",
    ]  # fmt: skip


def test_a_run_is_the_recipe_with_arm_variation_trial_length_and_seed(plan):
    runs = {run.name: run for cell in plan.cells({"plain": "low"}) for run in cell.runs}
    recipe = runs["plain-few-2x-s0"].recipe
    assert [stage.steps for stage in recipe.stages] == [12, 28]
    assert [stage.warmup for stage in recipe.stages] == [6, 0]
    assert [stage.lr for stage in recipe.stages] == [1e-3, 1e-3]
    assert recipe.stages[1].lr_end == 1e-4
    assert recipe.stages[1].losses.attention.weight == 0
    assert recipe.data.images == 8
    assert recipe.train.seed == 0
    assert recipe.train.out == plan.out / "runs" / "plain-few-2x-s0"
    assert recipe.data.train == plan.out / "data" / "train"
    other = runs["guided-s2"].recipe  # no trial is chosen for this arm
    assert other.stages[0].lr == 2e-3
    assert other.train.seed == 2
    assert other.stages[1].losses.attention.weight == 0.3


def test_all_arms_have_the_same_trials(plan):
    rates = [(r.arm, r.trial, r.recipe.stages[0].lr, r.seed, r.tests) for r in plan.trials()]
    assert rates == [
        (arm, trial, lr, 7, ("chosen",))
        for trial, lr in (("low", 1e-3), ("same", 2e-3))
        for arm in ("guided", "plain")
    ]


def test_a_shared_run_has_the_tests_of_both_entries(folder):
    text = 'tests = ["test"]\nseeds = [0]'
    more = '\n[tests.more]\nsplit = "uniform"\nn = 5\nseed = 3\n[tuning]'
    file = folder / "experiment.toml"
    file.write_text(file.read_text().replace("\n[tuning]", more))
    plan = edited(folder, text, text.replace('"test"', '"more", "test"'))
    runs = {run.name: run for run in plan.queue(plan.cells({}))}
    assert runs["guided-s0"].tests == ("test", "more")
    assert runs["guided-s1"].tests == ("test",)
    assert runs["guided-2x-s0"].tests == ("more", "test")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1, 2]", "sedes = [0]", "sedes: unknown key; did you mean 'seeds'"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0]", "seeds: expected each once, got 0 twice"),
        ("seeds = [0, 1, 2]", "seeds = []", "seeds: expected at least one"),
        ('arms = ["guided", "plain"]', 'arms = ["guidde"]', "got 'guidde'"),
        ('tests = ["test"]', 'tests = ["tset"]', "expected some of test, chosen, got 'tset'"),
        ('tests = ["test"]', 'tests = ["test", "chosen"]', "a test that nothing else uses"),
        ('[analysis]\ntest = "test"', '[analysis]\ntest = "chosen"', "nothing else uses"),
        ('test = "chosen"', 'test = "other"', "tuning.test: expected some of"),
        ("trials = { low = 0.5, same = [] }", "trials = {}", "tuning.trials: expected at least"),
        ('["guided", "plain"]]', '["guided", "nobody"]]', "got 'nobody'"),
        ('["guided", "plain"]]', '["guided/base", "plain"]]', "two arms or two ARM/VARIATION"),
        ('["guided", "plain"]]', '["guided/x", "plain/x"]]', "expected some of base, got 'x'"),
        ("[arms.plain]", '[arms."pl/ain"]', "a name of letters"),
        ("[arms.plain]", '[arms.".."]', "a name of letters"),
        ("2x = 2.0", "2x = 0.0", "expected a number above 0"),
        ('"data.images=8"', '"data.imags=8"', "run guided-few-s0: .*imags"),
        ('"data.images=8"', '"data.images"', "run guided-few-s0: .*expected key=value"),
        ("attention.weight=0.0", "attention.weight=-1", "arm 'plain', run plain-s0: .*weight"),
        ('recipe = "recipe.toml"', 'recipe = "../recipe.toml"', "a .toml file beside it"),
        ('recipe = "recipe.toml"', 'recipe = "nothing"', "a .toml file beside it"),
        ('recipe = "recipe.toml"', 'recipe = "no.toml"', "no.toml: no such file"),
        ('split = "test"\nn = 12\nseed = 11', 'split = "train"\nn = 24\nseed = 0',
         "has the pictures of data.train"),
        ("[tests.test]", "[tests.train]\nsplit='test'\nn=9\nseed=4\n[tests.test]",
         "has the folder of data.train"),
        ('split = "test"', 'split = "tset"', "tests.test.split: expected"),
        ("n = 12", "n = 1", "n >= 2"),
        ('name = "sizes"', 'name = "main"', "got 'main' twice"),
        ("2x = 2.0", '"2x" = 2.0, "1x " = 3.0', "a name of letters"),
    ],
)  # fmt: skip
def test_mistakes_are_named(folder, old, new, message):
    refused(folder, old, new, message)


def test_two_runs_of_one_name_are_refused(folder):
    refused(
        folder,
        'lengths = { 1x = 1.0, 2x = 2.0 }\ncompare = [["guided", "plain"]]',
        'lengths = { 1x = 1.0, 2x = 2.0 }\n[[runs]]\nname = "again"\narms = ["plain"]\n'
        'tests = ["test"]\nvary = { few = ["data.images=9"] }',
        "plain-few-s0 is another run in an earlier entry",
    )


def test_broken_toml_names_the_file(folder):
    (folder / "experiment.toml").write_text("recipe = ")
    with pytest.raises(UserError, match=re.escape(str(folder / "experiment.toml"))):
        Plan(str(folder))


def test_an_unknown_experiment_says_what_there_is(tmp_path):
    with pytest.raises(UserError, match=r"a folder with an experiment.toml or one of: .*claim"):
        find(str(tmp_path))


@pytest.mark.parametrize("name", shipped_experiments())
def test_shipped_experiments_are_good_and_their_arms_of_one_size(name, tmp_path):
    plan = Plan(name, tmp_path)
    cells = plan.cells({})
    parameters.check(plan, cells, parameters.counts(cells))
    assert plan.queue(cells)


def test_a_larger_arm_is_refused(folder):
    plan = edited(
        folder,
        '"stages.1.losses.attention.weight=0.0"',
        '"stages.1.losses.attention.weight=0.0", "model.text_config.intermediate_size=96"',
    )
    cells = plan.cells({})
    found = parameters.counts(cells)
    assert found["guided", "base"] != found["plain", "base"]
    with pytest.raises(UserError, match=r"within 5% .* got guided with 39,433 \(-10.5%\)"):
        parameters.check(plan, cells, found)
    text = (folder / "experiment.toml").read_text()
    same = text.replace('compare = [["guided', 'parameters = 0.2\ncompare = [["guided')
    (folder / "experiment.toml").write_text(same)
    plan = Plan(str(folder), folder / "out")
    parameters.check(plan, plan.cells({}), found)


def test_parameters_are_all_and_those_that_some_stage_trains(plan):
    run = plan.cells({})[0].runs[0]
    total, trained = parameters.count(run.recipe)
    frozen = [stage.trainable[1][0] for stage in run.recipe.stages[1:]]
    assert frozen == ["vision_tower\\..*"]  # what no stage trains: the stem
    assert 0 < trained < total
