"""kill -9 again and again, while scenes are drawn, SAM labels them, and the model trains."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from agevlm_mlx.training import checkpoint
from agevlm_mlx.training.log import read_metrics

KILLS_BEFORE, KILLS_IN_TRAINING, STEPS = 5, 15, 60
#: Columns that tell the time.
CLOCKS = {"seconds", "waited"}


def command(folder: Path) -> list[str]:
    """The tiny recipe with its data made on the way, below `folder`."""
    return [
        *(sys.executable, "-m", "agevlm_mlx.train"),
        *("--recipe", str(Path(__file__).with_name("tiny.toml"))),
        *("--out", str(folder / "run")),
        *(f"data.{key}={folder / key}" for key in ("train", "val", "store", "val_store")),
        "data.scenes={n=24, val=6, seed=3}",
        "data.teach=true",
        "train.checkpoint_every=4",
        "train.pictures_every=20",
        "train.ema=0.9",
        f"stages.1.steps={STEPS - 6}",
    ]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the teacher dies with it, as in a power cut
    )


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def reached(run: Path, step: int) -> bool:
    try:
        return f'{{"step": {step},' in (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return False


def finish(arguments: list[str]) -> None:
    out, _ = start(arguments).communicate(timeout=600)
    assert "wrote" in out, out


@pytest.mark.chaos
def test_killed_twenty_times_equals_undisturbed(tmp_path: Path):
    rng = random.Random(20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    finish(command(whole))

    run, kills = killed / "run", 0

    def go_on() -> list[str]:
        """What a person would type next."""
        if (run / "config.toml").is_file():
            return [*command(killed)[:3], "--resume", str(run)]
        return command(killed)

    for _ in range(KILLS_BEFORE):
        process = start(go_on())
        time.sleep(rng.uniform(0.5, 5))
        assert process.poll() is None, process.communicate()[0]
        kill(process)
        kills += 1
    for step in sorted(rng.sample(range(1, STEPS), KILLS_IN_TRAINING)):
        process = start(go_on())
        while not reached(run, step):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None:
            kill(process)
            kills += 1
    assert kills >= 19  # the last may have come too late
    finish(go_on())

    assert metrics(run) == metrics(whole / "run")
    a, b = checkpoint.load(whole / "run"), checkpoint.load(run)
    assert a is not None
    assert b is not None
    for wanted, got in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert wanted.keys() == got.keys()
        assert all(mx.array_equal(wanted[name], got[name]).item() for name in wanted)
    assert files(whole / "store") == files(killed / "store")
    assert files(whole / "val_store") == files(killed / "val_store")
    assert (run / "model.safetensors").read_bytes() == (
        whole / "run/model.safetensors"
    ).read_bytes()
    assert not [path for path in killed.rglob("*") if re.search(r"\.tmp", path.name)]


def metrics(run: Path) -> list[dict[str, object]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a store but its lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
