"""Real conversions, in a process of their own, on full disks, killed half-way, and weighed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.data.chat import build_tokenizer
from agevlm_mlx.models.graft import build_language_model
from agevlm_mlx.models.vision import build_encoder
from agevlm_mlx.weights import write_weights

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]
LIMIT = 1 << 20
#: 110 x 110 tokens: one tensor of 25 MB (the table of positions), the others of at most 4.
LARGE = {
    "model_type": "siglip_vision_model",
    "image_size": 220,
    "patch_size": 2,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 13,
    "num_attention_heads": 8,
}
LARGEST_TENSOR = 110 * 110 * 512 * 4
OTHER_TENSOR = 2048 * 512 * 4
SHARD = 48 << 20
CONVERT = "import sys; from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
WEIGHED = """
import re, sys
from pathlib import Path
from convert.__main__ import main
import mlx.core as mx
if sys.argv.pop(1) == "bin":
    import torch
def resident():
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else "VmHWM: 0"
    return int(re.search(r"VmHWM:\\s+(\\d+)", text)[1]) * 1024
before = resident()
mx.reset_peak_memory()
status = main(sys.argv[1:])
print(mx.get_peak_memory(), resident() - before)
sys.exit(status)
"""


def siglip(folder: Path, config: dict) -> Path:
    """An encoder as Hugging Face publishes it, of random numbers, in shards of 48 MB."""
    folder.mkdir()
    tensors = dict(tree_flatten(build_encoder(config).parameters()))
    kernel = "embeddings.patch_embedding.weight"
    tensors[kernel] = tensors[kernel].transpose(0, 3, 1, 2)
    write_weights(folder, {f"vision_model.{k}": v for k, v in tensors.items()}, SHARD)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pickled(source: Path, folder: Path) -> Path:
    """The same as PyTorch pickles."""
    import torch

    folder.mkdir()
    names = {}
    for file in sorted(source.glob("*.safetensors")):
        shard = "pytorch_" + file.with_suffix(".bin").name
        tensors = mx.load(str(file))
        names |= dict.fromkeys(tensors, shard)
        torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, folder / shard)
    index = {"weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return siglip(tmp_path_factory.mktemp("large") / "hf", LARGE)


@pytest.fixture(scope="module")
def large_bin(large: Path) -> Path:
    return pickled(large, large.parent / "bin")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Four megabytes: four times what a file may have."""
    return siglip(
        tmp_path / "hf", LARGE | {"image_size": 16, "hidden_size": 128, "num_hidden_layers": 2}
    )


def environment(scratch: Path) -> dict[str, str]:
    scratch.mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(scratch)}


def start(scratch: Path, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(scratch),
    )


def refusal_without_room(tmp_path: Path, *arguments: object) -> str:
    """What a command says that may write no file beyond a megabyte; it leaves nothing."""
    out, scratch = tmp_path / "results/out", tmp_path / "scratch"
    limited = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({LIMIT}, {LIMIT})); "
    done = subprocess.run(
        [sys.executable, "-c", limited + CONVERT, *map(str, arguments), "--mlx-path", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(scratch),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert not list(scratch.iterdir())
    return done.stderr


def test_an_encoder_and_no_room_for_it(small, tmp_path):
    said = refusal_without_room(tmp_path, "vision", "--hf-path", small)
    assert f"{tmp_path}/results/out: no room on the disk" in said


@pytest.mark.parity
def test_a_pickle_and_no_room_to_unpack_it(small, tmp_path):
    folder = pickled(small, tmp_path / "bin")
    said = refusal_without_room(tmp_path, "vision", "--hf-path", folder)
    assert f"no room to unpack it in {tmp_path}/scratch" in said
    assert "set TMPDIR" in said


def test_a_joined_model_and_no_room_for_it(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": 300,
    }
    (tmp_path / "lm").mkdir()
    write_weights(tmp_path / "lm", dict(tree_flatten(build_language_model(config).parameters())))
    (tmp_path / "lm/config.json").write_text(json.dumps(config))
    build_tokenizer(["a dog", "a cat"], vocab_size=290).save_pretrained(str(tmp_path / "lm"))
    said = refusal_without_room(
        tmp_path, "assemble", "--lm", tmp_path / "lm", "--vision", "shipped"
    )
    assert f"{tmp_path}/results/out: no room on the disk" in said


@pytest.mark.parametrize("out", ["/proc/agevlm/out", "{}/file/out"])
def test_a_place_that_cannot_be_written(small, tmp_path, out):
    (tmp_path / "file").write_text("")
    out = out.format(tmp_path)
    process = start(tmp_path / "scratch", "vision", "--hf-path", small, "--mlx-path", out)
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.startswith(f"error: {out}: cannot be made")
    assert said.count("\n") == 1


def wait_for(seen: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 60
    while not seen():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.001)


def test_kill_9_in_the_middle_of_a_conversion(large, tmp_path):
    out = tmp_path / "out"
    command = ("vision", "--hf-path", large, "--mlx-path", out)
    process = start(tmp_path / "scratch", *command)
    wait_for(lambda: any(tmp_path.glob(".out-*/*.safetensors")), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    again = start(tmp_path / "scratch", *command)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parity
def test_told_to_end_while_a_pickle_is_unpacked(large_bin, tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    process = start(scratch, "vision", "--hf-path", large_bin, "--mlx-path", out)
    wait_for(lambda: any(scratch.glob("agevlm-convert-*/*.safetensors")), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said == "\ninterrupted\n"
    assert not list(scratch.iterdir())
    assert not out.exists()


def weigh(kind: str, folder: Path, out: Path, record: Callable[[str, object], None]) -> list[int]:
    """Peaks of MLX's memory, and of the process's (0 where that is not known)."""
    command = [sys.executable, "-c", WEIGHED, kind, "vision", "--hf-path", str(folder)]
    done = subprocess.run(
        [*command, "--mlx-path", str(out)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    peaks = [int(part) for part in done.stdout.splitlines()[-1].split()]
    for name, peak in zip(("MLX", "process"), peaks, strict=True):
        record(f"{name} peak, MB", round(peak / 1e6, 1))
        print(f"{kind}: {name} peak {peak / 1e6:.1f} MB")
    return peaks


def test_memory_of_safetensors(large, tmp_path, record_property):
    assert len(list(large.glob("*.safetensors"))) == 4
    mlx, process = weigh("safetensors", large, tmp_path / "out", record_property)
    assert mlx <= LARGEST_TENSOR + 2 * OTHER_TENSOR
    assert process <= LARGEST_TENSOR + 6 * OTHER_TENSOR


@pytest.mark.parity
def test_memory_of_pickles(large_bin, tmp_path, record_property):
    """One shard plus one tensor above the largest shard."""
    sizes = [file.stat().st_size for file in large_bin.glob("*.bin")]
    assert len(sizes) == 4
    peaks = weigh("bin", large_bin, tmp_path / "out", record_property)
    assert max(peaks) <= 2 * max(sizes) + LARGEST_TENSOR
