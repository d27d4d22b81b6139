"""Runs side by side: each a chain of commands, as many chains at once as there are workers."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from .. import parallel
from ..errors import UserError
from .plan import Plan, Run
from .state import State, latest, marked


class Runner:
    """Works off a queue of runs. One that fails does not stop the others."""

    def __init__(
        self,
        plan: Plan,
        state: State,
        jobs: int,
        env: Mapping[str, str] | None = None,
        keep: Sequence[int] = (),
        poll: float = 0.5,
    ) -> None:
        """env: of the commands; keep: descriptors that they inherit (a lock)."""
        self.plan, self.state, self.jobs = plan, state, jobs
        self.env, self.keep, self.poll = env, keep, poll
        #: Name of a run -> why it failed.
        self.failed: dict[str, str] = {}
        self._active: dict[str, tuple[parallel.Task, subprocess.Popen[bytes]]] = {}

    def work(self, queue: Sequence[Run], later: Sequence[Run] = ()) -> None:
        """Do all that is left of these runs, in their order. later: for the time left only.

        What fails is in `failed` afterwards. ``KeyboardInterrupt`` once every command has saved.
        """
        waiting = [run for run in queue if not self.state.done(run)]
        for run in queue:
            self.state.finish(run)
        runs = {run.name: run for run in queue}
        line = parallel.Line()
        try:
            while waiting or self._active:
                while waiting and len(self._active) < self.jobs:
                    self._go_on(waiting.pop(0), line)
                for name, (task, process) in list(self._active.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del self._active[name]
                    line.end()
                    if code:
                        self._fail(runs[name], task, code)
                    else:
                        self.state.finish(runs[name])
                        self._go_on(runs[name], line, task)
                line.show(lambda: self._status(queue, later))
                if self._active:
                    time.sleep(self.poll)
            line.end()
        except BaseException:
            parallel.stop([process for _, process in self._active.values()])
            raise

    def _go_on(self, run: Run, line: parallel.Line, before: parallel.Task | None = None) -> None:
        """Start the next command of a run; `before` is the one that has just ended well."""
        try:
            task = self.state.next(run)
        except UserError as error:
            self.failed[run.name] = str(error)
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
            return
        if task is None:
            self.state.finish(run)
            line.end()
            print(f"{run.name}: done", flush=True)
        elif before is not None and task.name == before.name:
            self._fail(run, task, 0)
        else:
            if before is None:
                self.state.before(run)
            process = parallel.begin(task, self.env, self.keep)
            self._active[run.name] = task, process

    def _fail(self, run: Run, task: parallel.Task, code: int) -> None:
        reason = parallel.failure(task, code)
        if not code:
            reason = f"{task.name} ended before its end; what it said is above and in {task.log}"
        self.failed[run.name] = reason
        print(reason, file=sys.stderr, flush=True)

    # --- progress ----------------------------------------------------------------------------

    def _status(self, queue: Sequence[Run], later: Sequence[Run]) -> str:
        """How many runs are done, where the others are, and the time left of all."""
        done = sum(self.state.done(run) for run in queue if run.name not in self._active)
        parts = [f"{done}/{len(queue) + len(later)} runs"]
        steps = {run.name: run.recipe.steps for run in queue}
        for name, (task, _) in self._active.items():
            at = latest(self.plan.run_folder(name))
            training = task.name.endswith(" train")
            where = f" {at[0] if at else 0}/{steps[name]}" if training else ""
            parts.append(f"{task.name}{where}")
        left = time_left(self.plan, self.state, [*queue, *later], self.jobs)
        return " | ".join([*parts, f"{clock(left)} left"] if left else parts)


def time_left(plan: Plan, state: State, runs: Sequence[Run], jobs: int) -> float | None:
    """Seconds until `runs` are done, from what their steps have taken so far; None if unknown.

    Of an arm none of which has begun, the mean of the others is taken.
    """
    speeds: dict[str, list[float]] = {}
    remaining: list[tuple[str, int]] = []
    for run in runs:
        folder = plan.run_folder(run.name)
        finished = marked(folder) if state.done(run) else None
        if finished is not None:
            speeds.setdefault(run.arm, []).append(finished[1] / max(finished[0], 1))
            continue
        at = latest(folder)
        if at is not None:
            speeds.setdefault(run.arm, []).append(at[1])
        step = at[0] if at else 0
        remaining.append((run.arm, 0 if state.trained(run) else max(run.recipe.steps - step, 0)))
    known = [sum(values) / len(values) for values in speeds.values()]
    if not known:
        return None
    own = {arm: sum(values) / len(values) for arm, values in speeds.items()}
    mean = sum(known) / len(known)
    return sum(steps * own.get(arm, mean) for arm, steps in remaining) / jobs


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
