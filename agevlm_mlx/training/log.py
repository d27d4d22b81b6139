"""What a run tells: ``metrics.jsonl`` for programs, one progress line for people."""

import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..atomic import write_file
from .stages import Stage

#: Longer lines than this are no rows of ours; a damaged file is not read into memory whole.
_LONGEST = 1 << 20


class Metrics:
    """``metrics.jsonl``: one JSON object a line, each with its ``step`` (counted from 1).

    Opened at the step a run goes on from: rows after it, which the checkpoint does not know,
    are left out, and so are lines that a crash or a full disk has cut off. So a resumed run
    has neither gap nor repeat.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            damaged = _keep_until(path, step)
            if damaged:
                warn(f"{path}: left out {damaged} damaged line(s)")
        # Without a buffer: what could not be written must not be tried again at the end.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)

    def write(self, **row: Any) -> None:
        """Append one row; it is with the operating system when this returns.

        Numbers that are not finite are written as null, which JSON has. ``OSError`` when the
        disk is full; no part of the row is then in the file.
        """
        line = json.dumps({k: _finite(v) for k, v in row.items()}, allow_nan=False) + "\n"
        self._append(line.encode())

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:  # a disk that is filling up takes a part
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(end)
            raise

    def sync(self) -> None:
        """Flush the rows to the disk; before the checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a metrics file and its row; None for a line that is none."""
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
                row = None
            good = isinstance(row, dict) and type(row.get("step")) is int
            yield line, row if good else None


def _keep_until(path: Path, step: int) -> int:
    """Leave out of a metrics file what is not a row of a step up to `step`.

    Returns how many damaged lines stood between rows (not at the end, where a kill leaves one).
    """
    damaged = pending = 0

    def write(temporary: Path) -> None:
        nonlocal damaged, pending
        with open(temporary, "wb") as file:
            for line, row in _lines(path):
                if row is None:
                    pending += 1
                elif row["step"] <= step:
                    damaged, pending = damaged + pending, 0
                    file.write(line)

    write_file(path, write)
    return damaged


def metrics_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, one at a time; damaged lines are passed over."""
    return (row for _, row in _lines(path) if row is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``."""
    return list(metrics_rows(path))


class Progress:
    """A line that rewrites itself on a terminal, and one line each `every` steps elsewhere.

    Means and rates are of the last `every` steps of the current stage, by the steps' own times:
    what comes between steps (validation, checkpoints) does not lower them, but counts in the
    ETA. That is the time a step of this stage has taken in this process, all told; for the
    stages to come it is scaled by the texts of a step.
    """

    def __init__(
        self, stages: Sequence[Stage], done: int, every: int, stream: IO[str] | None = None
    ):
        self.stages, self.every = tuple(stages), every
        self.total = sum(stage.steps for stage in self.stages)
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._first, self._start = done, time.perf_counter()
        self._stage = ""
        self._recent: deque[Mapping[str, float]] = deque(maxlen=every)
        self._costs: deque[dict[str, float]] = deque(maxlen=every)
        self._all: dict[str, float] = {"tokens": 0, "images": 0, "seconds": 0, "waited": 0}
        self._skipped = 0
        self._step = done

    def step(
        self,
        step: int,
        stage: str,
        parts: Mapping[str, float],
        *,
        tokens: int,
        images: int,
        seconds: float,
        waited: float,
        peak: int,
    ) -> None:
        """Account for a finished step and show it when it is due.

        `parts`: the numbers to show by name, as means over the last `every` steps; ``skipped``
        alone for a step that changed nothing. `tokens`, `images`: of the batch. `seconds`: the
        step's own time, `waited`: the part of it spent waiting for data. `peak`: bytes of the
        highest memory use so far.
        """
        now = time.perf_counter()
        if stage != self._stage:
            self._stage = stage
            self._recent.clear()
            self._costs.clear()
            # The first step also pays for what is set up once, so the clock starts after it.
            self._entered = (step, now, seconds)
        cost = {"tokens": tokens, "images": images, "seconds": seconds, "waited": waited}
        self._costs.append(cost)
        self._all = {name: total + cost[name] for name, total in self._all.items()}
        self._step = step
        if "skipped" in parts:
            self._skipped += 1
        else:
            self._recent.append(parts)
        if self.live or step % self.every == 0 or step == self.total:
            line = self._line(step, now, peak)
            if self.live:
                print(f"\r\x1b[K{line}", end="", file=self.stream, flush=True)
            else:
                print(line, file=self.stream, flush=True)

    def _line(self, step: int, now: float, peak: int) -> str:
        """The line, on a terminal the first of these forms that fits: shorter and shorter."""
        head = f"step {step}/{self.total} {self._stage} | "
        sums = {name: sum(cost[name] for cost in self._costs) for name in self._all}
        seconds = max(sums["seconds"], 1e-9)
        means = list(self._means().items())
        all_losses = " ".join(f"{name} {value:.4g}" for name, value in means)
        short = [f"{name} {value:.3g}" for name, value in means]
        speed, wait = f"{sums['tokens'] / seconds:.0f} tok/s", f"{sums['waited'] / seconds:.0%}"
        images, memory = f" {sums['images'] / seconds:.3g} img/s", memory_text(peak)
        skipped = f", {self._skipped} skipped" if self._skipped else ""
        eta = f", ETA {clock(self._left(step, now))}"
        end = f", data wait {wait}, peak {memory}{eta}"
        forms = [
            f"{head}{all_losses}{skipped} | {speed}{images}{end}",
            f"{head}{all_losses}{skipped} | {speed}{end}",
            f"{head}{' '.join(short)}{skipped} | {speed}, wait {wait}, {memory}{eta}",
            f"{head}{''.join(short[:1])}{skipped} | {speed}, wait {wait}, {memory}{eta}",
            f"{head}{''.join(short[:1])}{eta}",
            f"{head}{''.join(short[:1])}",
        ]
        if not self.live:
            return forms[0]
        # A terminal that is a column too narrow starts a new line, which \r does not undo.
        width = shutil.get_terminal_size().columns - 1
        return next((form for form in forms if len(form) <= width), forms[-1][:width])

    def _means(self) -> dict[str, float]:
        names = self._recent[-1] if self._recent else {}
        values = {name: [p[name] for p in self._recent if name in p] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}

    def _left(self, step: int, now: float) -> float:
        """Seconds to the end of the run."""
        first, since, one = self._entered
        rate = (now - since) / (step - first) if step > first else one
        left, end, current = 0.0, 0, None
        for stage in self.stages:
            end += stage.steps
            if step > end:
                continue
            if current is None:
                current = _texts(stage)
                left += (end - step) * rate
            else:
                left += stage.steps * rate * _texts(stage) / current
        return left

    def say(self, text: str) -> None:
        """Print a line of its own."""
        print(f"\r\x1b[K{text}" if self.live else text, file=self.stream, flush=True)

    def summary(self, bad_records: int = 0) -> None:
        """Say in one line what the steps of this process took."""
        steps, seconds = self._step - self._first, max(self._all["seconds"], 1e-9)
        if not steps:
            return
        self.close()
        self.live = False
        self.say(
            f"{_count(steps, 'step')} in {clock(time.perf_counter() - self._start)}: "
            f"{self._all['tokens'] / seconds:.0f} tok/s, {self._all['images'] / seconds:.3g} img/s,"
            f" {self._all['waited'] / seconds:.1%} of the steps' time waited for data; "
            f"{_count(self._skipped, 'batch', 'batches')} skipped, "
            f"{_count(bad_records, 'bad record')}"
        )

    def close(self) -> None:
        """Leave the rewriting line."""
        if self.live and self._step > self._first:
            print(file=self.stream, flush=True)
            self.live = False


def _texts(stage: Stage) -> int:
    """Texts of a step: about what its time is proportional to."""
    return stage.batch_size * sum(spec.n for spec in stage.texts)


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def warn(text: str) -> None:
    """Print a warning, on a terminal over the progress line that may stand there."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}warning: {text}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def memory_text(n: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
