"""`agevlm demo`: what is done again, what is kept, and who may work in a folder."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agevlm_mlx import demo, steps
from agevlm_mlx.errors import UserError
from agevlm_mlx.evaluation import report


def step(folder: Path, inputs: object, code: str = "demo.py", fresh: bool = False) -> bool:
    """Run a step as a new process would; was its work done (and not kept)?"""
    worked = []

    def work() -> dict[str, int]:
        worked.append(1)
        (folder / "made").touch()
        return {"n": 3}

    again = steps.Steps(folder, fresh)
    result = again.do("draw", work, inputs=inputs, code=[code], makes=[folder / "made"])
    assert result == {"n": 3}
    assert again.record[0]["name"] == "draw"
    assert again.record[0]["seconds"] >= 0
    assert again.record[0]["reused"] is not bool(worked)
    return bool(worked)


def test_a_step_is_kept_only_when_inputs_and_code_are_the_same(tmp_path):
    assert step(tmp_path, {"n": 1})
    assert not step(tmp_path, {"n": 1})
    assert step(tmp_path, {"n": 2})
    assert step(tmp_path, {"n": 2}, code="cli.py")
    assert not step(tmp_path, {"n": 2}, code="cli.py")
    assert step(tmp_path, {"n": 2}, code="cli.py", fresh=True)


def test_what_was_deleted_is_made_again(tmp_path):
    assert step(tmp_path, 1)
    (tmp_path / "made").unlink()
    assert step(tmp_path, 1)
    (tmp_path / "steps.json").write_text("{damaged")
    assert step(tmp_path, 1)


def test_other_versions_do_everything_again(tmp_path, monkeypatch):
    assert step(tmp_path, 1)
    monkeypatch.setattr(steps, "versions", lambda: {"mlx": "another"})
    assert step(tmp_path, 1)


def test_code_is_the_content_of_files(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text("one")
    monkeypatch.setattr(steps, "__file__", str(tmp_path / "steps.py"))
    before = steps.code_digest(["part"])
    (tmp_path / "part" / "__pycache__").mkdir()
    (tmp_path / "part" / "__pycache__" / "a.pyc").write_text("cache")
    assert steps.code_digest(["part", "missing"]) == before
    (tmp_path / "part" / "a.py").write_text("two")
    assert steps.code_digest(["part"]) != before


def test_a_step_that_failed_is_done_again_and_knows_how_far_it_came(tmp_path):
    def begin(inputs: int, fail: bool, fresh: bool = False) -> object:
        again = steps.Steps(tmp_path, fresh)
        found = []

        def work() -> None:
            found.append(again.begun("train"))
            again.mark("train", {"guided": 5.0})
            if fail:
                raise UserError("stopped")

        with contextlib.suppress(UserError):
            again.do("train", work, inputs=inputs, code=["demo.py"], makes=[])
        return found[0]

    assert begin(1, fail=True) is None
    assert begin(1, fail=True) == {"guided": 5.0}
    assert begin(2, fail=True) is None  # with other inputs there is nothing to go on with
    assert begin(2, fail=True, fresh=True) is None
    assert begin(2, fail=False) == {"guided": 5.0}
    assert begin(2, fail=True, fresh=True) is None


HOLD = """
import sys, time
from pathlib import Path
from agevlm_mlx import demo, steps
with steps.claim(Path(sys.argv[1])):
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
    with steps.claim(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_command_that_outlives_its_demo_still_holds_the_lock(tmp_path):
    with steps.claim(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    try:
        with pytest.raises(UserError, match="another run"), steps.claim(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with steps.claim(tmp_path):
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


@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the teacher needs torch")
def test_a_small_demo_from_nothing_to_a_report_and_again(tmp_path):
    command = [sys.executable, "-m", "agevlm_mlx.demo", "--out", str(tmp_path / "d")]
    command += ["--steps-scale", "0.005"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=600) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert "unchanged" not in first.stdout
    names = ["scenes", "teach", "train", "evaluate", "answer"]
    assert re.findall(r"^(\w+): unchanged, kept", second.stdout, re.MULTILINE) == names
    out = tmp_path / "d"
    result = json.loads((out / "report.json").read_text())
    for arm in ("concat", "guided"):
        one = result["arms"][arm]
        for split in ("random", "popular", "adversarial"):
            assert set(report.POPE_KEYS) <= set(one["pope"][split])
        for key in ("matching_auroc", "pointing_game", "energy_in_mask", "chair_i"):
            assert 0 <= one[key] <= 1
        assert one["train_seconds"] > 0
    assert [step["name"] for step in result["steps"]] == names
    assert all(step["reused"] for step in result["steps"])
    assert any(line.startswith("agevlm train --recipe scenes ") for line in result["commands"])
    assert (out / "report.html").read_text().count("<img") == 3 * 8
    assert (out / "answer.png").read_bytes().startswith(b"\x89PNG")
