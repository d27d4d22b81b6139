"""`agevlm experiment`: what it says, what it runs, and how it goes on."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from agevlm_mlx import experiment, parallel
from agevlm_mlx.experiments.runner import Runner

RECIPE = Path(__file__).parent / "training" / "tiny.toml"
TINY = """
recipe = "recipe.toml"
seeds = [0]

[arms.guided]

[arms.plain]
set = ["stages.1.losses.attention.weight=0.0"]

[tests.test]
split = "test"
n = 6
seed = 5

[[runs]]
name = "main"
arms = ["guided", "plain"]
tests = ["test"]
compare = [["guided", "plain"]]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment of two arms that trains in seconds; masks of the scenes guide it."""
    made = tmp_path / "tiny"
    made.mkdir()
    scenes = "scenes = { n = 24, val = 6, seed = 3, masks = true }"
    text = RECIPE.read_text().replace('"train"', f'"train"\nval = "val"\n{scenes}', 1)
    text = text.replace('out = "run"', 'out = "run"\npictures_every = 0')
    made.joinpath("recipe.toml").write_text(text)
    made.joinpath("experiment.toml").write_text(TINY)
    return made


def command(folder: Path, *options: str) -> list[str]:
    out = str(folder.parent / "out")
    words = [sys.executable, "-m", "agevlm_mlx.experiment", str(folder), "--out", out]
    return [*words, "--jobs", "2", *options]


# --- what it says ----------------------------------------------------------------------------


def test_a_dry_run_lists_sizes_and_runs_and_writes_nothing(folder, capsys):
    out = folder.parent / "out"
    assert experiment.main([str(folder), "--out", str(out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "guided        39,433      36,561" in text
    assert "guided-s0       20 steps  to do" in text
    assert "0 of 2 runs done; how long is known once a run has begun" in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nobody"], "--only: expected some of guided, plain, got 'nobody'"),
        (["--runs", "other"], "--runs: expected some of main, got 'other'"),
        (["--jobs", "0"], "--jobs: expected 1 to 256, got 0"),
    ],
)
def test_wrong_options_are_named(folder, capsys, options, message):
    assert experiment.main([str(folder), "--dry-run", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_only_some_arms(folder, capsys):
    assert experiment.main([str(folder), "--dry-run", "--only", "plain"]) == 0
    text = capsys.readouterr().out
    assert "plain-s0" in text
    assert "guided" not in text


# --- the queue -------------------------------------------------------------------------------


class Chains:
    """Stands in for `State`: runs of commands that are Python code, done when `done` says."""

    def __init__(self, folder: Path, chains: dict[str, list[str]]) -> None:
        self.folder, self.chains = folder, chains
        self.cleared: list[str] = []

    def next(self, run):
        for n, code in enumerate(self.chains[run.name]):
            made = self.folder / f"{run.name}-{n}"
            if not made.exists():
                words = [sys.executable, "-c", code, str(made)]
                return parallel.Task(f"{run.name} {n}", words, self.folder / f"{made.name}.log")
        return None

    def done(self, run):
        return self.next(run) is None

    def trained(self, run):
        return self.done(run)

    def before(self, run):
        self.cleared.append(run.name)

    def finish(self, run):
        pass


MAKE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('done')"


def work(folder: Path, chains: dict[str, list[str]], jobs: int = 2) -> Runner:
    plan = SimpleNamespace(run_folder=lambda name: folder / name)
    recipe = SimpleNamespace(steps=10)
    runs = [SimpleNamespace(name=name, arm=name, recipe=recipe) for name in chains]
    runner = Runner(plan, Chains(folder, chains), jobs, poll=0.02)
    runner.work(runs)
    return runner


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    chains = {"a": [MAKE, MAKE], "b": ["print('why it fails'); exit(3)", MAKE], "c": [MAKE]}
    runner = work(tmp_path, chains)
    assert list(runner.failed) == ["b"]
    assert "exit 3" in runner.failed["b"]
    assert "why it fails" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("?-?")) == ["a-0", "a-1", "c-0"]
    chains["b"][0] = MAKE
    assert not work(tmp_path, chains).failed
    assert (tmp_path / "b-1").exists()


def test_a_command_that_ends_well_without_its_result_is_not_run_for_ever(tmp_path):
    runner = work(tmp_path, {"a": ["pass"], "b": [MAKE]})
    assert "ended before its end" in runner.failed["a"]
    assert (tmp_path / "b-0").exists()


def test_as_many_at_once_as_there_are_workers(tmp_path):
    # Each waits until the other one has begun, and none is alone for long.
    meet = (
        "import sys, pathlib, time\nme = pathlib.Path(sys.argv[1]); f = me.parent\n"
        "(f / ('begun-' + me.name)).touch()\nend = time.time() + 30\n"
        "while len(list(f.glob('begun-*'))) < 2 and time.time() < end: time.sleep(.01)\n"
        "me.write_text(str(len(list(f.glob('begun-*')))))"
    )
    assert not work(tmp_path, {"a": [meet], "b": [meet]}).failed
    assert (tmp_path / "a-0").read_text() == (tmp_path / "b-0").read_text() == "2"
    one = tmp_path / "one"
    one.mkdir()
    alone = "import sys, pathlib; p = pathlib.Path(sys.argv[1]).parent / 'lock'\n"
    alone += "p.mkdir(); import time; time.sleep(.1); p.rmdir()\n" + MAKE
    assert not work(one, {"a": [alone], "b": [alone], "c": [alone]}, jobs=1).failed


# --- as a user runs it -----------------------------------------------------------------------


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            if f'{{"step": {step},' in (run / "metrics.jsonl").read_text():
                return
        time.sleep(0.02)
    raise AssertionError(f"{run} has not reached step {step}")


def answers(folder: Path) -> dict[str, list]:
    """What every run answered, without what takes time."""
    paths = sorted((folder.parent / "out" / "results" / "test").glob("*.jsonl"))
    return {path.name: [json.loads(line) for line in open(path)] for path in paths}


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, *options), capture_output=True, text=True, check=False, timeout=900
    )


@pytest.mark.e2e
@pytest.mark.chaos
def test_stopped_and_killed_it_ends_as_if_undisturbed(folder, tmp_path):
    more = folder / "recipe.toml"
    more.write_text(more.read_text().replace("steps = 14", "steps = 60"))
    plain = tmp_path / "plain" / "tiny"
    shutil.copytree(folder, plain)
    done = run(plain)
    assert done.returncode == 0, done.stderr
    assert "guided-s0: done" in done.stdout
    assert (plain.parent / "out" / "report" / "table.md").exists()
    assert not (plain.parent / "out" / "runs" / "guided-s0" / "steps").exists()

    guided = tmp_path / "out" / "runs" / "guided-s0"
    first = subprocess.Popen(
        command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(guided, 9, first)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 0, said
    assert "the same command goes on" in said
    assert (guided / "last").exists()

    second = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_for_step(guided, 30, second)
    second.kill()
    second.wait()
    # Its trainings go on alone: nothing starts beside them until they have ended.
    end = time.monotonic() + 300
    while (last := run(folder)).returncode == 2 and time.monotonic() < end:
        assert "another run works in it" in last.stderr, last.stderr
        time.sleep(1)
    assert last.returncode == 0, last.stderr
    assert answers(folder) == answers(plain)
    again = run(folder)
    assert again.returncode == 0
    assert "done" not in again.stdout.replace("runs done", "")


@pytest.mark.e2e
def test_a_failing_arm_is_named_and_tried_again(folder):
    file = folder / "experiment.toml"
    file.write_text(TINY.replace('weight=0.0"', 'weight=0.0", "stages.0.lr=1e30"'))
    out = run(folder)
    assert out.returncode == 2
    assert "expected a finite loss" in out.stderr
    assert "1 of the runs failed: plain-s0" in out.stderr.splitlines()[-1]
    assert "guided-s0: done" in out.stdout
    dry = run(folder, "--dry-run")
    assert "1 of 2 runs done" in dry.stdout
    file.write_text(TINY)
    changed = run(folder)
    assert changed.returncode == 2
    assert "other stages.0.lr" in changed.stderr
    shutil.rmtree(folder.parent / "out" / "runs" / "plain-s0")
    assert run(folder).returncode == 0
    assert os.listdir(folder.parent / "out" / "results" / "test").count("scenes-plain-s0.json") == 1
