"""metrics.jsonl has no gap and no repeat; the progress line fits where it is shown."""

import io
import json
from pathlib import Path

import pytest

from agevlm_mlx.training.log import Metrics, Progress, read_metrics


def write(path: Path, first: int, last: int, at: int) -> None:
    metrics = Metrics(path, at)
    for step in range(first, last + 1):
        metrics.write(step=step, loss=1 / step)
    metrics.close()


def test_resuming_cuts_what_the_checkpoint_does_not_know(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 7, at=0)
    write(path, 5, 9, at=4)
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 10))


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', '{"ste', "4"])
def test_a_line_cut_by_a_crash_is_dropped(tmp_path: Path, torn: str):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3, at=0)
    with open(path, "a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    write(path, 4, 5, at=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO) -> str:
    progress = Progress(total=7, done=0, every=3, stream=stream)
    for step in range(1, 8):
        progress.step(step, "guide", {"loss": 0.5}, tokens=100, waited=0.0, peak=3 << 20)
    progress.close()
    return stream.getvalue()


def test_a_file_gets_a_line_now_and_then_and_the_last():
    lines = run(io.StringIO()).splitlines()
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert "guide | loss 0.5 |" in lines[0]
    assert "tok/s, data wait 0%, peak 3 MiB, ETA 0:00" in lines[0]


def test_a_terminal_gets_one_line_that_rewrites_itself():
    text = run(Terminal())
    assert text.count("\r") == 7
    assert text.count("\n") == 1
