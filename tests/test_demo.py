"""`agevlm demo`: what is done again, what is kept, and who may work in a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agevlm_mlx import demo
from agevlm_mlx.errors import UserError


def opened(folder: Path, fresh: bool = False) -> demo.Demo:
    """The demo of a folder as a new process sees it."""
    notes = folder / "steps.json"
    done = json.loads(notes.read_text()) if notes.is_file() else {}
    return demo.Demo(folder, 1.0, fresh, done=done)


def step(one: demo.Demo, inputs: object, code: str = "demo.py") -> bool:
    """Run a step; was its work done (and not kept)?"""
    worked = []
    result = one.step("draw", inputs, [code], lambda: worked.append(1) or {"n": 3})
    assert result == {"n": 3}
    return bool(worked)


def test_a_step_is_kept_only_when_inputs_and_code_are_the_same(tmp_path):
    assert step(opened(tmp_path), {"n": 1})
    assert not step(opened(tmp_path), {"n": 1})
    assert step(opened(tmp_path), {"n": 2})
    assert step(opened(tmp_path), {"n": 2}, code="cli.py")
    assert not step(opened(tmp_path), {"n": 2}, code="cli.py")
    assert step(opened(tmp_path, fresh=True), {"n": 2}, code="cli.py")


def test_another_package_version_does_everything_again(tmp_path, monkeypatch):
    assert step(opened(tmp_path), 1)
    monkeypatch.setattr(demo, "versions", lambda: {"mlx": "another"})
    assert step(opened(tmp_path), 1)


def test_code_is_the_content_of_files(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text("one")
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "demo.py"))
    before = demo._code(["part"])
    (tmp_path / "part" / "__pycache__").mkdir()
    (tmp_path / "part" / "__pycache__" / "a.pyc").write_text("cache")
    assert demo._code(["part"]) == before
    (tmp_path / "part" / "a.py").write_text("two")
    assert demo._code(["part"]) != before
    assert demo._code(["part", "missing"]) != before or not (tmp_path / "missing").exists()


def test_a_step_that_failed_is_done_again_and_knows_it_was_begun(tmp_path):
    one = opened(tmp_path)

    def fail() -> None:
        one.mark("train", "begun", {"guided": 5.0})
        raise UserError("stopped")

    with pytest.raises(UserError):
        one.step("train", 1, ["demo.py"], fail)
    again = opened(tmp_path)
    assert again.begun("train")
    assert not opened(tmp_path, fresh=True).begun("train")
    seen = []
    again.step("train", 1, ["demo.py"], lambda: seen.append(again.begun("train")))
    assert seen == [True]
    other = opened(tmp_path)  # with other inputs there is nothing to go on with
    other.step("train", 2, ["demo.py"], lambda: seen.append(other.begun("train")))
    assert seen == [True, False]


def test_times_and_kept_steps_are_reported(tmp_path):
    step(opened(tmp_path), 1)
    one = opened(tmp_path)
    step(one, 1)
    assert [(s["name"], s["reused"]) for s in one.steps] == [("draw", True)]
    assert one.steps[0]["seconds"] >= 0


HOLD = """
import sys, time
from pathlib import Path
from agevlm_mlx import demo
with demo._lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_demo_in_the_folder_is_refused_until_the_first_is_gone(tmp_path, capsys):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert demo.main(["--out", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert f"process {first.pid}" in message
    finally:
        first.kill()
        first.wait()
    # Killed without a chance to clean up: the lock is free all the same.
    with demo._lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_command_that_outlives_its_demo_still_holds_the_lock(tmp_path):
    with demo._lock(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    try:
        with pytest.raises(UserError, match="another demo"), demo._lock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with demo._lock(tmp_path):
        pass


def test_progress_reads_the_newest_whole_row_of_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert demo._last_row(path) is None
    rows = [{"step": 1, "lm": 3.0}, {"step": 2, "lm": 2.0}, {"step": 2, "val_lm": 2.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "l')
    assert demo._last_row(path) == {"step": 2, "lm": 2.0}
    path.write_text("x" * 10_000 + "\n" + json.dumps(rows[0]) + "\n")
    assert demo._last_row(path) == rows[0]


@pytest.mark.parametrize("scale", ["0", "-1", "1000"])
def test_a_senseless_scale_is_refused(scale, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "d"), "--steps-scale", scale]) == 2
    assert "--steps-scale" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
