"""Commands side by side: logs to files, one progress line, and no process left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

#: Seconds between progress lines where the output is not a terminal.
QUIET_SECONDS = 30.0
#: Seconds a stopped command has to save what it has.
GRACE = 60.0
#: One thread for each of two processes side by side beats two threads for each.
ONE_THREAD = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}


@dataclass(frozen=True)
class Task:
    """A command, and the file that takes what it prints."""

    name: str
    command: Sequence[str]
    log: Path


def run(
    tasks: Sequence[Task],
    *,
    status: Callable[[], str],
    together: bool = True,
    env: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
    poll: float = 0.5,
) -> dict[str, float]:
    """Run the tasks, side by side or one after the other; seconds that each took, by name.

    `status` gives the progress line. `keep` are file descriptors the commands inherit (a lock
    they share). When one fails the others are stopped, its last lines are shown and
    ``UserError`` names its log. Ctrl-C reaches every command once, as a request to save and end.
    """
    if not together:
        return {k: v for t in tasks for k, v in _run([t], status, env, keep, poll).items()}
    return _run(tasks, status, env, keep, poll)


def _run(
    tasks: Sequence[Task],
    status: Callable[[], str],
    env: Mapping[str, str] | None,
    keep: Sequence[int],
    poll: float,
) -> dict[str, float]:
    start = time.monotonic()
    seconds: dict[str, float] = {}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for task in tasks:
            processes[task.name] = begin(task, env, keep)
        line = Line()
        while len(seconds) < len(tasks):
            for task in tasks:
                code = processes[task.name].poll()
                if code is None or task.name in seconds:
                    continue
                seconds[task.name] = time.monotonic() - start
                if code != 0:
                    line.end()
                    raise UserError(failure(task, code))
            line.show(status)
            time.sleep(poll)
        line.end()
    except BaseException:
        stop(list(processes.values()))
        raise
    return seconds


def begin(
    task: Task, env: Mapping[str, str] | None = None, keep: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    """Start a task's command, which writes its log; env and keep as for `run`."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "wb") as log, _heard():
        # A session of its own: the terminal's Ctrl-C comes here alone, and is passed on once
        # (a second one would make a command leave without saving).
        return subprocess.Popen(
            list(task.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            pass_fds=tuple(keep),
            start_new_session=True,
        )


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Commands begun inside hear SIGINT, which is how they are stopped, also where this process
    was put into the background by a shell that has it ignored."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def failure(task: Task, code: int) -> str:
    """Print the last lines of a command that failed; says how it ended, and where all are."""
    text = task.log.read_text(encoding="utf-8", errors="replace")
    lines = text.replace("\r", "\n").rstrip().splitlines()[-12:]
    print("\n".join(f"  {task.name} | {line}" for line in lines), file=sys.stderr)
    how = f"signal {-code}" if code < 0 else f"exit {code}"
    return f"{task.name} failed ({how}); its last lines are above, all of them in {task.log}"


def stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Ask every running process to end, wait for it to save, and kill it if it does not."""
    running = [process for process in processes if process.poll() is None]
    try:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        end = time.monotonic() + GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
    finally:  # also after a second Ctrl-C
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


class Line:
    """The progress: rewritten in place on a terminal, else a line every half minute."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self._last, self._text = 0.0, ""

    def show(self, status: Callable[[], str]) -> None:
        now = time.monotonic()
        if now - self._last < (1.0 if self.live else QUIET_SECONDS):
            return
        self._last = now
        text = status()
        if text and text != self._text:
            print(f"\r\x1b[K  {text}" if self.live else f"  {text}", end="", flush=True)
            if not self.live:
                print(flush=True)
            self._text = text

    def end(self) -> None:
        if self.live and self._text:
            print(flush=True)
        self._text = ""


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """While inside, SIGTERM ends this process as Ctrl-C does, so that commands are stopped."""

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def newest_line(folder: Path, pattern: str) -> str:
    """The last line of the log that was written to last."""
    logs = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    lines = tail(logs[-1]).replace("\r", "\n").strip().splitlines() if logs else []
    return lines[-1].strip()[:100] if lines else ""


def tail(path: Path, size: int = 4096) -> str:
    """The end of a file that may still be written to; nothing when it is not there yet."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
