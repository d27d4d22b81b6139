"""metrics.jsonl has no gap and no repeat; the progress line fits where it is shown."""

import errno
import io
import json
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agevlm_mlx.training.log import Metrics, Progress, metrics_rows, read_metrics


def write(path: Path, first: int, last: int, at: int) -> None:
    metrics = Metrics(path, at)
    for step in range(first, last + 1):
        metrics.write(step=step, loss=1 / step)
    metrics.close()


def steps(path: Path) -> list[int]:
    """The steps of a file all of whose lines are rows."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resuming_cuts_what_the_checkpoint_does_not_know(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 7, at=0)
    write(path, 5, 9, at=4)
    assert steps(path) == list(range(1, 10))


def test_a_step_may_have_a_row_of_its_validation(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write(step=1, loss=1.0)
    metrics.write(step=1, val_lm=2.0)
    metrics.write(step=2, loss=1.0)
    metrics.close()
    Metrics(path, 1).close()
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 1, "val_lm": 2.0}]


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "lo', '{"step": 4}', '{"ste', "4", '{"step": "4"}\n', "\0" * 30, "\xff"]
)
def test_a_line_cut_by_a_crash_is_dropped(
    tmp_path: Path, torn: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3, at=0)
    with open(path, "a", encoding="latin-1") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    write(path, 4, 5, at=4)
    assert steps(path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""  # a kill leaves such a line: nothing to worry about


@pytest.mark.parametrize("torn", ['{"step": 2, "lo\n', "\n", "[" * 5000 + "\n", "null\n"])
def test_damage_in_the_middle_costs_its_own_line_only(
    tmp_path: Path, torn: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn + '{"step": 3}\n{"step": 4}\n')
    assert [row["step"] for row in metrics_rows(path)] == [1, 3, 4]
    write(path, 4, 4, at=3)
    assert steps(path) == [1, 3, 4]
    assert capsys.readouterr().err.strip() == f"warning: {path}: left out 1 damaged line(s)"


def test_numbers_that_are_not_finite_are_still_json(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write(step=1, loss=float("nan"), norm=float("inf"), val_pointing=None)
    metrics.close()
    assert read_metrics(path) == [{"step": 1, "loss": None, "norm": None, "val_pointing": None}]


class FullDisk:
    """A file on a disk that takes `room` more bytes, and so part of a row."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(bytes(data)[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_leaves_whole_rows_and_can_be_closed(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write(step=1)
    metrics._file = FullDisk(metrics._file, 5)
    with pytest.raises(OSError, match="No space"):
        metrics.write(step=2)
    metrics._file.room = 100  # some was freed
    metrics.write(step=2)
    metrics.close()
    assert steps(path) == [1, 2]


def test_a_long_file_is_never_in_memory(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"step": n, "loss": "x" * 60}) + "\n" for n in range(1, 20001))
    size = path.stat().st_size
    tracemalloc.start()
    Metrics(path, 19000).close()
    last = sum(1 for _ in metrics_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last == 19000
    assert peak < size / 8


# --- the progress line -------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the only item of a list."""
    time_now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: time_now[0])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    return time_now


def stage(name: str, steps: int, texts: int = 1) -> Any:
    return SimpleNamespace(name=name, steps=steps, batch_size=4, texts=[SimpleNamespace(n=texts)])


class Run:
    """A run whose steps take as long as they are told to."""

    def __init__(self, stages: list[Any], now: list[float], stream: io.StringIO, **given: int):
        self.now, self.stream = now, stream
        self.progress = Progress(stages, given.get("done", 0), given.get("every", 3), stream)

    def step(self, number: int, name: str = "guide", seconds: float = 2.0, **parts: float) -> str:
        self.now[0] += seconds
        self.progress.step(
            number, name, parts or {"loss": 0.5},
            tokens=100, images=4, seconds=seconds, waited=seconds / 4, peak=3 << 20,
        )  # fmt: skip
        return self.stream.getvalue().splitlines()[-1] if self.stream.getvalue() else ""


def test_a_file_gets_a_line_now_and_then_and_the_last(now: list[float]):
    run = Run([stage("guide", 7)], now, io.StringIO())
    for number in range(1, 8):
        run.step(number)
    run.progress.close()
    lines = run.stream.getvalue().splitlines()
    assert lines[0] == (
        "step 3/7 guide | loss 0.5 | 50 tok/s 2 img/s, data wait 25%, peak 3 MiB, ETA 0:08"
    )
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]


def test_a_terminal_gets_one_line_that_rewrites_itself(now: list[float]):
    run = Run([stage("guide", 7)], now, Terminal())
    for number in range(1, 8):
        run.step(number)
    run.progress.close()
    run.progress.close()
    text = run.stream.getvalue()
    assert text.count("\r") == 7
    assert text.count("\n") == 1


@pytest.mark.parametrize("columns", [200, 100, 80, 60, 40, 12])
def test_the_line_never_reaches_the_terminal_s_edge(
    now: list[float], columns: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    run = Run([stage("guide", 7)], now, Terminal())
    line = run.step(1, loss=1.23456, lm=1.0, attention=0.25, norm=0.5).split("\x1b[K")[-1]
    assert len(line) < columns
    assert line.startswith("step 1/7 gu")
    assert ("ETA" in line) == (columns >= 40)
    assert ("50 tok/s, wait 25%, 3 MiB, ETA" in line) == (columns in (80, 100))
    assert ("attention" in line) == (columns >= 100)
    assert ("img/s, data wait 25%, peak 3 MiB" in line) == (columns == 200)


def test_a_stage_s_means_and_rates_are_its_own(now: list[float]):
    run = Run([stage("align", 3), stage("guide", 3)], now, Terminal(), every=5)
    for step in (1, 2, 3):
        run.step(step, "align", 2.0, loss=8.0)
    line = run.step(4, "guide", 4.0, loss=2.0, attention=1.0)
    assert "guide | loss 2 attention 1 | 25 tok/s" in line


def test_means_are_of_the_last_steps_shown(now: list[float]):
    run = Run([stage("guide", 9)], now, io.StringIO(), every=2)
    for number, loss in enumerate((9.0, 9.0, 1.0, 3.0), 1):
        line = run.step(number, loss=loss)
    assert "loss 2 " in line


def test_validation_between_steps_lowers_no_rate_but_counts_in_the_eta(now: list[float]):
    run = Run([stage("guide", 12)], now, io.StringIO(), every=1)
    run.step(1, seconds=1.0)
    now[0] += 9.0
    line = run.step(2, seconds=1.0)
    assert "| 100 tok/s" in line
    assert "ETA 1:40" in line


def test_the_eta_knows_that_a_later_stage_has_more_texts(now: list[float]):
    run = Run([stage("align", 4), stage("guide", 10, texts=6)], now, io.StringIO(), every=1)
    run.step(1, "align", 30.0)  # pays for what is set up once
    line = run.step(2, "align", 1.0)
    assert "ETA 1:02" in line  # 2 x 1 s and 10 x 6 s
    run.step(5, "guide", 60.0)
    assert "ETA 0:32" in run.step(6, "guide", 4.0)  # 8 x 4 s


def test_a_resumed_run_counts_only_its_own_steps(now: list[float]):
    run = Run([stage("guide", 1004)], now, io.StringIO(), done=1000, every=1)
    run.step(1001, seconds=50.0)
    line = run.step(1002, seconds=3.0)
    assert "ETA 0:06" in line
    run.progress.summary()
    assert run.stream.getvalue().splitlines()[-1].startswith("2 steps in 0:53: ")


def test_the_summary_says_what_the_run_took(now: list[float]):
    run = Run([stage("guide", 4)], now, Terminal())
    for number in (1, 2, 3):
        run.step(number)
    assert ", 1 skipped |" in run.step(4, skipped=1.0)
    run.progress.summary(bad_records=1)
    run.progress.close()
    before, last, end = run.stream.getvalue().split("\n")
    assert before.endswith("ETA 0:00")
    assert last == (
        "4 steps in 0:08: 50 tok/s, 2 img/s, 25.0% of the steps' time waited for data; "
        "1 batch skipped, 1 bad record"
    )
    assert end == ""


def test_a_run_without_a_step_has_no_summary(now: list[float]):
    run = Run([stage("guide", 4)], now, Terminal(), done=4)
    run.progress.summary()
    run.progress.close()
    assert run.stream.getvalue() == ""
