"""Reading other people's checkpoints, and writing ours in one move."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from agevlm_mlx.data.chat import build_tokenizer
from agevlm_mlx.errors import UserError
from agevlm_mlx.models.graft import build_language_model
from agevlm_mlx.models.tensors import Rule, apply_rules
from agevlm_mlx.weights import write_weights
from convert import __main__ as cli
from convert import source
from convert.language_model import open_language_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    path = tmp_path / "hf"
    path.mkdir()
    write_weights(path, {"a": mx.arange(8.0), "b": mx.arange(8.0) + 1}, max_shard=32)
    return path


def read(path: Path) -> dict[str, mx.array]:
    with source.open_tensors(path) as tensors:
        mx.eval(tensors)
        return tensors


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def safetensors(path: Path, header: object, data: bytes = b"\0" * 32) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_shards_are_read_together(folder: Path):
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert read(folder)["b"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_hub_snapshot_of_links(folder: Path, tmp_path: Path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(tmp_path / f"blob{number}")
        (snapshot / file.name).symlink_to(tmp_path / f"blob{number}")
    assert set(read(snapshot)) == {"a", "b"}


def test_copying_holds_one_tensor_at_a_time(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    tensors = {f"t{i}": mx.full((1 << 18,), i, mx.float32) for i in range(8)}  # 1 MiB each
    write_weights(tmp_path / "in", tensors, max_shard=2 << 20)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with source.open_tensors(tmp_path / "in") as opened:
        doubled = {key: opened.pop(key) * 2 for key in list(opened)}
        write_weights(tmp_path / "out", doubled)
    # A shard and a tensor; all eight would be 8 MiB. The factor 2 itself takes a few bytes.
    assert mx.get_peak_memory() - before <= (3 << 20) + 64
    assert read(tmp_path / "out")["t7"][0].item() == 14


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [1000], "data_offsets": [0, 32]},
        {"dtype": "F32", "shape": [8], "data_offsets": [-8, 24]},
        {"dtype": "F32", "shape": [8], "data_offsets": [32, 0]},
        {"dtype": "F99", "shape": [8], "data_offsets": [0, 32]},
        {"dtype": "F32", "shape": [8]},
    ],
    ids=["beyond the file", "wrong size", "negative", "swapped", "unknown dtype", "no offsets"],
)
def test_a_header_that_lies(tmp_path: Path, entry: dict):
    path = safetensors(tmp_path / "model.safetensors", {"a": entry})
    assert "model.safetensors: not a readable safetensors file" in refusal(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x05\0\0\0\0\0\0\0{{{{{"])
def test_no_safetensors_at_all(tmp_path: Path, data: bytes):
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "not a readable safetensors file" in refusal(tmp_path)


def test_a_truncated_shard(folder: Path):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "model-00002-of-00002.safetensors: not a readable" in refusal(folder)


def test_a_missing_shard(folder: Path):
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing" in refusal(folder)


def test_a_tensor_in_two_shards(folder: Path):
    mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), {"a": mx.zeros(3)})
    assert "a is also in another shard" in refusal(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_that_leaves_the_folder(folder: Path, tmp_path: Path, name: str):
    mx.save_safetensors(str(tmp_path / "secret.safetensors"), {"a": mx.zeros(3)})
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing; the index names it" in refusal(folder)


def test_fp8_is_refused_where_it_is_kept(tmp_path: Path):
    table = {"dtype": "F8_E4M3", "shape": [32], "data_offsets": [0, 32]}
    safetensors(tmp_path / "model.safetensors", {"kept.weight": table})
    with source.open_tensors(tmp_path) as tensors:
        with pytest.raises(UserError) as caught:
            apply_rules(tensors, [Rule(r"kept\.(.*)", r"\1")], "there")
        assert apply_rules(tensors, [Rule(r".*", drop="reason")], "there")[0] == {}
    assert str(caught.value) == (
        "there: expected floating-point numbers, got kept.weight as uint8 (FP8 or quantised "
        "weights are not read); take the bfloat16 or full-precision checkpoint"
    )


@pytest.fixture
def language_model(tmp_path: Path) -> Callable[..., Path]:
    """A published one whose weights went through `change`, and what its config says besides."""
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 300,
    }

    def make(change: Callable[[Any], None], more: dict[str, Any]) -> Path:
        model = build_language_model(config)
        change(model)
        folder = tmp_path / "lm"
        folder.mkdir()
        write_weights(folder, dict(tree_flatten(model.parameters())))
        (folder / "config.json").write_text(json.dumps(config | more))
        build_tokenizer(["a dog"], vocab_size=290).save_pretrained(str(folder))
        return folder

    return make


NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(("key", "dtype"), [(NORM, mx.uint8), (DOWN, mx.uint32)])
@pytest.mark.parametrize("quantised", [False, True])
def test_integers_in_a_language_model(language_model, key, dtype, quantised):
    def change(model: Any) -> None:
        if quantised:
            nn.quantize(model, 32, 4, class_predicate=lambda path, _: path.endswith("up_proj"))
        model.load_weights(
            [(key, dict(tree_flatten(model.parameters()))[key].astype(dtype))], False
        )

    more = {"quantization": {"group_size": 32, "bits": 4}} if quantised else {}
    folder = language_model(change, more)
    with (
        pytest.raises(UserError, match=f"lm: expected floating.* got {key} as uint"),
        open_language_model(str(folder)),
    ):
        pass


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_integers_of_mlx_lms_own_quantisation(language_model, mode):
    folder = language_model(
        lambda model: nn.quantize(model, 32, 4, mode=mode),
        {"quantization": {"group_size": 32, "bits": 4, "mode": mode}},
    )
    with open_language_model(str(folder)) as lm:
        assert lm.weights[DOWN].dtype == mx.uint32


def write(path: Path, end: Exception | signal.Signals) -> None:
    """Half a folder, then an error or a signal."""
    with source.new_folder(path) as aside:
        (aside / "file").write_text("half")
        if isinstance(end, Exception):
            raise end
        os.kill(os.getpid(), end)


def test_nothing_is_left_after_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError):
        write(tmp_path / "deep/out", RuntimeError())
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(
    tmp_path: Path, stop: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("convert.verify.run", lambda _: write(tmp_path / "out", stop))
    assert cli.main(["verify", "a", "b"]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(tmp_path: Path, number: int):
    with pytest.raises(UserError, match="out: no room on the disk"):
        write(tmp_path / "out", OSError(number, os.strerror(number)))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_words_of_the_tokenizers_library(tmp_path: Path):
    from tokenizers import Tokenizer, models

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokenizer = Tokenizer(models.WordLevel({"x" * 1000: 0}, "x"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with (
            pytest.raises(UserError, match="out: no room on the disk"),
            source.new_folder(tmp_path / "out") as aside,
        ):
            tokenizer.save(str(aside / "tokenizer.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_two_at_once(tmp_path, kind):
    out = tmp_path / "out"

    def make() -> None:
        with source.new_folder(out) as aside:
            (aside / "config.json").write_text("ours")
            if kind == "folder":
                out.mkdir()
            (out / "config.json" if kind == "folder" else out).write_text("theirs")

    with pytest.raises(UserError, match="made by someone else"):
        make()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert next(p for p in tmp_path.rglob("*") if p.is_file()).read_text() == "theirs"


def test_a_file_where_a_folder_should_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"), source.new_folder(tmp_path / "file/out"):
        pass


@pytest.mark.chaos
def test_kill_9_leaves_no_folder_of_that_name(tmp_path: Path):
    script = (
        "import os, sys, pathlib; from convert import source\n"
        "with source.new_folder(pathlib.Path(sys.argv[1])) as aside:\n"
        "    (aside / 'config.json').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


@pytest.mark.parity
class TestPickles:
    """PyTorch's files, which are programs unless read with care."""

    @pytest.fixture
    def torch(self):
        import torch

        return torch

    def test_values_and_dtypes(self, torch, tmp_path: Path):
        state = {"f": torch.arange(4.0), "b": torch.arange(4).to(torch.bfloat16) / 3}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.bin")
        got = read(tmp_path)
        assert got["f"].tolist() == [0, 1, 2, 3]
        assert got["b"].dtype == mx.bfloat16
        assert got["b"].tolist() == state["b"].tolist()

    def test_the_format_before_torch_1_6(self, torch, tmp_path: Path):
        path = tmp_path / "old.bin"
        torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
        assert read(path)["a"].tolist() == [0, 1, 2]

    def test_code_is_not_run(self, torch, tmp_path: Path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
        assert "not a file of plain tensors" in refusal(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_other_things_than_tensors(self, torch, tmp_path: Path):
        torch.save({"a": [1, 2]}, tmp_path / "pytorch_model.bin")
        assert "expected a dictionary of tensors" in refusal(tmp_path)

    def test_no_pickle(self, torch, tmp_path: Path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"<html>404</html>")
        assert "not a file of plain tensors" in refusal(tmp_path)

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex64"])
    def test_numbers_that_are_not_read(self, torch, tmp_path: Path, dtype: str):
        torch.save({"a": torch.zeros(3, dtype=getattr(torch, dtype))}, tmp_path / "a.bin")
        assert f"got a as {dtype}" in refusal(tmp_path / "a.bin")

    def test_no_temporary_folder(self, torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        torch.save({"a": torch.zeros(3)}, tmp_path / "a.bin")
        mx.save_safetensors(str(tmp_path / "b.safetensors"), {"b": mx.zeros(3)})
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
        assert "set TMPDIR" in refusal(tmp_path / "a.bin")
        assert set(read(tmp_path / "b.safetensors")) == {"b"}  # needs none


@pytest.mark.parity
def test_an_empty_pickle(tmp_path):
    (tmp_path / "model.pth").touch()  # torch's error has no text
    with pytest.raises(UserError, match=r"model\.pth: not a file of plain tensors: EOFError"):
        source.unpickle(tmp_path / "model.pth")
