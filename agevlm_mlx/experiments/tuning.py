"""Which trial is the best of each arm: the same trials for all, judged on a test of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from .. import config
from ..errors import UserError
from ..evaluation.benchmark import flatten
from .plan import Plan, Run
from .state import State


@dataclass(frozen=True)
class Tuned:
    """values: trial -> the mean of the metrics, of the trials of an arm that are judged; best: ""
    unless all are."""

    values: dict[str, float]
    best: str


def tuned(plan: Plan, state: State, trials: Sequence[Run]) -> dict[str, Tuned]:
    """Arm -> what its trials have come to. The first of equally good ones is the best."""
    spec = plan.experiment.tuning
    if spec is None:
        return {}
    found: dict[str, dict[str, float]] = {run.arm: {} for run in trials}
    for run in trials:
        if state.done(run):
            result = plan.result(spec.test, run.name)
            found[run.arm][run.trial] = mean(read_metric(result, name) for name in spec.metrics)
    order = list(spec.trials)
    best = {
        arm: max(values, key=lambda trial, of=values: (of[trial], -order.index(trial)))
        for arm, values in found.items()
        if len(values) == len(order)
    }
    return {arm: Tuned(values, best.get(arm, "")) for arm, values in found.items()}


def read_metric(path: Path, name: str) -> float:
    """A number of a result file by its dotted name ("text.pope.adversarial.accuracy")."""
    numbers = flatten(config.read_json(path)["metrics"])
    value = numbers.get(name)
    if value is None:
        raise UserError(
            f"tuning.metrics: expected one of the numbers in {path}, such as "
            f"{', '.join(list(numbers)[:3])}, got {name!r}"
        )
    return value
