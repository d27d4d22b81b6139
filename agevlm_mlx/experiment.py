"""`agevlm experiment`: arms x variations x lengths x seeds, trained, judged and compared."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import parallel
from .errors import UserError, command
from .evaluation import files
from .evaluation.machine import on_metal
from .experiments import parameters
from .experiments.plan import FILE, Cell, Plan, Run, shipped_experiments
from .experiments.prepare import prepare
from .experiments.runner import Runner, clock, time_left
from .experiments.state import State
from .experiments.tuning import tuned
from .steps import claim

FORMAT = """\
{file} in FOLDER:
  recipe = "recipe.toml"          what all arms share: a file beside it, or a shipped recipe
  seeds = [0, 1, 2]               of every run; an arm's data, initial weights and order
  [arms.NAME]                     set = ["key=value", ...] of the recipe; about = "..."
  [tests.NAME]                    held-out scenes: split, n, seed; style = "plain", about = "..."
  [tuning]                        optional: trials = {{ NAME = CHANGE, ... }}, of all arms alike;
                                  seed; test (used by nothing else); metrics = [NUMBER, ...], of
                                  which the mean judges; length = 1.0. The best trial of an arm
                                  is used in all its runs
  [analysis]                      optional: `agevlm analyze` on limit = 100 pictures of a test;
                                  only = ["matching", "attention"], others = 7
  [[runs]]                        name; arms; tests; about = "..."; seeds (these instead)
                                  vary = {{ NAME = CHANGE, ... }}, lengths = {{ NAME = FACTOR }}
                                  compare = [["ARM", "ARM"], ["ARM/VARIATION", "ARM/VARIATION"]]
                                  parameters = 0.05: how far a model's size may be from the mean
  CHANGE is a list of "key=value" for the recipe, or a number that multiplies all learning rates.
  A FACTOR multiplies the steps and the warm-up of every stage.
  data.train, data.val and the stores of a recipe are placed in OUT/data, under their last names;
  what is there already is used. Runs that two entries share are trained once.

examples:
  agevlm experiment claim --dry-run         every run, what is done, and how long the rest takes
  agevlm experiment claim --jobs 2          all of it; Ctrl-C saves, the same command goes on
  agevlm experiment claim --runs main --only guided,concat
  agevlm experiment claim --report          table and figures of what is there

shipped experiments: {shipped}
OUT/report/ gets table.md, results.json and figures; logs, runs and answers lie beside it.
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``--help``. 0 also when a signal ended it in order."""
    args = _parser().parse_args(argv)
    plan = Plan(args.folder, args.out)
    jobs = _jobs(args.jobs)
    state, trials = State(plan), _chosen_trials(plan, args)
    if args.report:
        _report(plan, state)
        return 0
    found = tuned(plan, state, plan.trials())
    cells = _cells(plan, args, {arm: one.best for arm, one in found.items()})
    sizes = parameters.counts(cells)
    _print_sizes(plan, cells, sizes)
    parameters.check(plan, cells, sizes)
    if args.dry_run:
        _dry_run(plan, state, trials, plan.queue(cells), jobs)
        return 0
    files.make_folder(plan.out)
    with claim(plan.out) as lock, parallel.terminate_as_interrupt():
        runner = Runner(plan, state, jobs, None if on_metal() else parallel.ONE_THREAD, [lock])
        try:
            _everything(plan, state, runner, trials, cells, args)
        except KeyboardInterrupt:
            print(f"\nstopped; all that is done is kept in {plan.out}, the same command goes on")
            return 0
    if runner.failed:
        names = ", ".join(runner.failed)
        raise UserError(
            f"{len(runner.failed)} of the runs failed: {names}; what they said is above and in "
            f"{plan.out / 'logs'}; the same command tries them again"
        )
    return 0


def _everything(
    plan: Plan,
    state: State,
    runner: Runner,
    trials: Sequence[Run],
    cells: Sequence[Cell],
    args: argparse.Namespace,
) -> None:
    queue = plan.queue(cells)
    if any(not state.done(run) for run in (*trials, *queue)):
        prepare(plan, [*trials, *queue])
    runner.work(trials, later=queue)
    found = tuned(plan, state, plan.trials())
    best = {arm: one.best for arm, one in found.items()}
    ready = [cell for cell in _cells(plan, args, best) if best.get(cell.arm, "-")]
    runner.work(plan.queue(ready))
    _report(plan, state)


def _chosen_trials(plan: Plan, args: argparse.Namespace) -> list[Run]:
    """The trials of the arms that the runs asked for have."""
    arms = {cell.arm for cell in _cells(plan, args, {})}
    return [run for run in plan.trials() if run.arm in arms]


def _cells(plan: Plan, args: argparse.Namespace, chosen: dict[str, str]) -> list[Cell]:
    """The cells that --only and --runs leave."""
    for option, names, known in (
        ("--only", args.only, plan.experiment.arms),
        ("--runs", args.runs, {entry.name: None for entry in plan.experiment.runs}),
    ):
        for name in names or ():
            if name not in known:
                raise UserError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    cells = [
        cell
        for cell in plan.cells(chosen)
        if cell.arm in (args.only or [cell.arm]) and cell.entry in (args.runs or [cell.entry])
    ]
    if not cells:
        raise UserError("--only, --runs: expected some runs, got none that fit both")
    return cells


def _jobs(asked: int | None) -> int:
    if asked is not None and not 1 <= asked <= 256:
        raise UserError(f"--jobs: expected 1 to 256, got {asked}")
    return asked or (1 if on_metal() else os.cpu_count() or 1)


def _report(plan: Plan, state: State) -> None:
    from .experiments.report import write  # matplotlib only once there is something to draw

    print(write(plan, state))


# --- what a terminal is told -----------------------------------------------------------------


def _print_sizes(
    plan: Plan, cells: Sequence[Cell], sizes: dict[tuple[str, str], tuple[int, int]]
) -> None:
    told = {}
    for (arm, vary), size in sizes.items():
        alike = {size for (other, _), size in sizes.items() if other == arm}
        told[arm if len(alike) == 1 else f"{arm}/{vary}"] = size
    width = max(map(len, told)) + 2
    print(f"{'model':<{width}}{'parameters':>12}{'trained':>12}")
    for name, (total, trained) in told.items():
        print(f"{name:<{width}}{total:>12,}{trained:>12,}")
    runs = plan.queue(cells)
    steps = sum(run.recipe.steps for run in runs)
    print(f"{plan.name}: {len(runs)} runs, {steps:,} steps, in {plan.out}")


def _dry_run(
    plan: Plan, state: State, trials: Sequence[Run], queue: Sequence[Run], jobs: int
) -> None:
    runs = [*trials, *queue]
    width = max(len(run.name) for run in runs) + 2
    for run in runs:
        if state.done(run):
            what = "done"
        elif state.trained(run):
            what = "trained, to be judged"
        elif (plan.run_folder(run.name) / "config.toml").is_file():
            what = "begun"
        else:
            what = "to do"
        tests = ", ".join(run.tests)
        print(f"  {run.name:<{width}}{run.recipe.steps:>7,} steps  {what:<22}{tests}")
    left = time_left(plan, state, runs, jobs)
    todo = sum(not state.done(run) for run in runs)
    told = "nothing is left to do" if not todo else "how long is known once a run has begun"
    if todo and left:
        told = f"about {clock(left)} of training left with {jobs} at a time"
    print(f"{len(runs) - todo} of {len(runs)} runs done; {told}")


def _parser() -> argparse.ArgumentParser:
    shipped = ", ".join(shipped_experiments()) or "none"
    parser = argparse.ArgumentParser(
        prog="agevlm experiment",
        description="Train arms x variations x lengths x seeds, judge each on held-out scenes, "
        "compare them in pairs, and write a table and figures.",
        epilog=FORMAT.format(file=FILE, shipped=shipped),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    add = parser.add_argument
    add("folder", metavar="FOLDER", help=f"a folder with an {FILE}, or a shipped one's name")
    add("--out", type=Path, metavar="DIR", help="where everything goes (default: runs/NAME)")
    add("--jobs", type=int, metavar="N", help="trainings at once (default: the cores; on a GPU 1)")
    add("--only", type=names, metavar="ARM[,ARM]", help="these arms only")
    add("--runs", type=names, metavar="NAME[,NAME]", help="these [[runs]] only")
    add("--dry-run", action="store_true", help="list the runs and stop")
    add("--report", action="store_true", help="write table and figures of what is there, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
