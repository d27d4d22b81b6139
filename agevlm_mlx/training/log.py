"""What a run tells: ``metrics.jsonl`` for programs, one progress line for people."""

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from ..atomic import write_text


class Metrics:
    """``metrics.jsonl``: one JSON object a line, each with its ``step`` (counted from 1).

    Opened at the step a run goes on from: lines after it, which the checkpoint does not know,
    are cut, so that a resumed run has neither gap nor repeat.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            write_text(
                path, "".join(line for line in _rows(path) if json.loads(line)["step"] <= step)
            )
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, **row: Any) -> None:
        """Append one row; it is with the operating system when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush the rows to the disk; before the checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _rows(path: Path) -> list[str]:
    """The whole lines of a metrics file, up to one that a crash cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        if line.endswith("\n"):
            rows.append(line)
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in _rows(path)]


class Progress:
    """A line that rewrites itself on a terminal, and one line each `every` steps elsewhere."""

    def __init__(self, total: int, done: int, every: int, stream: IO[str] | None = None):
        self.total, self.every = total, every
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self._first, self._start = done, time.perf_counter()
        self._recent: deque[dict[str, float]] = deque(maxlen=every)
        self._since = (time.perf_counter(), 0, 0.0)  # time, text tokens, seconds waited for data
        self._tokens = 0
        self._waited = 0.0

    def step(
        self,
        step: int,
        stage: str,
        parts: dict[str, float],
        *,
        tokens: int,
        waited: float,
        peak: int,
    ) -> None:
        """Account for a finished step and show it when it is due.

        `parts`: the numbers to show by name, as means over the last `every` steps. `tokens`:
        text tokens of the batch. `waited`: seconds the step waited for its data. `peak`: bytes of
        the highest memory use so far.
        """
        self._recent.append(parts)
        self._tokens += tokens
        self._waited += waited
        if not (self.live or step % self.every == 0 or step == self.total):
            return
        now = time.perf_counter()
        then, tokens_then, waited_then = self._since
        seconds = max(now - then, 1e-9)
        left = (now - self._start) / max(step - self._first, 1) * (self.total - step)
        means = {name: [p[name] for p in self._recent if name in p] for name in parts}
        line = (
            f"step {step}/{self.total} {stage} | "
            + " ".join(f"{name} {sum(v) / len(v):.4g}" for name, v in means.items())
            + f" | {(self._tokens - tokens_then) / seconds:.0f} tok/s, data wait "
            f"{(self._waited - waited_then) / seconds:.0%}, peak {memory_text(peak)}, "
            f"ETA {_clock(left)}"
        )
        if step % self.every == 0:
            self._since = (now, self._tokens, self._waited)
        if self.live:
            print(f"\r\x1b[K{line}", end="", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        print(f"\r\x1b[K{text}" if self.live else text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the rewriting line."""
        if self.live:
            print(file=self.stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def memory_text(n: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
