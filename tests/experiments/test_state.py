"""How far a run is, and which command is next, from the folders alone."""

import json

import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.experiments import tuning
from agevlm_mlx.experiments.runner import clock, time_left
from agevlm_mlx.experiments.state import MARK, State, cost, latest


@pytest.fixture
def run(plan):
    return plan.cells({})[0].runs[0]


def command(state, run):
    task = state.next(run)
    return None if task is None else task.command[2:]


def test_the_chain_of_commands_of_a_run(plan, run, pretend):
    state, folder = State(plan), plan.run_folder(run.name)
    words = command(state, run)
    assert words[:3] == ["agevlm_mlx.train", "--recipe", str(plan.folder / "recipe.toml")]
    assert set(run.overrides) <= set(words)
    pretend(plan, run, 0.5, tests=())
    plan.analysis(run.name).unlink()
    (folder / "config.json").unlink()
    assert command(state, run) == ["agevlm_mlx.train", "--resume", str(folder)]
    (folder / "config.json").touch()
    words = command(state, run)
    assert words[:3] == ["agevlm_mlx.evaluate", "--benchmark", "scenes"]
    assert words[words.index("--data") + 1] == str(plan.test_folder("test"))
    assert words[words.index("--out") + 1] == str(plan.out / "results" / "test")
    assert not state.done(run)


def test_judged_and_analysed_runs_are_done_and_marked(plan, run, pretend):
    state, folder = State(plan), plan.run_folder(run.name)
    pretend(plan, run, 0.5)
    (folder / "steps" / "20").mkdir(parents=True)
    (folder / "last").write_text("20")
    assert state.next(run) is None
    assert not (folder / MARK).exists()
    state.finish(run)
    assert not (folder / "steps").exists()
    assert not (folder / "last").exists()
    assert (folder / "config.json").exists()
    mark = json.loads((folder / MARK).read_text())
    assert mark["recipe"] == run.recipe.fingerprint()
    assert (mark["steps"], mark["train_seconds"]) == (20, 10.0)
    assert list(mark["tests"]) == ["test"]


def test_results_that_are_not_finished_are_gone_on_with(plan, run, pretend):
    pretend(plan, run, 0.5)
    path = plan.result("test", run.name)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": None}))
    assert command(State(plan), run)[0] == "agevlm_mlx.evaluate"
    path.write_text("{broken")
    assert command(State(plan), run)[0] == "agevlm_mlx.evaluate"


def test_the_analysis_comes_last(plan, run, pretend):
    pretend(plan, run, 0.5)
    plan.analysis(run.name).unlink()
    words = command(State(plan), run)
    assert words[0] == "agevlm_mlx.analyze"
    assert words[words.index("--only") + 1] == "matching,attention"
    assert words[words.index("--limit") + 1] == "100"


def test_a_run_of_another_recipe_is_refused(plan, run, pretend):
    pretend(plan, run, 0.5)
    config = plan.run_folder(run.name) / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.002", "lr = 0.003"))
    with pytest.raises(UserError, match=r"with other stages\.0\.lr.*delete the folder") as error:
        State(plan).done(run)
    assert str(config.parent) in str(error.value)


def test_a_copied_folder_is_the_same_experiment(plan, run, pretend, tmp_path):
    pretend(plan, run, 0.5)
    plan.out.rename(tmp_path / "elsewhere")
    moved = type(plan)(str(plan.folder), tmp_path / "elsewhere")
    again = moved.cells({})[0].runs[0]
    assert again.recipe != run.recipe
    assert State(moved).done(again)


def test_what_an_earlier_run_of_that_name_left_is_cleared_before_a_new_one(plan, run, pretend):
    pretend(plan, run, 0.5)
    state = State(plan)
    state.before(run)
    assert state.done(run)  # it has begun: nothing is touched
    (plan.run_folder(run.name) / "config.toml").unlink()
    State(plan).before(run)
    assert not plan.run_folder(run.name).exists()
    assert not plan.result("test", run.name).exists()
    assert not plan.result("test", run.name).with_suffix(".jsonl").exists()
    assert not plan.analysis(run.name).exists()


def test_cost_and_newest_row_of_a_run_that_was_cut_off(plan, run, pretend):
    folder = plan.run_folder(run.name)
    assert cost(folder) == (0, 0.0)
    assert latest(folder) is None
    pretend(plan, run, 0.5)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "val_lm": 1}\n{"step": 21, "sec')
    assert cost(folder) == (20, 10.0)
    assert latest(folder) == (20, 0.5)


def test_the_time_left_is_told_from_the_steps_so_far(plan, pretend):
    runs = plan.queue(plan.cells({}))
    state = State(plan)
    assert time_left(plan, state, runs, 2) is None
    pretend(plan, runs[0], 0.5)  # 20 steps of half a second
    # 5 runs of 20 steps, 2 of 40, 2 of 20, 2 of 40; of the other arm the same is supposed.
    assert time_left(plan, state, runs, 2) == pytest.approx(0.5 * (5 * 20 + 4 * 40 + 2 * 20) / 2)
    assert time_left(plan, state, runs[:1], 2) == 0


@pytest.mark.parametrize(("seconds", "text"), [(20, "20 s"), (90, "2 min"), (9000, "2.5 h")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_best_trial_is_chosen_once_all_are_judged(plan, pretend):
    skills = {"low": 0.1, "same": 0.9}
    trials, state = plan.trials(), State(plan)
    assert tuning.tuned(plan, state, trials)["guided"] == tuning.Tuned({}, "")
    for run in trials:
        if run.name != "tuning-plain-same-s7":
            pretend(plan, run, skills[run.trial])
    found = tuning.tuned(plan, state, trials)
    assert found["guided"].best == "same"
    assert found["guided"].values["same"] > found["guided"].values["low"]
    assert found["plain"].best == ""
    assert list(found["plain"].values) == ["low"]


def judged_by(names, folder, pretend, out):
    """The plan with these metrics, all of its trials judged."""
    from agevlm_mlx.experiments.plan import Plan

    file = folder / "experiment.toml"
    file.write_text(file.read_text().replace("seed = 7", f"seed = 7\nmetrics = {names}"))
    plan = Plan(str(folder), out)
    for run in plan.trials():
        pretend(plan, run, {"low": 0.0, "same": 1.0}[run.trial] if run.arm == "guided" else 1.0)
    return plan, tuning.tuned(plan, State(plan), plan.trials())


def test_the_mean_of_the_metrics_judges(folder, pretend, tmp_path):
    names = ["text.pope.adversarial.accuracy", "text.recall"]
    plan, found = judged_by(names, folder, pretend, tmp_path / "out")
    differ = 0
    for run in plan.trials():
        both = [tuning.read_metric(plan.result("chosen", run.name), name) for name in names]
        differ += both[0] != both[1]
        assert found[run.arm].values[run.trial] == sum(both) / 2
    assert differ
    assert found["guided"].best == "same"


def test_of_equal_trials_the_first_is_taken(folder, pretend, tmp_path):
    _, found = judged_by(["text.chair_i"], folder, pretend, tmp_path / "out")
    assert found["plain"].values == {"low": 0.0, "same": 0.0}
    assert found["plain"].best == "low"


def test_an_unknown_metric_is_an_error(plan, pretend):
    pretend(plan, plan.trials()[0], 0.5)
    with pytest.raises(UserError, match=r"tuning.metrics: expected one of the numbers in"):
        tuning.read_metric(plan.result("chosen", plan.trials()[0].name), "text.pope")
