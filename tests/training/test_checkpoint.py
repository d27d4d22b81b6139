"""Checkpoints are whole or absent, and damage costs one checkpoint, not the run."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from agevlm_mlx.errors import UserError
from agevlm_mlx.training import checkpoint


def save(run: Path, step: int, *, keep: int = 2, best: int | None = None) -> Path:
    model = {"w": mx.full((4, 4), step), "half": mx.ones(3, mx.bfloat16)}
    moments = {"w/m": mx.full((4, 4), -step), "w/t": mx.array(step)}
    return checkpoint.save(run, step, model, moments, {"note": step}, keep=keep, best=best)


def test_load_gives_back_what_was_saved(tmp_path: Path):
    save(tmp_path, 5)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.state) == (5, {"note": 5})
    assert loaded.model["w"].tolist() == [[5.0] * 4] * 4
    assert loaded.model["half"].dtype == mx.bfloat16
    assert loaded.optimizer["w/t"].item() == 5
    assert (tmp_path / "last").read_text() == "steps/5\n"


def test_a_new_run_has_none(tmp_path: Path):
    assert checkpoint.load(tmp_path) is None


def test_keeps_the_newest_and_the_best(tmp_path: Path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, best=2 if step >= 2 else None)
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["2", "4", "5"]
    assert (tmp_path / "best").read_text() == "steps/2\n"


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 2, "sha256"')


def foreign_state(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def lose_a_file(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, cut_state, foreign_state, lose_a_file])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, capsys, damage):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert "steps/2: damaged checkpoint" in capsys.readouterr().err
    # Training goes on from 1 and reaches 2 again.
    save(tmp_path, 2)
    again = checkpoint.load(tmp_path)
    assert again is not None
    assert again.step == 2


def test_all_damaged_is_an_error(tmp_path: Path):
    truncate(save(tmp_path, 1))
    with pytest.raises(UserError, match="all are damaged"):
        checkpoint.load(tmp_path)


def test_checkpoints_beyond_the_new_one_are_removed(tmp_path: Path):
    for step in (4, 8):
        save(tmp_path, step)
    save(tmp_path, 6)
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["4", "6"]


def test_a_leftover_of_a_crash_is_neither_loaded_nor_in_the_way(tmp_path: Path):
    folder = save(tmp_path, 3)
    shutil.copytree(folder, folder.with_name(".7.tmp"))
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.step == 3
    save(tmp_path, 7)
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["3", "7"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import mlx.core as mx
from agevlm_mlx.errors import UserError
from agevlm_mlx.training import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(Path(sys.argv[1]), 2, {"w": mx.ones(100_000)}, {}, {}, keep=2, best=None)
except UserError as error:
    sys.exit(f"UserError {error}")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs file size limits")
def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path):
    save(tmp_path, 1)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "UserError" in result.stderr
    assert f"agevlm train --resume {tmp_path}" in result.stderr
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["1"]
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


def test_write_text_replaces_the_file_whole(tmp_path: Path, monkeypatch):
    path = tmp_path / "last"
    checkpoint.write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError("disk")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="disk"):
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_clear_removes_a_run_and_nothing_else(tmp_path: Path):
    save(tmp_path, 1, best=1)
    for name in ("metrics.jsonl", "config.toml", "notes.txt"):
        (tmp_path / name).write_text("")
    checkpoint.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_killed_process_left_half_written_goes_when_a_run_is_taken_up(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    left = [tmp_path / ".tmp-0123", tmp_path / "pictures" / ".tmp-4567.png"]
    kept = [tmp_path / "last", tmp_path / "mine.tmp-1"]
    for path in (*left, *kept):
        path.write_text("x")
    with checkpoint.alone(tmp_path):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)
