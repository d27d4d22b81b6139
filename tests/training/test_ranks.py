"""Several processes that train together, over the loopback network."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.training import checkpoint
from agevlm_mlx.training.log import read_metrics
from agevlm_mlx.training.ranks import Ranks

#: The tiny recipe, all in one stage's rhythm: a checkpoint and a validation now and then.
MODULE = ("-m", "agevlm_mlx.train")


def launch(folder: Path, size: int, *argv: str) -> list[subprocess.Popen]:
    """What ``mlx.launch --backend ring -n size`` starts: the same command for every rank."""
    sockets = [socket.socket() for _ in range(size)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    for each in sockets:
        each.close()
    file = folder / f"hosts-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(hosts))
    return [
        subprocess.Popen(
            [sys.executable, *argv],
            env=os.environ | {"MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status and output of each, within five minutes."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (
        (run / "metrics.jsonl").exists()
        and f'{{"step": {step},' in (run / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def parameters(run: Path) -> dict[str, np.ndarray]:
    saved = checkpoint.load(run)
    assert saved is not None
    assert saved.step == 20
    return {name: np.array(value) for name, value in saved.model.items()}


def largest_gap(a: Path, b: Path) -> float:
    first, second = parameters(a), parameters(b)
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The tiny recipe trained by one process, its batches in one piece."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = subprocess.run(
        [sys.executable, *MODULE, *tiny_arguments(tiny_folder), "--out", str(run)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return run


def tiny_arguments(folder: Path) -> list[str]:
    where = {"train": "train", "val": "val", "store": "store", "val_store": "val-store"}
    return [
        *("--recipe", str(Path(__file__).with_name("tiny.toml")), "train.pictures_every=0"),
        *(f"data.{key}={folder / name}" for key, name in where.items()),
    ]


def test_one_process_is_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch):
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.start()
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert ranks.sum([1, 2.5]) == [1.0, 2.5]
    assert ranks.share({"a": [1]}) == {"a": [1]}
    arrays = {"w": mx.array([1.5, -0.0])}
    assert ranks.share_arrays(arrays) == arrays
    assert ranks.sum_gradients(arrays) is arrays
    with ranks.together(), ranks.in_turn():
        pass


TALK = """
import agevlm_mlx
import mlx.core as mx, numpy as np
from agevlm_mlx.errors import UserError
from agevlm_mlx.training.ranks import Ranks
ranks = Ranks.start()
assert ranks.sum([ranks.rank, 1]) == [3.0, 3.0]
assert ranks.share({"a": [1, "é"]} if ranks.first else None) == {"a": [1, "é"]}
assert ranks.share([ranks.rank], 2) == [2]
assert ranks.gather(["a"] * ranks.rank) == ["a", "a", "a"]
wanted = {
    "x": mx.array([1.5, -0.0, float("nan"), float("inf")]),
    "half": mx.array([[1.0, -2.0]]).astype(mx.bfloat16),
    "whole": mx.array([[1, -2]], mx.int32),
    "scalar": mx.array(3, mx.int32),
    "packed": mx.array([2**32 - 1, 7], mx.uint32),
}
got = ranks.share_arrays(wanted if ranks.first else {})
assert got.keys() == wanted.keys()
for name, value in wanted.items():
    assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
    a, b = (np.array(v.reshape(-1).view(mx.uint8)) for v in (got[name], value))
    assert (a == b).all(), name
grads = ranks.sum_gradients({"a.0.w": mx.ones(3) * (ranks.rank + 1), "a.b": mx.ones(())})
assert {k: v.tolist() for k, v in grads.items()} == {"a.0.w": [6, 6, 6], "a.b": 3}
told = None
try:
    with ranks.together():
        if ranks.rank == 1:
            raise KeyError("mine")
except (UserError, KeyError) as error:
    told = type(error).__name__
assert told == ("KeyError" if ranks.rank == 1 else "UserError"), told
with ranks.in_turn():
    pass
print("fine", ranks.rank)
"""


@pytest.mark.e2e
def test_ranks_share_what_the_first_one_knows(tmp_path: Path):
    for rank, (status, out) in enumerate(ended(launch(tmp_path, 3, "-c", TALK))):
        assert status == 0, out
        assert f"fine {rank}" in out


@pytest.mark.e2e
@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_make_the_steps_of_one(
    alone: Path, tiny_folder: Path, tmp_path: Path, size: int
):
    run = tmp_path / "run"
    results = ended(
        launch(tmp_path, size, *MODULE, *tiny_arguments(tiny_folder), "--out", str(run))
    )
    assert [status for status, _ in results] == [0] * size, results
    assert f"{size} processes train together" in results[0][1]
    assert not any(out.strip() for _, out in results[1:])  # one speaks for all
    assert largest_gap(alone, run) < 1e-5
    one, many = read_metrics(alone / "metrics.jsonl"), read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row.keys()) for row in one] == [(r["step"], r.keys()) for r in many]
    for a, b in zip(one, many, strict=True):
        for key in {"loss", "lm", "attention", "norm", "val_lm", "val_pointing"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), (a, b)


@pytest.mark.e2e
def test_a_batch_in_parts_makes_the_same_step(alone: Path, tiny_folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, *MODULE, *tiny_arguments(tiny_folder), "train.micro_batch=1",
         "--out", str(run)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 < largest_gap(alone, run) < 1e-5


@pytest.mark.e2e
def test_mlx_launch_starts_them(tiny_folder: Path, tmp_path: Path):
    program = Path(sys.executable).with_name("mlx.launch")
    short = ["stages.0.steps=2", "stages.1.steps=2", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [str(program), "--hosts", "127.0.0.1,127.0.0.1", "--starting-port", str(free_port()), "--",
         str(program.with_name("agevlm")), "train", *tiny_arguments(tiny_folder), *short],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert "2 processes train together" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "run/model.safetensors").is_file()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 65000)


@pytest.mark.chaos
def test_a_rank_killed_stops_all_and_another_number_goes_on(
    alone: Path, tiny_folder: Path, tmp_path: Path
):
    run = tmp_path / "run"
    processes = launch(tmp_path, 4, *MODULE, *tiny_arguments(tiny_folder), "--out", str(run))
    wait_for_step(processes[0], run, 9)
    processes[2].kill()
    results = ended(processes)
    assert [status for status, _ in results] == [2, 2, -signal.SIGKILL, 2], results
    assert "the connection to another process was lost" in results[0][1]
    assert "agevlm train --resume" in results[0][1]
    saved = checkpoint.load(run)
    assert saved is not None
    told = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert saved.step == told[-1]  # no finished step is lost
    results = ended(launch(tmp_path, 3, *MODULE, "--resume", str(run)))
    assert [status for status, _ in results] == [0] * 3, results
    assert f"going on from step {saved.step}" in results[0][1]
    assert largest_gap(alone, run) < 1e-5
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 21))


@pytest.mark.chaos
def test_ctrl_c_stops_all_after_the_same_step(tiny_folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    processes = launch(tmp_path, 2, *MODULE, *tiny_arguments(tiny_folder), "--out", str(run))
    wait_for_step(processes[0], run, 4)
    processes[1].send_signal(signal.SIGINT)  # reaches one of them first, or only
    results = ended(processes)
    assert [status for status, _ in results] == [0, 0], results
    assert re.search(r"stopped after step \d+ of 20", results[0][1])


@pytest.mark.e2e
def test_a_rank_with_other_data_is_told_before_the_first_step(tiny_folder: Path, tmp_path: Path):
    processes = launch(
        tmp_path, 2, "-c", OTHER, str(tiny_folder), str(tmp_path / "run"),
    )  # fmt: skip
    results = ended(processes)
    assert [status for status, _ in results] == [2, 2], results
    assert "expected the data of rank 0" in results[1][1]
    assert "see its message" in results[0][1]
    assert not (tmp_path / "run/metrics.jsonl").exists()


OTHER = """
import os, sys
from pathlib import Path
from agevlm_mlx import train
from agevlm_mlx.training import build
folder, run = sys.argv[1:]
read = build.read_records
if os.environ["MLX_RANK"] == "1":
    def fewer(path, **options):
        from agevlm_mlx.data.record_set import Records
        records = read(path, **options)
        return Records.from_list([records[i] for i in range(len(records) - 1)], records.root)
    build.read_records = fewer
from tests.training.test_ranks import tiny_arguments
sys.exit(train.main([*tiny_arguments(Path(folder)), "--out", run]))
"""
