"""``train.report_to``: a run's numbers in TensorBoard, Trackio or Weights & Biases.

Through their own packages, each imported only when a recipe names it. Everything stays on this
machine unless the user has told the package otherwise (``WANDB_MODE=online``,
``TRACKIO_SPACE_ID``). In the run's folder::

    trackers/id            by which a resumed run is known again
    trackers/tensorboard/  event files:  tensorboard --logdir RUN/trackers
    trackers/wandb/        to upload:    wandb sync RUN/trackers/wandb/offline-run-*

Whatever goes wrong with one of them after the start is said in one line, and training goes on
without it: ``metrics.jsonl`` has the same numbers.
"""

import importlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..atomic import write_text
from ..errors import UserError, one_line
from .log import warn

#: Trackio's and Weights & Biases' name for what belongs together.
PROJECT = "agevlm"
_MODULES = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}


class Writer(Protocol):
    """One package's run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name at a step."""
        ...

    def close(self) -> None:
        """Write what is still in memory."""
        ...


def require(names: Sequence[str]) -> None:
    """``UserError`` unless the packages of these trackers can be imported."""
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except Exception as error:  # also what a broken package raises
            raise UserError(
                f"train.report_to: {name} needs the package {_MODULES[name]} "
                f"({one_line(error)}); pip install 'agevlm-mlx[{name}]'"
            ) from None


def open_trackers(
    names: Sequence[str], run: Path, recipe: Mapping[str, Any], step: int
) -> list["Tracker"]:
    """An observer of the trainer for each of `names`; for `run`, which goes on after `step`.

    recipe: its tables, to be shown with the run. ``UserError`` if a package is missing.
    """
    require(names)
    if not names:
        return []
    folder = run / "trackers"
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(folder)
    made: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", step),
        "trackio": lambda: Trackio(run.resolve().name, identity, recipe),
        "wandb": lambda: WeightsAndBiases(folder, run.resolve().name, identity, recipe),
    }
    return [Tracker(name, made[name]) for name in dict.fromkeys(names)]


def _identity(folder: Path) -> str:
    """What the run is called elsewhere: made up once."""
    path = folder / "id"
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if known.isalnum() and len(known) == 8:
        return known
    identity = uuid.uuid4().hex[:8]
    write_text(path, identity + "\n")
    return identity


class Tracker:
    """An observer of the trainer that hands every row on and survives whatever that raises."""

    def __init__(self, name: str, make: Callable[[], Writer]):
        self.name = name
        self._writer: Writer | None = None
        self._writer = self._try(make)

    def row(self, row: Mapping[str, Any]) -> None:
        """Hand on the numbers of a row of ``metrics.jsonl``."""
        writer, step = self._writer, row["step"]
        if writer is not None:
            self._try(lambda: writer.write(step, named(row)))

    def look(self, step: int, model: Any) -> None:
        """Nothing: pictures are in the run's folder."""

    def close(self) -> None:
        """End the package's run."""
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            self._writer = None
            warn(
                f"train.report_to: {self.name} failed ({one_line(error)}); "
                "going on without it, metrics.jsonl has the numbers"
            )
            return None


def named(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under names that group them: ``train/lm``, ``validation/lm``."""
    numbers = {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {
        f"validation/{name.removeprefix('val_')}" if name[:4] == "val_" else f"train/{name}": value
        for name, value in numbers.items()
    }


class TensorBoard:
    """Event files of TensorBoard, by tensorboardX, which needs neither torch nor TensorFlow.

    Its SummaryWriter is not used: it writes in a thread that a full disk ends, and then blocks
    for ever. A resumed run begins a file that tells TensorBoard to forget the steps after `step`.
    """

    #: Seconds between two flushes.
    every = 30.0

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter  # pyright: ignore[reportMissingImports]
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportMissingImports]
        from tensorboardX.summary import scalar  # pyright: ignore[reportMissingImports]

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        # Files are named after the second, and read in the order of their names.
        self._file = EventsWriter(str(folder / "events"), f".{step:09d}-{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self._add(step=step + 1, file_version="brain.Event:2")
        self._add(step=step + 1, session_log=start)
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step=step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > self.every:
            self._file.flush()
            self._flushed = time.monotonic()

    def _add(self, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), **content))

    def close(self) -> None:
        self._file.close()


class Trackio:
    """A run of Trackio, in its own data base on this machine (``trackio show``)."""

    def __init__(self, name: str, identity: str, recipe: Mapping[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=PROJECT, name=f"{name}-{identity}", config=dict(recipe), resume="allow",
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        # Trackio keeps every value of a step. It knows, but does not tell, what it has already:
        # without this a resumed run would show the steps since its checkpoint twice.
        self._next = getattr(self._run, "_next_step", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class WeightsAndBiases:
    """A run of Weights & Biases; offline unless ``WANDB_MODE`` says otherwise.

    Online, steps that it has already are ignored by it, so a resumed run has no repeats.
    """

    def __init__(self, folder: Path, name: str, identity: str, recipe: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, id=identity,
            resume="allow", dir=str(folder), config=dict(recipe),
            mode=os.environ.get("WANDB_MODE", "offline"),  # pyright: ignore[reportArgumentType]
            # The console is ours: its copy of a line that rewrites itself would be endless.
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
